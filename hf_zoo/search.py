"""Find the hyper-parameters of a merge: candidates are merged in memory and measured on the validation splits alone.

Members are opened, data is read and tokenised once for all candidates. The test split is not opened. Beside the merge
lies `NAME-search` with `search.jsonl`, one line a candidate, and `recipe.yaml`, which makes the best one again.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_zoo.candidates import CandidateTable
from hf_zoo.errors import MergeError, RecipeError, ZooError
from hf_zoo.files import write_text
from hf_zoo.planning import MergePlan, inputs_of, open_trials, plan_merge
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.grid import digest, portable, to_plain
from hf_zoo.recipe.schema import MergeRecipe, MergeRule
from hf_zoo.recipe.search import SEARCHABLE, SearchSpec, apply_settings, settings_of
from hf_zoo.sampling import Sampling, Space, sample
from hf_zoo.streaming import merge_in_memory

if TYPE_CHECKING:
    from torch import Tensor

    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

TABLE_FILE = "search.jsonl"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        recipe: The recipe of the best candidate, without a search.
        spec: How it was searched for.
        best: Its line of the table.
        records: Every candidate: `values`, and `scores` a task with their mean `score`, or why it `failed`.
        folder: Where table and recipe lie.
    """

    recipe: MergeRecipe
    spec: SearchSpec
    best: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    folder: Path

    @property
    def table(self) -> Path:
        """The file with all candidates."""
        return self.folder / TABLE_FILE

    @property
    def report(self) -> dict[str, Any]:
        """What the manifest of the merge says of it."""
        failed = sum("failed" in record for record in self.records)
        return {
            "sampler": self.spec.sampler,
            "candidates": len(self.records),
            **({"of them failed": failed} if failed else {}),
            "chosen by": "the mean validation score over tasks",
            "validation score": self.best["score"],
            "chosen": self.best["values"],
            "table": TABLE_FILE,
        }


class Bench:
    """Members and validation data, opened once, that candidates of a merge are measured on.

    Args:
        plan: A plan that keeps the base where any candidate may need it.
        with_test: Open the test splits too.
    """

    def __init__(self, plan: MergePlan, with_test: bool = False) -> None:
        self.plan = plan
        self.with_test = with_test
        self._trials: list[Trial] | None = None

    @property
    def trials(self) -> list[Trial]:
        """The tasks' held-out data, opened when first asked for."""
        if self._trials is None:
            self._trials = open_trials(self.plan, self.with_test)
            for trial in self._trials:
                trial.check_validation()
        return self._trials

    def check(self, recipe: MergeRecipe) -> MergePlan:
        """Return the plan of a candidate.

        Raises:
            ZooError: If its method lacks something, or a hyper-parameter is unknown or out of range.
        """
        plan = self.plan.of(recipe)
        plan.merger.check(inputs_of(plan, self.trials))
        return plan

    def merge(self, recipe: MergeRecipe) -> dict[str, Tensor]:
        """Merge a candidate in memory.

        Raises:
            ZooError: If it cannot be made.
        """
        plan = self.plan.of(recipe)
        return merge_in_memory(plan.merger, inputs_of(plan, self.trials), num_threads=recipe.num_threads)

    def score(self, recipe: MergeRecipe) -> dict[str, float]:
        """Return task -> validation score of a candidate.

        Raises:
            ZooError: If it cannot be made, or its score is not finite.
        """
        from hf_zoo.trials import task_scores

        scores = task_scores(self.trials, self.plan.heads_apart, self.merge(recipe))
        wrong = [task for task, score in scores.items() if not math.isfinite(score)]
        if wrong:
            raise MergeError(f"the candidate has no finite score on {', '.join(wrong)}")
        return scores

    def tell(self, error: ZooError) -> str:
        """Return what an error says with models called by their names: tables may be published, paths are not."""
        text = str(error)
        models = [*self.plan.members, *self.plan.sources, *([] if self.plan.base is None else [self.plan.base])]
        for model in sorted(models, key=lambda model: -len(str(model.reference))):
            whole = rf"(?<![\w/]){re.escape(str(model.reference))}(?!\w)"
            text = re.sub(whole, model.label.replace("\\", r"\\"), text)
        return text


def search(recipe: MergeRecipe) -> Found:
    """Find the best values of a merge recipe's `search.over`.

    Interrupted at any moment and called again, it goes on with the candidates it has not measured, and comes to the
    same table, byte for byte.

    Args:
        recipe: A recipe with `search`.

    Raises:
        RecipeError: If a path or a value does not fit its method.
        MergeError: If a task has no validation split, no candidate could be made, or the folder holds another search.
        ZooError: If members cannot be found or do not fit together, or data cannot be read.
    """
    assert recipe.search is not None
    spec = recipe.search
    bare = replace(recipe, search=None)
    plan = plan_merge(bare, [candidate_recipe(bare, values) for values in _tried_first(recipe)])
    space = Space.of(spec, len(plan.members))
    name = recipe.name or f"{plan.name}-tuned"
    folder = Path(recipe.output) / f"{name}-search"
    ends = [candidate_recipe(bare, values) for values in space.ends()]
    for end in ends:
        plan.of(end)
    table = CandidateTable(folder / TABLE_FILE, _purpose(recipe, plan))
    bench = Bench(plan)
    _run(table, bench, bare, spec, space, ends)
    best = _best(table)
    found = replace(candidate_recipe(bare, best["values"]), name=name)
    _write_recipe(folder, found, best, len(table))
    return Found(found, spec, best, tuple(table), folder)


