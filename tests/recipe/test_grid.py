import dataclasses
import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_zoo.errors import RecipeError
from hf_zoo.recipe.grid import (
    canonical,
    differences,
    digest,
    expand,
    seeds_of,
    select,
    spread_seed,
    to_plain,
)
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import (
    AdapterSpec,
    FinetuneRecipe,
    HeadSpec,
    MergeRecipe,
    ObjectiveSpec,
    PretrainRecipe,
    PublishSpec,
    TrainingSpec,
)


def recipe(**changes):
    content = {"name": "zoo", "objective": "image_classification", "model": {"type": "vit"}} | changes
    return build_recipe(content, PretrainRecipe, "test")


def mistakes_of(vary, **changes):
    with pytest.raises(RecipeError) as caught:
        recipe(vary=vary, **changes)
    return list(caught.value.mistakes)


def test_a_recipe_without_factors_has_one_member():
    (plan,) = expand(recipe(seed=3, members="0"))
    assert (plan.index, plan.name, plan.factors) == (0, "zoo-000", {})
    assert plan.recipe == recipe(seed=3)


def test_the_product_runs_in_written_order_with_the_last_factor_fastest():
    plans = expand(recipe(vary={"seed": [5, 1], "training.learning_rate": [1e-3, 1e-2, 1e-4]}))
    pairs = [(plan.recipe.seed, plan.recipe.training.learning_rate) for plan in plans]
    assert pairs == list(itertools.product([5, 1], [1e-3, 1e-2, 1e-4]))
    assert [plan.name for plan in plans] == [f"zoo-00{index}" for index in range(6)]
    assert plans[4].factors == {"seed": 1, "training.learning_rate": 1e-2}
    assert all(plan.recipe.vary == {} and plan.recipe.members is None for plan in plans)


def test_equal_members_are_left_out_and_the_rest_numbered_without_gaps():
    plans = expand(recipe(vary={"seed": [0, 1, 0], "training.learning_rate": [1, 1.0, 1e-3, 0.001]}))
    assert [(plan.index, plan.factors["seed"], plan.factors["training.learning_rate"]) for plan in plans] == [
        (0, 0, 1.0),
        (1, 0, 1e-3),
        (2, 1, 1.0),
        (3, 1, 1e-3),
    ]


def test_mappings_move_several_keys_together():
    vary = {
        "task": [{"task": "a", "data.path": "x"}, {"task": "b", "data": {"path": "y", "label": "l"}}],
        "seed": [0, 1],
    }
    plans = expand(recipe(vary=vary))
    assert [(plan.recipe.task, plan.recipe.data.path, plan.recipe.data.label, plan.recipe.seed) for plan in plans] == [
        ("a", "x", None, 0),
        ("a", "x", None, 1),
        ("b", "y", "l", 0),
        ("b", "y", "l", 1),
    ]
    assert plans[0].factors == {"task": "a", "data.path": "x", "data.label": None, "seed": 0}


def test_mappings_of_a_section_are_below_it_and_keep_its_other_keys():
    vary = {"model.head": ["linear", {"type": "mlp", "hidden": [8]}], "model.config": [{}, {"depth": 2}]}
    plans = expand(recipe(vary=vary, model={"type": "vit", "config": {"width": 4}, "head": {"reuse": False}}))
    assert [plan.recipe.model.head for plan in plans[::2]] == [HeadSpec(), HeadSpec(type="mlp", hidden=(8,))]
    assert [plan.recipe.model.config for plan in plans[:2]] == [{"width": 4}, {"width": 4, "depth": 2}]
    assert plans[3].factors == {"model.head.type": "mlp", "model.head.hidden": [8], "model.config.depth": 2}


def test_a_section_that_may_be_null_can_be_a_factor():
    content = {"name": "zoo", "objective": "sequence_classification", "parent": "p", "data": "docs-pairs"}
    vary = {"model.adapter": [None, {}, "lora", {"rank": 4}]}
    plans = expand(build_recipe(content | {"vary": vary}, FinetuneRecipe, "test"))
    assert [plan.recipe.model.adapter for plan in plans] == [None, AdapterSpec(), AdapterSpec(rank=4)]


def test_members_that_break_a_rule_are_reported_with_their_factors():
    vary = {"model.head.type": ["linear", "mlp"], "training.learning_rate": [1e-3, -1.0], "seed": [0, 1]}
    assert mistakes_of(vary) == [
        'training.learning_rate: must be above 0, got -1 (in 4 of 8 members, the first with model.head.type="linear", '
        "training.learning_rate=-1.0, seed=0)",
        "model.head.hidden: is missing: an mlp head needs the widths of its hidden layers (in 4 of 8 members, the "
        'first with model.head.type="mlp", training.learning_rate=0.001, seed=0)',
    ]


