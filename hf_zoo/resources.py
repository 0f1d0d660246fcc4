"""The folders beside the package: recipes, launcher configurations, cards.

In a checkout they lie beside `hf_zoo/`; in an installed wheel they travel inside it.
"""

from __future__ import annotations

from pathlib import Path

from hf_zoo.errors import RecipeError, ZooError, nearest

PACKAGE = Path(__file__).resolve().parent
RECIPE_FOLDER = "recipes"
RECIPE_SUFFIXES = (".yaml", ".yml")


def find_resource(name: str) -> Path:
    """Return the path of a file or folder that comes with hf_zoo.

    Args:
        name: Its path from the top of the repository: `hub_cards/member.md`, `recipes`.

    Raises:
        ZooError: If it is in neither place.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ZooError(f"{name!r} is not a path inside hf_zoo")
    # Where the package's parent is site-packages, only a checkout's own marker makes what lies beside it ours.
    beside = PACKAGE.parent / name
    if (PACKAGE.parent / "setup.py").is_file() and beside.exists():
        return beside
    inside = PACKAGE / name
    if inside.exists():
        return inside
    raise ZooError(
        f"hf_zoo comes without {name!r} (looked in {PACKAGE.parent} and {PACKAGE}): the installation is incomplete, "
        "install hf_zoo again"
    )


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with hf_zoo: `bert_mlm`, `paper/vit_cifar100`, ..."""
    folder = find_resource(RECIPE_FOLDER)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def resolve_recipe(path: str | Path) -> Path:
    """Return a recipe's file.

    Args:
        path: A file, or the name of a recipe that comes with hf_zoo, with or without `recipes/` and suffix.

    Raises:
        RecipeError: If there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise RecipeError(str(path), ["is a folder: expected a recipe's file"])
    known = recipe_names()
    name = file.as_posix().removeprefix("./").removeprefix(f"{RECIPE_FOLDER}/")
    name = name.removesuffix(file.suffix) if file.suffix in RECIPE_SUFFIXES else name
    if name in known and not file.is_absolute():
        return find_resource(RECIPE_FOLDER) / f"{name}.yaml"
    beside = [str(other) for suffix in RECIPE_SUFFIXES for other in file.parent.glob(f"*{suffix}")]
    hint = nearest(str(path), beside) or nearest(name, known)
    raise RecipeError(str(path), [f"no such file{hint}; recipes that come with hf_zoo: {', '.join(known) or 'none'}"])