def candidate_recipe(recipe: MergeRecipe, values: Mapping[str, Any]) -> MergeRecipe:
    """Return the recipe of a candidate.

    Args:
        recipe: The recipe, without its search.
        values: Key of `search.over` -> value.

    Raises:
        RecipeError: If a path leads nowhere, or a value is of a wrong type.
    """
    plain = {key: to_plain(getattr(recipe, key)) for key in SEARCHABLE}
    try:
        changed = apply_settings(plain, settings_of(values))
    except ValueError as error:
        raise RecipeError("merge recipe", [f"search.over.{error}"]) from error
    bound = bind(changed, _Searched, "merge recipe, search.over")
    return replace(recipe, method=bound.method, parameters=bound.parameters, rules=bound.rules)


def search_table(found: Found, most: int = 10) -> list[dict[str, Any]]:
    """Return one row a candidate, the best first, for people to read."""
    made = sorted((r for r in found.records if "score" in r), key=lambda record: -record["score"])
    return [
        {**{key.rpartition(".")[2]: _short(value) for key, value in record["values"].items()},
         "validation": f"{record['score']:.4f}",
         **{task: f"{score:.4f}" for task, score in record["scores"].items() if len(record["scores"]) > 1}}
        for record in made[:most]
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """The part of a merge recipe that a search may change."""

    method: str
    parameters: dict[str, Any]
    rules: tuple[MergeRule, ...]


def _tried_first(recipe: MergeRecipe) -> Sequence[dict[str, Any]]:
    """Return candidates with every method in them, before it is known how many members there are."""
    assert recipe.search is not None
    return list(Space.of(recipe.search, 1).ends())


def _purpose(recipe: MergeRecipe, plan: MergePlan) -> dict[str, Any]:
    """Return what makes a search another one; the number of candidates does not."""
    assert recipe.search is not None
    endless = replace(recipe, name=None, description="", search=replace(recipe.search, num_candidates=None))
    parents = [{"repo": parent.repo, "role": parent.role, "sha256": parent.sha256} for parent in plan.parents]
    order = list(recipe.search.over)  # portable recipes are sorted, and the order of the keys numbers the candidates
    return {"recipe": portable(endless), "digest": digest(endless), "order": order, "parents": parents,
            "statistics": plan.every_statistic}  # fmt: skip


def _run(
    table: CandidateTable,
    bench: Bench,
    recipe: MergeRecipe,
    spec: SearchSpec,
    space: Space,
    ends: Sequence[MergeRecipe],
) -> None:
    """Fill the table; what is in it already is only told to the sampler."""
    former = list(table)
    known: dict[str, dict[str, Any]] = {}
    sampling = sample(space, spec, recipe.seed)
    values: dict[str, Any] | None = next(sampling)
    place = 0
    while values is not None:
        key = json.dumps(values, sort_keys=True)
        if place < len(former):
            record = former[place]
            if json.dumps(record["values"], sort_keys=True) != key:
                raise MergeError(
                    f"{table.path}: candidate {place} is {record['values']}, and would be {values} now: it was made "
                    "by another version of Optuna; remove the folder to search anew"
                )
        else:
            for end in ends if place == len(former) else ():
                bench.check(end)
            record = table.append({"values": values, **(known.get(key) or _measured(bench, recipe, values))})
            logger.info("candidate %d: %s: %s", place, values, record.get("score", record.get("failed")))
        known[key] = {name: content for name, content in record.items() if name != "values"}
        place += 1
        values = _after(sampling, record.get("score"))
    if place < len(former):
        raise MergeError(f"{table.path}: holds {len(former)} candidates, more than the {place} asked for: remove it")


def _after(sampling: Sampling, score: float | None) -> dict[str, Any] | None:
    """Tell a score and return the next candidate; null after the last."""
    try:
        return sampling.send(score)
    except StopIteration:
        return None


def _measured(bench: Bench, recipe: MergeRecipe, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        scores = bench.score(candidate_recipe(recipe, values))
    except ZooError as error:  # one combination that cannot be made does not end a search, and stands in its table
        return {"failed": bench.tell(error)}
    return {"score": sum(scores.values()) / len(scores), "scores": scores}


def _best(table: CandidateTable) -> dict[str, Any]:
    """Return the best candidate, the first of several equal ones."""
    made = [record for record in table if "score" in record]
    if not made:
        raise MergeError(f"{table.path}: none of {len(table)} candidates could be made: {table.records[0]['failed']}")
    return max(made, key=lambda record: record["score"])


def _write_recipe(folder: Path, recipe: MergeRecipe, best: Mapping[str, Any], num_candidates: int) -> None:
    shown = ", ".join(f"{task} {score:.4f}" for task, score in best["scores"].items())
    head = (
        f"# The best of {num_candidates} candidates by the mean validation score; {TABLE_FILE} has them all.\n#\n"
        f"# command:  python -m hf_zoo.merge {folder / RECIPE_FILE}\n"
        f"# expected: validation score {best['score']:.4f} ({shown})\n"
    )
    content = yaml.safe_dump(to_plain(recipe, compact=True), sort_keys=False, allow_unicode=True, width=120)
    write_text(folder / RECIPE_FILE, head + content)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.rpartition('.')[2]}={_short(one)}" for key, one in value.items())
    return str(value)