@pytest.mark.parametrize(
    ("vary", "path"),
    [
        ({"seed": []}, "vary.seed"),
        ({"seed": 3}, "vary.seed"),
        ({"seed": None}, "vary.seed"),
        ({"training.lerning_rate": [1]}, "vary.training.lerning_rate"),
        ({"training.epochs": [1, "2"]}, "vary.training.epochs[1]"),
        ({"training.epochs": [None]}, "vary.training.epochs[0]"),
        ({"model.head": [{"type": "linear"}, {"hiden": [3]}]}, "vary.model.head[1].hiden"),
        ({"label": [{}]}, "vary.label[0]"),
        ({"label": [{"training.epoch": 1}]}, "vary.label[0].training.epoch"),
        ({"label": [3]}, "vary.label"),
        ({"name": ["a"]}, "vary.name"),
        ({"publish.namespace": ["a"]}, "vary.publish.namespace"),
        ({"seed": [0], "both": [{"seed": 1}]}, "vary.both"),
        (
            {"model.head.type": ["linear"], "model.head": [{"reuse": False}], "model.head.reuse": [False]},
            "vary.model.head.reuse",
        ),
        ({key: list(range(100)) for key in ("seed", "seeds.init", "seeds.head")}, "vary"),
    ],
)
def test_a_factor_that_cannot_be_is_refused_at_its_path(vary, path):
    assert [mistake.partition(": ")[0] for mistake in mistakes_of(vary)] == [path]


def test_all_wrong_factors_are_reported_at_once():
    vary = {"seed": [], "training.epoch": [1], "training.batch_size": ["x", 2, "y"], "description": ["a"]}
    assert len(mistakes_of(vary)) == 5


@pytest.mark.parametrize(
    ("members", "indices"),
    [
        (None, range(6)),
        ("3", [3]),
        ("0:2", [0, 1]),
        (":2", [0, 1]),
        ("4:", [4, 5]),
        ("4,0", [0, 4]),
        ("0, 2:4, 3", [0, 2, 3]),
    ],
)
def test_a_selection_keeps_the_grids_numbers(members, indices):
    plans = expand(recipe(vary={"seed": list(range(6))}))
    assert [plan.index for plan in select(plans, members)] == list(indices)


@pytest.mark.parametrize("members", ["6", "0:7", "3:3", "4:2", "a", "", "1;2", "-1", "0,9", "6:"])
def test_a_selection_outside_the_grid_is_refused(members):
    plans = expand(recipe(vary={"seed": list(range(6))}))
    with pytest.raises(RecipeError, match="members"):
        select(plans, members)
    with pytest.raises(RecipeError, match="members"):
        recipe(vary={"seed": list(range(6))}, members=members)


def test_the_compact_form_holds_only_what_differs_from_the_defaults():
    content = canonical(recipe(seed=2, training={"learning_rate": 1e-3, "epochs": 3, "report_to": "trackio"}))
    assert content == {
        "model": {"type": "vit"},
        "name": "zoo",
        "objective": {"name": "image_classification"},
        "seed": 2,
        "training": {"epochs": 3},
    }


def test_an_optional_section_of_defaults_is_not_lost():
    content = {"name": "a", "objective": "sequence_classification", "parent": "p", "data": "docs-sentences"}
    content |= {"model": {"adapter": "lora"}}
    tuned = build_recipe(content, FinetuneRecipe, "test")
    assert canonical(tuned)["model"] == {"adapter": {}}
    assert digest(tuned) != digest(build_recipe(content | {"model": {}}, FinetuneRecipe, "test"))


@pytest.mark.parametrize("spelled_out", [False, True])
def test_both_forms_are_sorted_json_that_makes_the_recipe_again(spelled_out):
    vary = {"seed": [1, 0], "model.head": ["linear", {"type": "mlp", "hidden": [4]}]}
    whole = recipe(vary=vary, training={"betas": [0.5, 0.9]}, description="d")
    content = canonical(whole, spelled_out)
    assert list(content) == sorted(content)
    assert build_recipe(json.loads(json.dumps(content)), PretrainRecipe, "again") == whole
    assert ("members" in content, "output" in content, "publish" in content) == (False, False, False)
    assert spelled_out == ("momentum" in content["training"])


