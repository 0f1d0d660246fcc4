"""AdaMerging: task arithmetic to begin with, surer answers in the end, and never a look at a label."""

import dataclasses

import pytest
import torch
from conftest import make_model
from trials import family_trial, trial_of

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.ingredients import open_ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.recipe.schema import ObjectiveSpec


def run(inputs, **parameters):
    return dict(make_method("adamerging", parameters).merge(inputs))


def family_inputs(reader, family="bert", **others):
    members = [reader(family, seed) for seed in (1, 2, 3)]
    return MergeInputs.of(members, base=reader(family, 4), trials=(family_trial(family),), **others)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_without_a_step_it_is_task_arithmetic(granularity, reader):
    inputs = family_inputs(reader)
    wanted = dict(make_method("task_arithmetic", {"scale": 0.3}).merge(inputs))
    for name, tensor in run(inputs, granularity=granularity, num_steps=0).items():
        torch.testing.assert_close(tensor, wanted[name])
    assert inputs.report["entropy before"] == inputs.report["entropy after"]


def test_trimmed_without_a_step_it_is_the_sum_of_ties(reader):
    inputs = family_inputs(reader)
    wanted = dict(make_method("ties", {"density": 0.2, "normalize": False, "scale": 0.3}).merge(inputs))
    for name, tensor in run(inputs, density=0.2, num_steps=0).items():
        torch.testing.assert_close(tensor, wanted[name])


def test_every_member_may_begin_elsewhere(reader):
    inputs = family_inputs(reader)
    wanted = dict(make_method("task_arithmetic", {"scale": 1.0, "weights": [0.1, 0.2, 0.3]}).merge(inputs))
    for name, tensor in run(inputs, initial=[0.1, 0.2, 0.3], num_steps=0).items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize("family", ["bert", "vit", "resnet", "gpt2"])
def test_the_entropy_falls(family, reader):
    inputs = family_inputs(reader, family)
    run(inputs, learning_rate=0.01, num_steps=30)
    assert inputs.report["entropy after"]["task"] < inputs.report["entropy before"]["task"]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Two opposite task vectors of the last layer, the second half as long, on a base that answers nothing.

    The logits are (lambda_1 - lambda_2 / 2) times those of the first member, so the entropy is least at (1, 0).
    """
    folder = tmp_path_factory.mktemp("opposite")
    make_model("vit", 1).save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, generator=draw)
    state = dict(CheckpointReader.open(folder)) | {"classifier.bias": torch.zeros(3)}
    base, *members = [
        CheckpointReader.of(state | {"classifier.weight": factor * weight}, f"member-{place}")
        for place, factor in enumerate((0.0, 1.0, -0.5))
    ]
    samples = [
        {"pixel_values": torch.randn(1, 8, 8, generator=draw), "labels": torch.tensor(place % 3)}
        for place in range(20)
    ]
    trial = trial_of([open_ingredient(str(folder))], "image_classification", samples)
    return MergeInputs.of(members, base=base, trials=(trial,))


def test_coefficients_come_to_the_corner_where_the_entropy_is_least(linear):
    inputs = dataclasses.replace(linear, report={})
    merged = run(inputs, granularity="task", learning_rate=0.05, num_steps=60)
    first, second = inputs.report["coefficients"].values()
    assert first[0] == pytest.approx(1.0, abs=1e-6)  # clamped
    assert second[0] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(merged["classifier.weight"], inputs.members[0]["classifier.weight"])


def test_unclamped_coefficients_go_on(linear):
    inputs = dataclasses.replace(linear, report={})
    run(inputs, granularity="task", clamp=False, learning_rate=0.05, num_steps=60)
    first, second = inputs.report["coefficients"].values()
    assert first[0] > 1.2
    assert second[0] < -0.2


def test_labels_are_never_read(reader):
    inputs = family_inputs(reader)
    (trial,) = inputs.trials
    without = [{k: v for k, v in sample.items() if k != "labels"} for sample in trial.tables["validation"]]
    blind = dataclasses.replace(inputs, trials=(dataclasses.replace(trial, tables={"validation": without}),))
    found = run(blind, num_steps=5)
    for name, tensor in run(inputs, num_steps=5).items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=0)


def test_padding_has_no_say(reader):
    """Of token predictions: what the model says at masked positions does not count."""
    inputs = family_inputs(reader, "gpt2")
    (trial,) = inputs.trials

    def padded(sample, token):
        tokens = torch.cat([sample["input_ids"], torch.tensor([token] * 3)])
        mask = torch.tensor([1] * 5 + [0] * 3)
        return {"input_ids": tokens, "attention_mask": mask}

    losses = set()
    for token in (0, 7):
        samples = [padded(sample, token) for sample in trial.tables["validation"]]
        own = dataclasses.replace(
            inputs, trials=(dataclasses.replace(trial, tables={"validation": samples}),), report={}
        )
        run(own, num_steps=0)
        losses.add(own.report["entropy before"]["task"])
    run(inputs, num_steps=0)
    losses.add(inputs.report["entropy before"]["task"])
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)  # causal: padding on the right changes nothing else


def test_running_statistics_get_the_mean(reader):
    inputs = family_inputs(reader, "resnet")
    merged = run(inputs, num_steps=1)
    wanted = dict(make_method("average").merge(MergeInputs.of(inputs.members)))
    statistics = [name for name in merged if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(merged[name], wanted[name])


def test_embeddings_have_no_entropy(reader):
    inputs = family_inputs(reader)
    trial = dataclasses.replace(inputs.trials[0], objective=ObjectiveSpec(name="contrastive"))
    with pytest.raises(MergeError, match="adamerging: task was learned by contrast"):
        make_method("adamerging").check(dataclasses.replace(inputs, trials=(trial,)))


def test_one_beginning_a_member(reader):
    with pytest.raises(MergeError, match="adamerging: initial needs one value a member: got 2 for 3"):
        make_method("adamerging", {"initial": [0.1, 0.2]}).check(family_inputs(reader))


@pytest.mark.parametrize(
    "wrong", [{"initial": float("nan")}, {"density": 0.0}, {"learning_rate": -1.0}, {"num_steps": -1}]
)
def test_hyper_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        make_method("adamerging", wrong)
