import subprocess
import sys

import pytest

from hf_zoo.errors import RecipeError
from hf_zoo.recipe.loader import build_recipe, load_recipe, parse_arguments
from hf_zoo.recipe.schema import FinetuneRecipe, MergeRecipe, ObjectiveSpec, PretrainRecipe, TrainingSpec


def test_a_file_becomes_a_recipe_with_typed_values(load, small):
    recipe = load(small + "training: {learning_rate: 1e-4, epochs: 3, betas: [0, 0.95]}\n")
    assert type(recipe) is PretrainRecipe
    assert recipe.training == TrainingSpec(learning_rate=1e-4, epochs=3, betas=(0.0, 0.95))
    assert recipe.objective == ObjectiveSpec(name="image_classification")
    assert recipe.model.config == {"hidden_size": 32}


def test_every_mistake_of_a_file_is_reported_at_once(mistakes):
    found = mistakes("""
objective: masked_ml
learning_rate: 1e-3
training: {epochs: "3", learning_rate: -1, optimiser: sgd}
data: {path: docs, max_length: 0}
method: average
publish: {namespace: "a b"}
vary: {training.lerning_rate: [1e-3], seed: [], data.num_train: [x]}
""")
    assert {mistake.partition(": ")[0] for mistake in found} == {
        "name",
        "objective.name",
        "learning_rate",
        "training.epochs",
        "training.learning_rate",
        "training.optimiser",
        "data.max_length",
        "method",
        "vary.training.lerning_rate",
        "vary.seed",
        "vary.data.num_train[0]",
    }
    assert "learning_rate: unknown key (did you mean 'training.learning_rate'?)" in found
    assert "training.optimiser: unknown key (did you mean 'optimizer'?)" in found
    assert "vary.training.lerning_rate: unknown key (did you mean 'training.learning_rate'?)" in found
    assert "method: is a key of hf_zoo.merge, not of this verb" in found


def test_rules_that_look_only_at_sound_keys_are_checked_beside_other_mistakes(mistakes, small):
    found = mistakes(small + "training: {nesterov: true, epochs: x}\nsnapshots: {keep_last: 1, every_epochs: null}")
    assert {mistake.partition(":")[0] for mistake in found} == {
        "training.epochs",
        "training.nesterov",
        "snapshots.keep_last",
    }


def test_a_merge_recipe_refuses_the_keys_of_training(mistakes):
    found = mistakes("members: [a, b]\ntraining: {epochs: 1}", recipe_class=MergeRecipe)
    assert found == ["training: is a key of hf_zoo.pretrain and hf_zoo.finetune, not of this verb"]


@pytest.mark.parametrize(
    ("override", "lookup", "value"),
    [
        ("training.learning_rate=1e-4", lambda r: r.training.learning_rate, 1e-4),
        ("training.report_to=[a,b]", lambda r: r.training.report_to, ("a", "b")),
        ("training.report_to=trackio", lambda r: r.training.report_to, "trackio"),
        ("snapshots.every_epochs=", lambda r: r.snapshots.every_epochs, None),
        ("model.config.layers=2", lambda r: r.model.config, {"hidden_size": 32, "layers": 2}),
        ("model.config.inner.deep=[1]", lambda r: r.model.config["inner"], {"deep": [1]}),
        ("data.validation_fraction=0.5", lambda r: r.data.validation_fraction, 0.5),
        ("objective=contrastive", lambda r: r.objective.name, "contrastive"),
        ("data.path=org/a=b", lambda r: r.data.path, "org/a=b"),
        ("members=0:1", lambda r: r.members, "0:1"),
        ("members=0", lambda r: r.members, "0"),
        ("description=''", lambda r: r.description, ""),
        ("vary.training.learning_rate=[1,2]", lambda r: r.vary, {"training.learning_rate": [1, 2]}),
        ("vary={seed: [3]}", lambda r: r.vary, {"seed": [3]}),
    ],
)
def test_an_override_is_set_after_the_file(load, small, override, lookup, value):
    assert lookup(load(small, override)) == value


def test_an_override_keeps_what_a_shorthand_said(load, small):
    recipe = load(small, "data.validation_fraction=0.2", "objective=contrastive", "objective.temperature=0.1")
    assert (recipe.data.path, recipe.data.validation_fraction) == ("digits", 0.2)
    assert recipe.objective == ObjectiveSpec(name="contrastive", temperature=0.1)


def test_the_last_of_two_overrides_wins(load, small):
    assert load(small, "seed=1", "seed=2").seed == 2