def test_members_of_a_merge_stay_in_its_canonical_form():
    merge = MergeRecipe(members=("a", "b"), publish=PublishSpec(namespace="org"))
    assert canonical(merge) == {"members": ["a", "b"]}


def test_the_digest_ignores_what_changes_no_result():
    base = recipe()
    same = [
        dataclasses.replace(base, output="elsewhere", description="x", members="0", name="other"),
        dataclasses.replace(base, publish=PublishSpec(namespace="org", private=False)),
        recipe(training={"report_to": "trackio"}),
        recipe(training={"learning_rate": 1e-3}),  # the default spelt out
    ]
    assert {digest(one) for one in same} == {digest(base)}


def test_the_digest_tells_recipes_apart():
    base = recipe()
    other = [
        base,
        recipe(seed=1),
        recipe(training={"learning_rate": 2e-3}),
        recipe(vary={"seed": [0, 1], "training.epochs": [1, 2]}),
        recipe(vary={"training.epochs": [1, 2], "seed": [0, 1]}),  # numbers the members differently
        FinetuneRecipe(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}),
    ]
    assert len({digest(one) for one in other}) == len(other)


def test_the_digest_of_a_known_recipe_never_changes():
    # Folders hold this digest; if it changes, every finished population is refused as one of another recipe.
    assert digest(recipe()) == "34e83d987dc59f41bb49d4633e7038e7b4383ba67c5daa8bc8f1beab51835346"


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries({
        "training": st.fixed_dictionaries({
            "learning_rate": st.floats(1e-9, 10),
            "epochs": st.integers(1, 99),
            "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
        }),
        "seeds": st.dictionaries(st.sampled_from(["init", "head", "order"]), st.none() | st.integers(0, 2**40)),
        "model": st.fixed_dictionaries({
            "type": st.text(min_size=1),
            "config": st.dictionaries(
                st.text(st.characters(codec="ascii", categories=["L"]), min_size=1),
                st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists),
            ),
        }),
    }).filter(lambda content: content["model"]["type"] != "timm")
)
def test_plain_data_and_recipes_are_one_to_one(content):
    bound = recipe(**content)
    assert recipe(**to_plain(bound, compact=True)) == bound
    assert recipe(**to_plain(bound)) == bound
    assert digest(recipe(**to_plain(bound))) == digest(bound)


def test_differences_name_the_path_and_both_values():
    old = canonical(recipe(training={"learning_rate": 1e-3}, augmentation={"flip": 0.5}), spelled_out=True)
    new = canonical(recipe(training={"learning_rate": 3e-3}, parent="a"), spelled_out=True)
    assert differences(old, new) == [
        "augmentation.flip: 0.5 -> 0.0",
        'parent: null -> "a"',
        "training.learning_rate: 0.001 -> 0.003",
    ]
    assert differences({"a": {"b": 1}}, {"a": {"c": [1]}}) == ["a.b: 1 -> (not set)", "a.c: (not set) -> [1]"]
    assert differences(old, old) == []


def test_spread_seeds_are_distinct_31_bit_and_fixed():
    spread = {spread_seed(name, seed) for name in ("init", "order") for seed in range(2000)}
    assert len(spread) == 4000
    assert max(spread) < 2**31
    # sha256("init:0") opens with these four bytes; the top bit is cleared.
    assert spread_seed("init", 0) == int(hashlib.sha256(b"init:0").hexdigest()[:8], 16) % 2**31
    # Neighbouring seeds must not be neighbours, nor share an offset: epoch e of the order is seeded with seed + e.
    ordered = sorted(spread_seed("order", seed) for seed in range(2000))
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 10


def test_unset_seeds_follow_the_recipes_seed():
    followed, set_apart = seeds_of(recipe(seed=7)), seeds_of(recipe(seed=7, seeds={"init": 9}))
    assert list(followed) == ["init", "head", "order", "augmentation", "dropout"]
    assert len(set(followed.values())) == 5
    assert followed["order"] == spread_seed("order", 7)
    assert set_apart == followed | {"init": spread_seed("init", 9)}


def test_a_recipe_made_by_hand_is_checked_on_expansion():
    wrong = PretrainRecipe(
        name="a", objective=ObjectiveSpec(name="masked_lm"), training=TrainingSpec(learning_rate=-1.0)
    )
    with pytest.raises(RecipeError, match=r"recipe 'a': 3 mistakes"):
        expand(wrong)  # learning rate, no model type, digits are images
