"""Recipes from files: YAML, overrides from the command line, strict binding, every mistake at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hf_zoo.errors import RecipeError, nearest
from hf_zoo.recipe.binding import INVALID, UNKNOWN, Binder, Mistake, hint_at, hints_of, join, section_in
from hf_zoo.recipe.curvature import CurvatureRecipe
from hf_zoo.recipe.grid import check_grid, examine
from hf_zoo.recipe.ranges import check_ranges
from hf_zoo.recipe.reading import MAX_CHARACTERS, ReadingError, read_yaml
from hf_zoo.recipe.rules import check_rules
from hf_zoo.recipe.schema import MergeRecipe, PretrainRecipe, TrainRecipe
from hf_zoo.resources import resolve_recipe

R = TypeVar("R", bound=TrainRecipe | MergeRecipe | CurvatureRecipe)

FLAGS = ("--dry-run", "--help")
# Their keys are dotted paths themselves, so an override's rest is one key.
PATH_KEYED = ("vary", "where", "search.over")

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*=")


def load_recipe(path: str | Path, recipe_class: type[R], overrides: Sequence[str] = ()) -> R:
    """Read a recipe's file, apply overrides, and check everything that can be checked without data or a model.

    An override is `key.path=value`, its value read as YAML: `training.learning_rate=1e-4`, `tasks=[sst,mnli]`,
    `publish.private=false`. An empty value is null. What follows `vary.` or `where.` is one key, itself a path
    (`vary.training.learning_rate=[1e-3,1e-4]`); `vary.seed=` takes a factor out.

    Args:
        path: The file, or the name of a recipe that comes with hf_zoo (`bert_mlm`).
        recipe_class: The verb's recipe.
        overrides: `key.path=value` texts; later ones win.

    Raises:
        RecipeError: If there is no such file, or anything is wrong in it; it names all of it.
    """
    content, file = read_recipe(path)
    changed, mistakes = _apply(content, recipe_class, overrides)
    return _build(changed, recipe_class, str(file), mistakes)


def read_recipe(path: str | Path) -> tuple[Mapping[str, Any], Path]:
    """Read a recipe's file as plain data.

    Args:
        path: The file, or the name of a recipe that comes with hf_zoo (`bert_mlm`).

    Returns:
        What stands in it, and the file.

    Raises:
        RecipeError: If there is no such file, or it holds no mapping.
    """
    file = resolve_recipe(path)
    try:
        with file.open(encoding="utf-8") as stream:
            content = read_yaml(stream.read(MAX_CHARACTERS + 1))
    except OSError as error:
        raise RecipeError(str(file), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError(str(file), [f"is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except ReadingError as error:
        raise RecipeError(str(file), error.mistakes) from error
    if not isinstance(content, Mapping):
        raise RecipeError(
            str(file), ["expected a mapping of recipe keys" + (", the file is empty" if not content else "")]
        )
    return content, file


def build_recipe(content: Mapping[str, Any], recipe_class: type[R], source: str, overrides: Sequence[str] = ()) -> R:
    """Build a recipe from plain data, as strictly as from a file.

    Args:
        content: Field names to values, nested as the recipe is.
        recipe_class: The verb's recipe.
        source: Where the content came from, for the error.
        overrides: `key.path=value` texts, as `load_recipe` takes them.

    Raises:
        RecipeError: If anything is wrong in it; it names all of it.
    """
    changed, mistakes = _apply(content, recipe_class, overrides)
    return _build(changed, recipe_class, source, mistakes)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str], set[str]]:
    """Split a verb's command line: `RECIPE [key.path=value ...] [--dry-run] [--help]`.

    Returns:
        The recipe (empty where only help was asked for), the overrides, and the flags given.

    Raises:
        RecipeError: If the recipe is missing, or an argument is none of these.
    """
    recipe, overrides, flags, mistakes = "", [], set(), []
    for argument in arguments:
        if argument in {*FLAGS, "-h"}:
            flags.add("--help" if argument == "-h" else argument)
        elif argument.startswith("-"):
            plain = argument.lstrip("-")
            if _OVERRIDE.match(plain):
                mistakes.append(f"{argument}: overrides are written without dashes: {plain}")
            elif hint_at(PretrainRecipe, plain) is not UNKNOWN or hint_at(MergeRecipe, plain) is not UNKNOWN:
                mistakes.append(f"{argument}: overrides are written {plain}=value")
            else:
                mistakes.append(f"{argument}: unknown flag{nearest(argument, FLAGS)}: known are {', '.join(FLAGS)}")
        elif _OVERRIDE.match(argument) and not (not recipe and Path(argument).is_file()):
            overrides.append(argument)
        elif not recipe:
            recipe = argument
        else:
            mistakes.append(f"{argument}: expected key.path=value after the recipe {recipe}")
    if not recipe and "--help" not in flags:
        mistakes.append("the recipe is missing: RECIPE [key.path=value ...] [--dry-run] [--help]")
    if mistakes:
        raise RecipeError("command line", mistakes)
    return recipe, overrides, flags


def _build(content: Mapping[str, Any], recipe_class: type[R], source: str, mistakes: list[Mistake]) -> R:
    binder = Binder(recipe_class, _keys_of_others(recipe_class))
    recipe = binder.bind(content, recipe_class, "")
    mistakes = mistakes + binder.mistakes
    if recipe is not INVALID:
        mistakes += _check(recipe, mistakes)
    if mistakes:
        raise RecipeError(source, [str(mistake) for mistake in dict.fromkeys(mistakes)])
    return recipe


def _check(recipe: TrainRecipe | MergeRecipe | CurvatureRecipe, mistakes: list[Mistake]) -> list[Mistake]:
    """Return what is wrong beyond types; where some are wrong already, of the rest."""
    mistaken = [mistake.path for mistake in mistakes]
    if isinstance(recipe, TrainRecipe) and not mistakes:
        return examine(recipe)[1]
    found = check_ranges(recipe, mistaken)
    if isinstance(recipe, TrainRecipe):
        steps, wrong = check_grid(type(recipe), recipe.vary)
        found += wrong
        # A factor may mend what a rule finds wrong in the recipe itself; one that cannot be read might mend anything.
        if any(path.startswith("vary") for path in [*mistaken, *(mistake.path for mistake in wrong)]):
            return found
        mistaken += [path for step in steps for setting in step for path in setting]
    return found + check_rules(recipe, mistaken + [mistake.path for mistake in found])


def _keys_of_others(recipe_class: type) -> dict[str, str]:
    """Return the keys only the other kind of recipe has, with the verb they belong to."""
    training = issubclass(recipe_class, TrainRecipe)
    other, verb = (
        (MergeRecipe, "hf_zoo.merge") if training else (PretrainRecipe, "hf_zoo.pretrain and hf_zoo.finetune")
    )
    return {
        key: f"a key of {verb}, not of this verb" for key in hints_of(other).keys() - hints_of(recipe_class).keys()
    }


def _apply(
    content: Mapping[str, Any], recipe_class: type, overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the content with the overrides in it, and what is wrong with them."""
    changed = copy.deepcopy(dict(content))
    mistakes: list[Mistake] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not _OVERRIDE.match(override):
            mistakes.append(Mistake(override, "expected key.path=value"))
            continue
        try:
            value = read_yaml(text)
        except ReadingError as error:
            mistakes.append(Mistake(path, f"{text!r} is not a YAML value ({error}): quote it"))
            continue
        problem = _set(changed, recipe_class, path, value)
        if problem:
            mistakes.append(Mistake(path, problem))
    return changed, mistakes + _varied_anyway(changed, recipe_class, overrides)