def test_where_takes_a_dotted_factor_as_one_key(load):
    text = "population: runs/zoo\ntasks: [sst]"
    recipe = load(text, "where.training.learning_rate=1e-3", "data.sst.path=x", recipe_class=MergeRecipe)
    assert recipe.where == {"training.learning_rate": 1e-3}
    assert recipe.data["sst"].path == "x"


def test_a_factor_can_be_taken_out(load, mistakes, small):
    text = small + "vary: {seed: [0, 1], training.epochs: [1, 2]}"
    assert load(text, "vary.seed=").vary == {"training.epochs": [1, 2]}
    assert mistakes(text, "vary.sed=") == ["vary.sed: cannot be taken out: no such factor (did you mean 'seed'?)"]


@pytest.mark.parametrize(
    "override", ["seed=3", "data.path=docs", "data=docs", "model.head.type=linear", "model.head=linear"]
)
def test_an_override_no_member_would_see_is_refused(mistakes, small, override):
    text = small + "vary: {seed: [0, 1], sets: [{data.path: digits}], model.head: [linear, {type: mlp, hidden: 4}]}"
    found = mistakes(text, override)
    assert found[0].startswith(f"{override.partition('=')[0]}: is set by the factor vary.")


def test_an_override_beside_a_factor_is_taken(load, small):
    text = small + "vary: {objective.temperature: [0.1, 0.2], label: [{data.num_train: 50}]}"
    assert load(text, "objective=contrastive", "data.num_eval=20").data.num_eval == 20


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.epochs", "expected key.path=value"),
        ("data.path=*.csv", "quote it"),
        ("training.epochs=[1", "quote it"),
        ("name.first=x", "cannot be set: name is not a mapping"),
        ("trainin.epochs=2", "did you mean 'training'?"),
    ],
)
def test_a_broken_override_is_a_mistake_of_its_own(mistakes, small, override, part):
    found = mistakes(small, override)
    assert len(found) == 1
    assert part in found[0]


def test_files_that_are_no_recipe(tmp_path, small):
    (tmp_path / "vit.yaml").write_text(small)
    with pytest.raises(RecipeError, match=r"did you mean '.*vit\.yaml'"):
        load_recipe(tmp_path / "vti.yaml", PretrainRecipe)
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path, PretrainRecipe)
    for text, part in (("", "the file is empty"), ("- a\n- b\n", "expected a mapping"), ("a: [", "line")):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(RecipeError, match=part):
            load_recipe(tmp_path / "odd.yaml", PretrainRecipe)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml", PretrainRecipe)
    (tmp_path / "big.yaml").write_text("# " + "x" * 400_000)
    with pytest.raises(RecipeError, match="too long"):
        load_recipe(tmp_path / "big.yaml", PretrainRecipe)


def test_the_error_names_the_file_and_counts_the_mistakes(load, tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 2 mistakes\n  - "):
        load("name: 1.5\n")


def test_plain_data_is_bound_as_strictly_as_a_file():
    content = {"name": "a", "objective": "sequence_classification", "data": "docs-sentences", "parent": "runs/x/x-000"}
    assert build_recipe(content, FinetuneRecipe, "here").parent == "runs/x/x-000"
    with pytest.raises(RecipeError, match="here: 1 mistake\n  - parnt: unknown key"):
        build_recipe(content | {"parnt": "x"}, FinetuneRecipe, "here")


def test_arguments_of_a_verb():
    assert parse_arguments(["r.yaml", "seed=1", "--dry-run", "data.path=a=b"]) == (
        "r.yaml",
        ["seed=1", "data.path=a=b"],
        {"--dry-run"},
    )
    assert parse_arguments(["seed=1", "r.yaml"]) == ("r.yaml", ["seed=1"], set())
    assert parse_arguments(["-h"]) == ("", [], {"--help"})


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "the recipe is missing"),
        (["seed=1"], "the recipe is missing"),
        (["r.yaml", "--dryrun"], "unknown flag (did you mean '--dry-run'?)"),
        (["r.yaml", "--seed=1"], "overrides are written without dashes: seed=1"),
        (["r.yaml", "--training.epochs", "3"], "overrides are written training.epochs=value"),
        (["r.yaml", "other.yaml"], "expected key.path=value"),
    ],
)
def test_arguments_a_verb_does_not_know(arguments, part):
    with pytest.raises(RecipeError) as caught:
        parse_arguments(arguments)
    assert any(part in mistake for mistake in caught.value.mistakes)


def test_a_recipe_whose_name_looks_like_an_override_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("name: x")
    assert parse_arguments(["lr=1.yaml", "seed=2"]) == ("lr=1.yaml", ["seed=2"], set())


def test_loading_a_recipe_imports_nothing_heavy():
    program = (
        "import sys, hf_zoo.recipe.loader; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
