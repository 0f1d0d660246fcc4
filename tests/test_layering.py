"""Imports point downwards, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_zoo"

# From the bottom up; a module imports only from its own layer or one below.
LAYERS = {
    "errors": 0, "files": 0, "resources": 0, "models": 0, "seeding": 0, "versions": 0, "recipe": 1,
    "folders": 1, "hashing": 1, "shards": 2, "checkpoint": 2, "adapters": 2, "population": 2, "structure": 2, "heads": 2,
    "configs": 3, "axes": 3, "tokenizer_files": 3, "vocabulary": 3, "labels": 3, "stacking": 3, "mergekit": 3, "mergekit_values": 3, "mergekit_methods": 3,
    "losses": 3, "metrics": 3, "data": 3,
    "parents": 4, "building": 4, "evaluation": 4, "methods": 4, "hub": 4,
    "inputs": 4, "means": 4, "geometry": 4, "task_vectors": 4, "trimming": 4, "information": 4, "matrices": 4, "places": 4, "learning": 4, "linear_layers": 4, "regression": 4, "varying": 5, "streaming": 5,
    "functional": 6, "ensembles": 6, "joining": 6, "presenting": 6, "lineage": 6, "finding": 6, "ingredients": 5, "auto": 6, "trials": 6,
    "curvature": 5, "training": 6, "planning": 6, "merging": 6, "analysis": 6, "candidates": 2, "sampling": 2, "search": 6, "contest": 6,
    "cli": 7, "display": 7, "pretrain": 7, "finetune": 7, "merge": 7, "publish": 7, "listing": 7, "serving": 7, "extension": 7,
    "demo": 7, "measuring": 7,
}  # fmt: skip
# Lazily, inside functions, things may reach up where the user's object is the way in (`Member.open("org/name")`).
HEAVY = ("torch", "transformers", "datasets", "evaluate", "timm", "peft", "matplotlib", "accelerate")


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def top_level_imports(path):
    """Yield what a module imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LAYERS, f"{part} has no layer: say in LAYERS where it belongs"
    for name in top_level_imports(path):
        parts = name.split(".")
        if parts[0] == "hf_zoo" and len(parts) > 1:
            assert LAYERS[parts[1]] <= LAYERS[part], f"{part} imports {name}, which lies above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 450


def test_methods_do_not_import_each_other():
    for path in (PACKAGE / "methods").glob("*.py"):
        others = [name for name in top_level_imports(path) if name.startswith("hf_zoo.methods.")]
        assert path.name == "__init__.py" or set(others) <= {"hf_zoo.methods.base"}, path.name


@pytest.mark.parametrize(
    "module", ["hf_zoo", "hf_zoo.cli", "hf_zoo.population", "hf_zoo.recipe.loader", "hf_zoo.hub.local"]
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_test_files_have_names_of_their_own():
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))  # pytest imports them under these names alone
