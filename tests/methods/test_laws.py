"""What holds for every method. A new method joins by a row in `settings.py`."""

import dataclasses
import json

import pytest
import torch
import transformers
from settings import SETTINGS
from trials import trial_for

from hf_zoo.checkpoint import CheckpointReader, write_checkpoint
from hf_zoo.errors import CheckpointError, MergeError, RecipeError
from hf_zoo.files import sha256_of
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import CHOSEN_BY, NEED_FIELDS, Need, get_method, list_methods, make_method
from hf_zoo.shards import TensorInfo

FAMILIES = ["bert", "vit", "resnet", "gpt2"]
laws = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def nearness_to(target):
    """A score for methods that need one: minus the distance to some weights; it has one best mixture."""

    def score(tensors):
        return -sum(
            float((tensors[name].double() - target[name].double()).square().sum())
            for name in target
            if target[name].is_floating_point()
        )

    return score


def taken(setting, members):
    """Return as many of the members as the method merges at most."""
    return members[: make_method(setting.method, setting.parameters).arity[1]]


def make_inputs(setting, members, seed=0, **others):
    members = taken(setting, members)
    needs = make_method(setting.method, setting.parameters).needs
    if Need.SCORE in needs:
        others.setdefault("score", nearness_to(members[0]))
    if Need.DATA in needs:
        others.setdefault("trials", (trial_for(members[0]),))
    if Need.BASE in needs:
        others.setdefault("base", members[0])
    if Need.FISHER in needs:
        others.setdefault("fisher", [fisher_like(member) for member in members])
        others.setdefault("num_examples", tuple(100.0 + int(member.source[-1]) for member in members))
    if Need.GRAM in needs:
        others.setdefault("gram", [gram_like(member) for member in members])
    return MergeInputs.of(members, seed=seed, **others)


def fisher_like(member):
    """A Fisher of every parameter, and of no buffer, that belongs to the member wherever it stands."""
    return CheckpointReader.of(
        {
            name: tensor.float().square() + 0.01
            for name, tensor in member.items()
            if tensor.is_floating_point() and "running" not in name
        },
        member.source,
    )


def gram_like(member):
    """A Gram matrix of every matrix's last axis."""
    matrices = {name: tensor.float() for name, tensor in member.items() if tensor.ndim == 2}
    return CheckpointReader.of({name: tensor.T @ tensor for name, tensor in matrices.items()}, member.source)


def merge(setting, members, seed=0, **others):
    method = make_method(setting.method, setting.parameters)
    return dict(method.merge(make_inputs(setting, members, seed, **others)))


def assert_close(merged, wanted, family_reader):
    assert set(merged) == set(family_reader)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name])  # float32 rounding of a mean of three


def test_every_method_has_a_row():
    assert {setting.method for setting in SETTINGS} == set(list_methods())


@laws
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_model_merge_to_that_model(setting, family, reader):
    member = reader(family, 1)
    assert_close(merge(setting, [member] * 3), member, member)


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting.symmetric], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_members_does_not_matter(setting, family, reader):
    members = taken(setting, [reader(family, seed) for seed in (1, 2, 3)])
    score = nearness_to(dict(make_method("average").merge(MergeInputs.of(members))))
    needs = make_method(setting.method, setting.parameters).needs
    others = {"score": score} if Need.SCORE in needs else {}
    others |= {"base": reader(family, 4)} if Need.BASE in needs else {}
    forward, backward = merge(setting, members, **others), merge(setting, members[::-1], **others)
    for name, tensor in forward.items():
        if tensor.is_floating_point():  # integer buffers are the first member's
            torch.testing.assert_close(tensor, backward[name])


@laws
def test_inputs_are_byte_identical_afterwards(setting, member_folder, reader):
    folders = [member_folder("resnet", seed) for seed in (1, 2, 3)]
    before = [sha256_of(folder / "model.safetensors") for folder in folders]
    in_memory = [dict(reader("resnet", seed)) for seed in (1, 2, 3)]
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in in_memory]
    members = [CheckpointReader.of(tensors, f"member {i}") for i, tensors in enumerate(in_memory)]
    merge(setting, members)
    for tensors, before_merging in zip(in_memory, copies, strict=True):
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, before_merging[name], rtol=0, atol=0)
    merge(setting, [reader("resnet", seed) for seed in (1, 2, 3)])
    assert [sha256_of(folder / "model.safetensors") for folder in folders] == before


@laws
def test_the_same_seed_gives_the_same_bytes(setting, reader, tmp_path):
    members = [reader("bert", seed) for seed in (1, 2, 3)]
    hashes = set()
    for run in range(2):
        merged = merge(setting, members, seed=7)
        layout = {name: TensorInfo.of(tensor) for name, tensor in merged.items()}
        (path,) = write_checkpoint(tmp_path / f"run-{run}", merged.items(), layout)
        hashes.add(sha256_of(path))
    assert len(hashes) == 1


@laws
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_loads_with_nothing_missing(setting, family, reader, member_folder, tmp_path):
    members = [reader(family, seed) for seed in (1, 2, 3)]
    merged = merge(setting, members)
    layout = {name: TensorInfo.of(tensor) for name, tensor in merged.items()}
    files = {"config.json": member_folder(family, 1) / "config.json"}
    write_checkpoint(tmp_path / "merge", merged.items(), layout, files)
    architecture = json.loads((tmp_path / "merge" / "config.json").read_text())["architectures"][0]
    _, info = getattr(transformers, architecture).from_pretrained(tmp_path / "merge", output_loading_info=True)
    assert not any(info.values())


