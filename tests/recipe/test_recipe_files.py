import itertools
import re
from pathlib import Path

import pytest

import hf_zoo
from hf_zoo.recipe.grid import canonical, expand
from hf_zoo.recipe.loader import build_recipe, load_recipe
from hf_zoo.recipe.schema import FinetuneRecipe, MergeRecipe, PretrainRecipe

REPOSITORY = Path(hf_zoo.__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
CLASSES = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "merge": MergeRecipe}
COMMAND = re.compile(
    r"^# command:  (?:python|accelerate launch(?: --config_file (\S+))?) -m hf_zoo\.(\w+) (\S+)$", re.MULTILINE
)

SIZES = {
    "bert_lora": 4,
    "bert_mlm": 2,
    "bert_mlm_continued": 4,
    "bert_mlm_openwebtext": 2,
    "bert_tasks": 4,
    "timm_resnet": 2,
    "vit_contrastive": 2,
    "vit_finetune": 16,
    "zoo_vit": 48,
    "paper/bert_continued": 6,
    "paper/bert_scratch": 2,
    "paper/bert_seed": 2,
    "paper/bert_sst2": 40,
    "paper/cnn_cifar10": 1280,
    "paper/vit_cifar100": 240,
    "paper/vit_contrastive": 3,
    "paper/vit_supervised": 7,
}


def name_of(path):
    return path.relative_to(REPOSITORY / "recipes").with_suffix("").as_posix()


def load(path):
    _, verb, _ = COMMAND.search(path.read_text()).groups()
    return load_recipe(path, CLASSES[verb])


def named(name):
    return load(REPOSITORY / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_opens_with_its_source_command_cost_and_number(path):
    text = path.read_text()
    config, _, recipe = COMMAND.search(text).groups()
    assert REPOSITORY / recipe == path
    assert config is None or (REPOSITORY / config).is_file()
    for key in ("source", "cost", "expected"):
        assert re.search(rf"^# {key}: +\S", text, re.MULTILINE), key
    assert text.startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_loads_and_expands_to_as_many_members_as_it_says(path):
    recipe = load(path)
    if isinstance(recipe, MergeRecipe):
        assert name_of(path) not in SIZES
        return
    plans = expand(recipe)
    assert len(plans) == SIZES[name_of(path)]
    assert len({plan.name for plan in plans}) == len(plans)
    assert build_recipe(canonical(recipe), type(recipe), "again") == build_recipe(
        canonical(recipe, spelled_out=True), type(recipe), "again"
    )


def test_population_names_are_distinct():
    names = [load(path).name for path in RECIPES]
    assert len(set(filter(None, names))) == len([name for name in names if name])


def test_every_local_parent_and_merge_member_is_made_by_another_recipe():
    made, used = set(), set()
    for path in RECIPES:
        recipe = load(path)
        if isinstance(recipe, MergeRecipe):
            used |= set(recipe.members)
            continue
        plans = expand(recipe)
        made |= {f"{recipe.output}/{recipe.name}/{plan.name}" for plan in plans}
        used |= {plan.recipe.parent for plan in plans if plan.recipe.parent}
    assert {parent for parent in used if parent.startswith("runs/")} <= made
    assert {parent for parent in used if not parent.startswith("runs/")} == {"google-bert/bert-base-cased"}


def test_the_vision_zoo_has_ten_backbones_and_twenty_four_members_of_each():
    backbones = [plan.name for name in ("supervised", "contrastive") for plan in expand(named(f"paper/vit_{name}"))]
    plans = expand(named("paper/vit_cifar100"))
    parents = [plan.recipe.parent.rpartition("/")[2] for plan in plans]
    assert len(backbones) == 10
    assert [(name, len(list(group))) for name, group in itertools.groupby(parents)] == [
        (name, 24) for name in backbones
    ]
    factors = {tuple(str(value) for key, value in plan.factors.items() if key != "parent") for plan in plans}
    assert len(factors) == 24


def test_the_language_zoo_has_ten_backbones_and_four_members_of_each():
    names = [plan.name for kind in ("continued", "scratch", "seed") for plan in expand(named(f"paper/bert_{kind}"))]
    parents = [plan.recipe.parent.rpartition("/")[2] for plan in expand(named("paper/bert_sst2"))]
    assert len(names) == 10
    assert [(name, len(list(group))) for name, group in itertools.groupby(parents)] == [(name, 4) for name in names]


def test_the_names_of_the_fixed_usages_exist():
    assert expand(named("zoo_vit"))[42].name == "zoo-vit-042"
    assert (
        {plan.recipe.task for plan in expand(named("bert_tasks"))}
        == {"sst", "mnli"}
        == set(named("merge_tasks").tasks)
    )
    assert expand(named("bert_mlm"))[0].name == "zoo-bert-000"


def test_members_of_the_soup_share_their_initial_weights():
    plans = {plan.name: plan for plan in expand(named("zoo_vit"))}
    members = [plans[Path(member).name] for member in named("merge_soup").members]
    assert len({plan.recipe.seed for plan in members}) == 1


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "recipes"], ids=name_of)
def test_a_small_recipe_needs_no_network(path):
    recipe = load(path)
    if name_of(path) != "bert_mlm_openwebtext" and not isinstance(recipe, MergeRecipe):
        embedded = {"digits", "docs", "docs-sentences", "docs-pairs", "docs-topics"}
        assert {plan.recipe.data.path for plan in expand(recipe)} <= embedded
        assert all(plan.recipe.tokenizer.path is None for plan in expand(recipe))
