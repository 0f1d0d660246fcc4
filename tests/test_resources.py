import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_zoo
from hf_zoo.errors import RecipeError, ZooError
from hf_zoo.resources import find_resource, recipe_names, resolve_recipe

REPOSITORY = Path(hf_zoo.__file__).resolve().parent.parent


def test_a_checkout_finds_what_lies_beside_the_package():
    assert find_resource("recipes/bert_mlm.yaml") == REPOSITORY / "recipes" / "bert_mlm.yaml"
    assert find_resource("accelerate_configs") == REPOSITORY / "accelerate_configs"


@pytest.mark.parametrize("name", ["recipes/none.yaml", "nowhere"])
def test_a_missing_resource_names_both_places(name):
    with pytest.raises(ZooError, match=rf"without '{name}' \(looked in .* and .*hf_zoo\)"):
        find_resource(name)


@pytest.mark.parametrize("name", ["", "../setup.py", "/etc/passwd", "recipes/../../x"])
def test_a_resource_outside_is_refused(name):
    with pytest.raises(ZooError, match="not a path inside"):
        find_resource(name)


def test_a_recipe_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("name: x")
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe("mine.yaml") == Path("mine.yaml")
    known = REPOSITORY / "recipes" / "bert_mlm.yaml"
    for name in ("bert_mlm", "recipes/bert_mlm.yaml", "bert_mlm.yaml", "./recipes/bert_mlm"):
        assert resolve_recipe(name) == known
    assert resolve_recipe("paper/bert_sst2") == REPOSITORY / "recipes" / "paper" / "bert_sst2.yaml"
    (tmp_path / "bert_mlm").write_text("name: mine")  # the user's own file comes first
    assert resolve_recipe("bert_mlm") == Path("bert_mlm")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert_mml", r"did you mean 'bert_mlm'\?"),
        ("/nowhere/bert_mlm.yaml", "no such file"),
        ("mine.yml", "mine.yaml"),
    ],
)
def test_a_missing_recipe_names_the_nearest(tmp_path, monkeypatch, name, part):
    (tmp_path / "mine.yaml").write_text("name: x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=part):
        resolve_recipe(name)


def test_the_names_of_all_recipes_are_known():
    assert {"bert_mlm", "zoo_vit", "merge_tasks", "paper/vit_cifar100"} <= set(recipe_names())


def test_an_unpacked_wheel_finds_what_travels_inside(tmp_path):
    pytest.importorskip("setuptools", reason="builds a wheel without a network, so setuptools must be installed")
    source = tmp_path / "source"
    source.mkdir()
    ignored = {".git", ".venv", "runs", "build", "tests", "docs", "benchmarks"}
    for path in REPOSITORY.iterdir():  # building writes beside setup.py: build from links in a folder of its own
        if path.name not in ignored and not path.name.endswith(".egg-info"):
            (source / path.name).symlink_to(path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(installed)

    # From another folder and with the unpacked wheel first: nothing else may serve the package.
    program = (
        "import hf_zoo.resources as r; from hf_zoo.recipe.loader import load_recipe; "
        "from hf_zoo.recipe.schema import PretrainRecipe; "
        "print(r.find_resource('hub_cards')); print(len(r.recipe_names())); "
        "print(r.resolve_recipe('paper/bert_sst2')); "
        "print(r.find_resource('accelerate_configs/cpu.yaml')); print(load_recipe('bert_mlm', PretrainRecipe).name)"
    )
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    cards, count, recipe, config, name = run.stdout.split("\n")[:5]
    inside = installed / "hf_zoo"
    assert Path(cards) == inside / "hub_cards"
    assert int(count) == len(recipe_names())
    assert Path(recipe) == inside / "recipes" / "paper" / "bert_sst2.yaml"
    assert Path(config) == inside / "accelerate_configs" / "cpu.yaml"
    assert name == "zoo-bert"