@laws
def test_a_sharded_member_counts_as_any_other(setting, reader):
    whole = [reader("bert", seed) for seed in (1, 2, 3)]
    mixed = [reader("bert", 1, max_shard_size="4kB"), *whole[1:]]
    assert len(mixed[0].files) > 1
    wanted = merge(setting, whole)
    for name, tensor in merge(setting, mixed).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


@laws
def test_the_members_type_is_kept(setting, reader):
    members = [reader("bert", seed, dtype=torch.bfloat16) for seed in (1, 2, 3)]
    assert {tensor.dtype for tensor in merge(setting, members).values()} == {torch.bfloat16}


@laws
def test_integer_buffers_are_copied(setting, reader):
    members = [reader("resnet", 1)] * 2 + [reader("resnet", 2)]
    merged = merge(setting, members)
    counters = [tensor for name, tensor in merged.items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(int(tensor) in {101, 102} and tensor.dtype == torch.int64 for tensor in counters)


@laws
def test_a_need_that_is_not_met_is_named(setting, reader):
    method = make_method(setting.method, setting.parameters)
    members = [reader("bert", seed) for seed in (1, 2, 3)]
    inputs = make_inputs(setting, members)
    for need in method.needs:
        without = dataclasses.replace(inputs, **{NEED_FIELDS[need]: None})
        with pytest.raises(MergeError) as refusal:
            dict(method.merge(without))
        assert f"{setting.method} needs {need.value}" in str(refusal.value)
    if not method.needs:
        assert dict(method.merge(inputs))


@laws
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_is_not_finite_is_refused_by_name(setting, value, reader):
    good = [dict(reader("bert", seed)) for seed in (1, 2, 3)]
    name = "bert.encoder.layer.1.output.dense.weight"
    good, bad = taken(setting, good), len(taken(setting, good[:2])) - 1
    good[bad][name] = good[bad][name].clone()
    good[bad][name][3, 4] = value
    members = [CheckpointReader.of(tensors, f"org/member-{i}") for i, tensors in enumerate(good)]
    with pytest.raises(CheckpointError, match=rf"org/member-{bad}: tensor '{name}' .*1 (NaN|infinite) of 320"):
        merge(setting, members)


@laws
def test_what_was_chosen_on_data_makes_the_same_merge_without_them(setting, reader):
    method = make_method(setting.method, setting.parameters)
    inputs = make_inputs(setting, [reader("bert", seed) for seed in (1, 2, 3)])
    merged = dict(method.merge(inputs))
    assert bool(inputs.choices) <= bool(method.needs & CHOSEN_BY)
    recalled = json.loads(json.dumps(inputs.choices))
    without = dataclasses.replace(inputs, score=None, trials=None, recalled=recalled, report={}, choices={})
    if method.needs & CHOSEN_BY and not recalled:  # all weights come of the data
        with pytest.raises(MergeError, match="needs"):
            method.check(without)
        return
    for name, tensor in method.merge(without):
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0)
    assert without.choices == recalled


@laws
def test_the_paper_and_the_description_are_on_the_class(setting):
    method = make_method(setting.method, setting.parameters)
    described = json.loads(json.dumps(method.describe()))
    assert described["name"] == setting.method
    assert described["description"].endswith(".")
    assert described["url"].startswith("https://")
    assert described["title"]
    assert str(method.paper.year) in described["paper"]
    assert set(setting.parameters) <= set(described["parameters"])


@laws
def test_an_unknown_hyper_parameter_is_refused(setting):
    with pytest.raises(RecipeError, match=r"parameters\.densitty: unknown key"):
        make_method(setting.method, setting.parameters | {"densitty": 0.2})


def test_an_unknown_method_answers_with_the_nearest():
    with pytest.raises(MergeError, match=r"unknown method 'averge' \(did you mean 'average'\?\): known are "):
        get_method("averge")


def test_members_of_two_architectures_are_refused_with_the_first_tensors(reader):
    with pytest.raises(
        MergeError, match=r"org/bert-1 and org/vit-1 are not of one architecture: org/vit-1 lacks 'bert"
    ):
        MergeInputs.of([reader("bert", 1), reader("vit", 1)])


def test_members_of_two_shapes_are_refused_with_the_tensor(reader):
    other = dict(reader("bert", 2)) | {"classifier.weight": torch.zeros(5, 16)}
    with pytest.raises(
        MergeError, match=r"'classifier\.weight' is \[2, 16\] in the first and \[5, 16\] in the second"
    ):
        MergeInputs.of([reader("bert", 1), CheckpointReader.of(other, "org/wide")])


def test_no_member_is_refused():
    with pytest.raises(MergeError, match="there is no member"):
        MergeInputs.of([])


def test_draws_depend_on_seed_and_tensor_alone(reader):
    inputs = MergeInputs.of([reader("bert", 1)], seed=3)
    again = MergeInputs.of([reader("bert", 1)], seed=3)
    first = torch.rand(4, generator=inputs.generator("a"))
    again.generator("b")
    torch.testing.assert_close(torch.rand(4, generator=again.generator("a")), first, rtol=0, atol=0)
    assert not torch.equal(torch.rand(4, generator=inputs.generator("b")), first)
    assert not torch.equal(torch.rand(4, generator=dataclasses.replace(inputs, seed=4).generator("a")), first)
