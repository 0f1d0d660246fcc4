"""Hyper-parameters that vary over the network: which value which tensor gets, and that parts make one whole."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import Need
from hf_zoo.places import Places
from hf_zoo.recipe.schema import MergeRule
from hf_zoo.varying import idle_keys, plan_parts, value_at, with_extras

NAMES = [
    "embed.weight",
    *(f"layers.{i}.{kind}.weight" for i in range(5) for kind in ("attention", "mlp")),
    "norm.weight",
    "head.weight",
]


@pytest.fixture
def places():
    return Places(NAMES, lambda: NAMES, lambda: ["head.weight"])


def models(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        CheckpointReader.of({name: torch.randn(3, 2, generator=draw) for name in NAMES}, f"m{i}") for i in range(count)
    ]


def test_blocks_are_read_off_the_names_and_ends_off_the_order(places):
    assert {places.blocks[name].index for name in NAMES if name in places.blocks} == set(range(5))
    assert places.embeddings == {"embed.weight"}
    assert places.heads == {"head.weight"}
    assert [places.depth(name) for name in ("embed.weight", "layers.2.mlp.weight", "norm.weight")] == [0, 0.5, 1]


def test_numbers_that_are_no_stack_are_no_blocks():
    names = ["classifier.0.weight", "classifier.2.weight", "only.0.weight"]
    assert Places(names, lambda: names, list).blocks == {}


def test_two_stacks_have_depths_of_their_own():
    names = [f"encoder.block.{i}.layer.0.w" for i in range(3)] + [f"decoder.block.{i}.layer.0.w" for i in range(5)]
    places = Places(names, lambda: names, list)
    depths = [places.depth(f"{stack}.block.1.layer.0.w") for stack in ("encoder", "decoder")]
    assert depths == [1 / 2, 1 / 4]


@pytest.mark.parametrize(
    ("value", "name", "wanted"),
    [
        (0.5, "embed.weight", 0.5),
        ([1, 2], "embed.weight", [1, 2]),
        ({"embeddings": 0.1, "otherwise": 0.2}, "embed.weight", 0.1),
        ({"embeddings": 0.1, "otherwise": 0.2}, "norm.weight", 0.2),
        ({"heads": 0.1}, "norm.weight", None),
        ({"heads": 0.1}, "head.weight", 0.1),
        ({"blocks": 3, "block 3": 1, "blocks 0-2": 2}, "layers.3.mlp.weight", 1),
        ({"block 3": 1, "blocks 0-2": 2, "blocks": 3}, "layers.2.mlp.weight", 2),
        ({"block 3": 1, "blocks 0-2": 2, "blocks": 3}, "layers.4.mlp.weight", 3),
        ({r"mlp\.weight$": 7, "otherwise": 8}, "layers.4.mlp.weight", 7),
        ({"otherwise": 8, r"mlp\.weight$": 7}, "layers.4.mlp.weight", 7),  # order does not count
        ({"blocks": 3, "embeddings": 2, "block 4": 1, "mlp": 0}, "layers.4.mlp.weight", 0),
        ({"blocks": 3, "embeddings": 2, "block 4": 1, "mlp": 0}, "layers.4.attention.weight", 1),
        ({"mlp": 5, "layers": 5}, "layers.4.mlp.weight", 5),
        # 5 blocks at depths 0, 1/4, 1/2, 3/4, 1; three values at 0, 1/2, 1
        ({"blocks": [0, 1, 5]}, "layers.1.mlp.weight", 0.5),
        ({"blocks": [0, 1, 5]}, "layers.3.mlp.weight", 3.0),
        ({"blocks": [0, 1, 5]}, "embed.weight", 0.0),
        ({"blocks": [0, 1, 5]}, "norm.weight", 5.0),
        ({"blocks": [4]}, "layers.3.mlp.weight", 4.0),
        ([1.0, {"mlp": {"blocks": [0, 1]}, "otherwise": 9}], "layers.1.mlp.weight", [1.0, 0.25]),
        ([1.0, {"mlp": {"blocks": [0, 1]}, "otherwise": 9}], "norm.weight", [1.0, 9]),
    ],
)
def test_a_value_at_a_tensor(places, value, name, wanted):
    assert value_at(value, name, places, "parameters.x") == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"blocks": []}, r"parameters\.x\.blocks: a gradient is a list of numbers"),
        ({"blocks": [1, "two"]}, r"parameters\.x\.blocks: a gradient"),
        ({"(": 1}, r"'\(' is neither one of embeddings, heads, blocks, otherwise"),
        (
            {"norm": 1, "weight": 2},
            r"parameters\.x: 'norm' and 'weight' both fit 'norm.weight', with different values",
        ),
    ],
)
def test_a_value_that_cannot_be_understood_is_refused(places, value, message):
    with pytest.raises(RecipeError, match=message):
        value_at(value, "norm.weight", places, "parameters.x")


def merge(members, places, method, parameters, rules=(), averaged=(), **others):
    inputs = MergeInputs.of(members, **others)
    merger = plan_parts(method, parameters, rules, places, NAMES, averaged)
    merged = dict(merger.merge(inputs))
    assert sorted(merged) == sorted(NAMES)
    pieces = {name: torch.empty(6) for name in NAMES}
    for work in merger.works(inputs):
        work.run(lambda name, start, piece: pieces[name][start : start + len(piece)].copy_(piece))
    for name in NAMES:
        torch.testing.assert_close(pieces[name].reshape(3, 2), merged[name], rtol=0, atol=0)
    return merged


def test_weights_vary_from_tensor_to_tensor(places):
    one, other = members = models(2)
    merged = merge(members, places, "average", {"weights": [{"blocks": [1, 0]}, {"blocks": [0, 1]}]})
    for i in range(5):
        name = f"layers.{i}.mlp.weight"
        torch.testing.assert_close(merged[name], (1 - i / 4) * one[name] + i / 4 * other[name])
    torch.testing.assert_close(merged["embed.weight"], one["embed.weight"])
    torch.testing.assert_close(merged["head.weight"], other["head.weight"])


def test_rules_keep_exchange_and_depart(places):
    one, other, base = models(3)
    rules = [
        MergeRule(tensors="heads", keep=1),
        MergeRule(tensors="norm", keep="base"),
        MergeRule(tensors="embeddings", method="average", parameters={"weights": (3, 1)}),
        MergeRule(tensors="attention", parameters={"scale": 2.0}),
    ]
    merged = merge([one, other], places, "task_arithmetic", {"scale": 0.5}, rules, base=base)

    def moved(name, scale):
        return base[name] + scale * (one[name] + other[name] - 2 * base[name])

    torch.testing.assert_close(merged["head.weight"], other["head.weight"])
    torch.testing.assert_close(merged["norm.weight"], base["norm.weight"])
    torch.testing.assert_close(merged["embed.weight"], 0.75 * one["embed.weight"] + 0.25 * other["embed.weight"])
    torch.testing.assert_close(merged["layers.1.mlp.weight"], moved("layers.1.mlp.weight", 0.5))
    torch.testing.assert_close(merged["layers.1.attention.weight"], moved("layers.1.attention.weight", 2.0))


def test_what_the_base_never_trained_is_averaged_and_not_differenced(places):
    one, other, base = models(3)
    merged = merge([one, other], places, "task_arithmetic", {}, averaged=["head.weight"], base=base)
    torch.testing.assert_close(merged["head.weight"], (one["head.weight"] + other["head.weight"]) / 2)


def test_a_rule_that_fits_nothing_is_refused(places):
    rules = [MergeRule(tensors="."), MergeRule(tensors="heads", keep=0)]
    with pytest.raises(MergeError, match=r"rules\[1\]\.tensors: 'heads' fits no tensor that an earlier rule left"):
        plan_parts("average", {}, rules, places, NAMES)


def test_mistakes_name_the_rule(places):
    rules = [MergeRule(tensors="heads", method="ties", parameters={"densitty": 0.5})]
    with pytest.raises(RecipeError, match=r"rules\[0\]\.parameters\.densitty: unknown key"):
        plan_parts("average", {}, rules, places, NAMES)


def test_the_needs_of_all_parts_count(places):
    merger = plan_parts("average", {}, [MergeRule(tensors="heads", method="ties")], places, NAMES)
    assert merger.needs == {Need.BASE}
    assert merger.uses_base
    assert not plan_parts("average", {}, [MergeRule(tensors="heads", keep=0)], places, NAMES).uses_base
    assert plan_parts("average", {}, [MergeRule(tensors="heads", keep="base")], places, NAMES).uses_base


def test_the_description_keeps_what_was_written_and_says_what_came_of_it(places):
    merger = plan_parts("task_arithmetic", {"scale": {"heads": 0.0, "otherwise": 0.5}}, (), places, NAMES)
    described = merger.describe()
    assert described["parameters"]["scale"] == {"heads": 0.0, "otherwise": 0.5}
    assert sorted((part["tensors"], part["parameters"]["scale"]) for part in described["parts"]) == [
        (1, 0.0),
        (12, 0.5),
    ]


def test_extras_are_averaged_over_those_that_have_them(places):
    one, two, three = models(3)
    extra = {"extra.weight": torch.ones(2), **two}
    also = {"extra.weight": 3 * torch.ones(2), **three}
    members = (one, CheckpointReader.of(extra, "m1"), CheckpointReader.of(also, "m2"))
    layout = one.layout | {"extra.weight": members[1].layout["extra.weight"]}
    merger = with_extras(plan_parts("average", {}, (), places, NAMES), {"extra.weight": (1, 2)})
    merged = dict(merger.merge(MergeInputs(members=members, layout=layout)))
    torch.testing.assert_close(merged["extra.weight"], torch.full((2,), 2.0))
    assert len(merged) == len(NAMES) + 1


def test_a_tensor_its_class_does_not_know_lies_before_the_blocks():
    order = [name for name in NAMES if name != "embed.weight"]
    places = Places(NAMES, lambda: order, lambda: ["head.weight"])
    assert places.depth("embed.weight") == 0
    assert places.embeddings == frozenset()
    assert value_at({"blocks": [2, 4], "otherwise": 9}, "embed.weight", places, "density") == 2


def test_keys_that_fit_no_tensor_are_found(places):
    value = [{"mpl": 0.1, "block 4": 0.2, "blocks 5-9": {"heads": 1}, "otherwise": {"atention": 1}}, 0.5]
    assert idle_keys(value, places, NAMES, "density") == [
        "density: 'mpl'",
        "density: 'blocks 5-9'",
        "density.otherwise: 'atention'",
    ]
    assert idle_keys({"heads": 1, "mlp": 0.5}, places, NAMES[:-1], "density") == []