def _set(content: dict[str, Any], recipe_class: type, path: str, value: Any) -> str | None:
    """Set a dotted path, making the sections on the way; return what stands in the way, if anything."""
    first, _, rest = path.partition(".")
    holder = next((known for known in PATH_KEYED if path.startswith(f"{known}.")), None)
    keys = path.split(".") if holder is None else [*holder.split("."), path.removeprefix(f"{holder}.")]
    reached = ""
    for key in keys[:-1]:
        reached = join(reached, key)
        section = content.get(key)
        if section is None:
            content[key] = {}
        elif not isinstance(section, dict):
            hint = hint_at(recipe_class, reached)
            shorthand = getattr(section_in(hint), "SHORTHAND", None) if hint is not UNKNOWN else None
            if shorthand is None or isinstance(section, list):
                return f"cannot be set: {reached} is not a mapping in the recipe"
            content[key] = {shorthand: section}
        content = content[key]
    if first == "vary" and rest and value is None:
        if keys[-1] not in content:
            return f"cannot be taken out: no such factor{nearest(keys[-1], list(content))}"
        del content[keys[-1]]
    else:
        content[keys[-1]] = value
    return None


def _varied_anyway(content: Mapping[str, Any], recipe_class: type, overrides: Sequence[str]) -> list[Mistake]:
    """Return the overrides that no member would see, since a factor sets the same key in all of them."""
    factors = content.get("vary")
    moved: dict[str, str] = {}
    for factor, values in factors.items() if isinstance(factors, Mapping) else ():
        steps, _ = check_grid(recipe_class, {factor: values})
        moved |= {path: factor for step in steps for setting in step for path in setting}
    mistakes = []
    for override in overrides:
        path = override.partition("=")[0]
        hint = hint_at(recipe_class, path)
        shorthand = getattr(section_in(hint), "SHORTHAND", None) if hint is not UNKNOWN else None
        for other, factor in moved.items():
            if path == other or path.startswith(f"{other}.") or (shorthand and join(path, shorthand) == other):
                advice = f"set vary.{factor}=[...] instead, or take the factor out with vary.{factor}="
                mistakes.append(Mistake(path, f"is set by the factor vary.{factor} in every member: {advice}"))
                break
    return mistakes
