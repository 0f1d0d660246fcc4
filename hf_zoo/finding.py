"""Find the models a merge recipe speaks of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_zoo.errors import MergeError, nearest
from hf_zoo.ingredients import Ingredient, open_ingredient
from hf_zoo.population import Member, Population
from hf_zoo.recipe.schema import MergeRecipe


def find_members(recipe: MergeRecipe) -> tuple[Ingredient, ...]:
    """Open the members a recipe names, or the best finished one of each of its tasks.

    Raises:
        PopulationError: If a member cannot be opened.
        MergeError: If a task has no finished member; names the tasks there are.
    """
    if recipe.members or recipe.slices:
        sources = dict.fromkeys(source.model for one in recipe.slices for source in one.sources)
        named = recipe.members or [model for model in sources if model != recipe.base]
        return tuple(open_ingredient(text) for text in named)
    assert recipe.population is not None  # the recipe's rules have seen to it
    population = Population.open(recipe.population).where(**recipe.where)
    return tuple(open_ingredient(best_member(population, task, recipe.where)) for task in recipe.tasks)


def best_member(population: Population, task: str, where: Mapping[str, Any]) -> Member:
    """Return a population's finished member with the best validation score on a task.

    Args:
        population: Where to look.
        task: The task.
        where: The factors it was narrowed down by, for the error.

    Raises:
        MergeError: If there is none, or several and no score to choose by; names the tasks there are.
    """
    of_task = [member for member in population if member.manifest.task == task]
    finished = [member for member in of_task if member.manifest.status == "finished"]
    scored = [member for member in finished if main_score(member.metrics, "validation_") > -math.inf]
    if len(finished) > 1 and not scored:
        raise MergeError(
            f"{population.name}: {len(finished)} members for task {task!r} and none has a validation score to choose "
            "by: narrow them down with `where`, or name the `members`"
        )
    if finished:
        return max(scored or finished, key=lambda member: main_score(member.metrics, "validation_"))
    narrowed = f" with {', '.join(f'{key}={value}' for key, value in where.items())}" if where else ""
    if of_task:
        raise MergeError(f"{population.name}: no member for task {task!r}{narrowed} has finished: finish its training")
    tasks = Counter(str(member.manifest.task) for member in population)
    has = ", ".join(f"{name} ({count})" for name, count in sorted(tasks.items())) or "no member at all"
    raise MergeError(
        f"{population.name}: no member for task {task!r}{narrowed}{nearest(task, list(tasks))}: it has {has}"
    )


def find_base(recipe: MergeRecipe, members: Sequence[Ingredient], needed: bool) -> Ingredient | None:
    """Open the model task vectors are taken against: the recipe's, else the one all members were trained from.

    Args:
        recipe: The recipe.
        members: The members.
        needed: Whether to look for one that the recipe does not name.

    Raises:
        PopulationError: If it cannot be opened.
        MergeError: If the members come from several models.
    """
    if recipe.base is not None:
        return open_ingredient(recipe.base)
    if not needed:
        return None
    named = {
        str(one.manifest.recipe["parent"]) for one in members if one.manifest and one.manifest.recipe.get("parent")
    }
    if len(named) > 1:
        raise MergeError(f"the members come from several models ({', '.join(sorted(named))}): say which is `base`")
    return open_ingredient(named.pop()) if named else None


def main_score(metrics: Mapping[str, Any], prefix: str = "") -> float:
    """Return the metric models are chosen by, larger is better: accuracy, else top-1, else minus the loss.

    Args:
        metrics: Metrics by name.
        prefix: What their names begin with (`validation_`).
    """
    for name, sign in (("accuracy", 1), ("top1", 1), ("loss", -1)):
        value = metrics.get(prefix + name)
        if isinstance(value, int | float) and math.isfinite(value):
            return sign * float(value)
    return -math.inf
