"""Try every method that can be tried on some members, and show it beside the members, joint training and ensembles.

Methods are merged in memory with their papers' hyper-parameters, or those the recipe gives. All are measured on the
validation and test splits; the best is chosen by validation alone and made like any merge. Beside it lies
`contest-NAME` with a line a method in `methods.jsonl`, the whole table in `contest.json`, and `README.md`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.candidates import CandidateTable
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, ZooError
from hf_zoo.files import write_json, write_text
from hf_zoo.finding import main_score
from hf_zoo.hub.markdown import code, sentence, table
from hf_zoo.ingredients import check_one_trunk, labels_of, open_ingredient
from hf_zoo.joining import task_reader
from hf_zoo.merging import MergeOutcome, run_merge
from hf_zoo.methods.base import Need, get_method, list_methods
from hf_zoo.planning import MergePlan, plan_merge
from hf_zoo.recipe.grid import digest, portable
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.search import Bench

if TYPE_CHECKING:
    from hf_zoo.ingredients import Ingredient
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

TABLE_FILE = "methods.jsonl"
SUMMARY_FILE = "contest.json"
CARD_FILE = "README.md"
SHOWN_METRICS = ("accuracy", "top1", "loss")


@dataclass(frozen=True)
class ContestOutcome:
    """What a comparison of methods came to.

    Attributes:
        folder: Where its tables lie.
        rows: A model or method each: `kind` (`method`, `member`, `joint`, `ensemble`), `name`, and `results`, task ->
            metrics as `SPLIT_METRIC`; for methods the mean validation `score`.
        reasons: Methods that were not tried, or could not be finished -> why.
        best: The method with the best mean validation score.
        merge: The merge it made.
    """

    folder: Path
    rows: tuple[dict[str, Any], ...]
    reasons: Mapping[str, str]
    best: str
    merge: MergeOutcome

    def table(self) -> list[dict[str, Any]]:
        """Return one row a model or method for people to read, methods by falling validation score."""
        return [_shown(row, self.best) for row in self.rows]


def run_contest(recipe: MergeRecipe) -> ContestOutcome:
    """Measure every method that can be tried, and make the best.

    Interrupted and called again, it goes on with the methods that were not measured yet.

    Args:
        recipe: A recipe whose `method` is `all`; `parameters` are given a method.

    Raises:
        ZooError: If members cannot be found or do not fit together, a task has no validation split, or no method can
            be tried.
    """
    plan, baseless = _plan(recipe)
    folder = Path(recipe.output) / f"contest-{plan.name.removeprefix('merge-')}"
    lines = CandidateTable(folder / TABLE_FILE, _purpose(recipe, plan))
    done = {line["name"]: line for line in lines if line["kind"] == "method"}
    bench = Bench(plan, with_test=True)
    methods, reasons = _applicable(recipe, bench, baseless)
    for method in methods:
        if method not in done:
            logger.info("trying %s", method)
            done[method] = lines.append(_measured(bench, _recipe_of(recipe, method)))
    reasons |= {name: line["failed"] for name, line in done.items() if "failed" in line}
    finished = sorted((line for line in done.values() if "score" in line), key=lambda line: -line["score"])
    if not finished:
        raise MergeError(f"no method could be tried: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")
    rows = (*_others(recipe, bench, lines), *finished)
    best = str(finished[0]["name"])
    _write(folder, plan, rows, reasons, best)
    return ContestOutcome(folder, rows, reasons, best, run_merge(_recipe_of(recipe, best)))


def applicable_methods(recipe: MergeRecipe) -> tuple[list[str], dict[str, str]]:
    """Return the methods that can be tried, and the others with the reason.

    Args:
        recipe: A recipe whose `method` is `all`.

    Raises:
        ZooError: If members cannot be found or do not fit together, or the data cannot be read.
    """
    plan, baseless = _plan(recipe)
    return _applicable(recipe, Bench(plan, with_test=True), baseless)


def _plan(recipe: MergeRecipe) -> tuple[MergePlan, str | None]:
    """Return a plan that keeps the base where there is one, and why there is none where it was looked for in vain."""
    first = replace(recipe, method="average", parameters={}, joint=None)
    every = [_recipe_of(recipe, method) for method in list_methods()]
    try:
        return plan_merge(first, every), None
    except ZooError as error:
        if recipe.base is not None:
            raise
        return plan_merge(first), str(error)  # what is not about a base is raised again


def _recipe_of(recipe: MergeRecipe, method: str) -> MergeRecipe:
    """Return the recipe of one method."""
    name = None if recipe.name is None else f"{recipe.name}-{method.replace('_', '-')}"
    parameters = dict(recipe.parameters.get(method, {}))
    return replace(recipe, name=name, method=method, parameters=parameters, joint=None)


def _applicable(recipe: MergeRecipe, bench: Bench, baseless: str | None) -> tuple[list[str], dict[str, str]]:
    methods, reasons = [], {}
    for method in list_methods():
        try:
            bench.check(_recipe_of(recipe, method))
        except MergeError as error:
            in_need = baseless is not None and Need.BASE in get_method(method).needs
            reasons[method] = f"its base is not known: {baseless}" if in_need else bench.tell(error)
        else:
            methods.append(method)
    return methods, reasons


def _measured(bench: Bench, recipe: MergeRecipe) -> dict[str, Any]:
    try:
        merged = CheckpointReader.of(bench.merge(recipe), recipe.method)
        results = {}
        for trial in bench.trials:
            reader = task_reader(trial.members, merged) if bench.plan.heads_apart else merged
            results[trial.task] = trial.measure(reader)
    except ZooError as error:  # one method that cannot be finished does not end the comparison, and is told
        return {"kind": "method", "name": recipe.method, "failed": bench.tell(error)}
    line = {"kind": "method", "name": recipe.method, "parameters": recipe.parameters, "results": results}
    score = _score(results)
    if not math.isfinite(score):
        return {**line, "failed": "its validation score is not finite", "results": {}}
    return {**line, "score": score}


def _score(results: Mapping[str, Mapping[str, Any]]) -> float:
    return sum(main_score(metrics, "validation_") for metrics in results.values()) / len(results)


def _others(recipe: MergeRecipe, bench: Bench, lines: CandidateTable) -> list[dict[str, Any]]:
    """Return the rows of members, ensembles and joint training."""
    done = {(line["kind"], line["name"]): line for line in lines if line["kind"] != "method"}
    if not any(kind == "end" for kind, _ in done):
        for row in _measured_others(recipe, bench):
            if (row["kind"], row["name"]) not in done:
                done[row["kind"], row["name"]] = lines.append(row)
        lines.append({"kind": "end", "name": ""})
    return [line for (kind, _), line in done.items() if kind != "end"]


def _measured_others(recipe: MergeRecipe, bench: Bench) -> list[dict[str, Any]]:
    from hf_zoo.ensembles import measure_ensembles

    found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(kind: str, name: str, task: str, metrics: Mapping[str, Any]) -> None:
        row = found.setdefault((kind, name), {"kind": kind, "name": name, "results": {}})
        row["results"][task] = {key: value for key, value in metrics.items() if key not in ("task", "model")}

    for trial in bench.trials:
        for member, label in zip(trial.members, labels_of(trial.members), strict=True):
            add("member", label, trial.task, trial.measure(member.reader))
    for trial in bench.trials:
        for record in measure_ensembles(trial):
            add("ensemble", str(record["model"]), trial.task, record)
    if recipe.joint is not None:
        for trial in bench.trials:
            joint = _joint(recipe.joint, trial, bench.plan.heads_apart)
            add("joint", open_ingredient(recipe.joint).label, trial.task, trial.measure(joint.reader))
    return list(found.values())


def _joint(where: str, trial: Trial, heads_apart: bool) -> Ingredient:
    """Return the model a jointly trained repo has for a task: its sub-folder of that name, where it has one.

    Raises:
        MergeError: If it is another kind of model, or tells other classes apart.
    """
    whole = open_ingredient(where)
    has_own = heads_apart and (whole.folder / trial.task).is_dir()
    joint = open_ingredient(f"{where}#{trial.task}") if has_own else whole
    first = trial.members[0]
    check_one_trunk([first, joint])
    if joint.labels != first.labels:
        raise MergeError(
            f"joint {joint.reference} tells other classes apart ({', '.join(joint.labels)}) than {first.reference} "
            f"({', '.join(first.labels)}): give a repo with a sub-folder {trial.task!r}, or one of the same classes"
        )
    return joint


def _purpose(recipe: MergeRecipe, plan: MergePlan) -> dict[str, Any]:
    same = replace(recipe, name=None, description="")
    parents = [{"repo": parent.repo, "role": parent.role, "sha256": parent.sha256} for parent in plan.parents]
    return {"recipe": portable(same), "digest": digest(same), "parents": parents, "statistics": plan.every_statistic}


def _shown(row: Mapping[str, Any], best: str) -> dict[str, Any]:
    name = row["name"] if row["kind"] != "joint" else f"{row['name']} (joint training)"
    mark = " *" if row["kind"] == "method" and name == best else ""
    shown: dict[str, Any] = {"model": f"{name}{mark}"}
    for split in ("validation", "test"):
        found = {task: _metric(metrics, split) for task, metrics in row["results"].items()}
        for task, pair in found.items():
            if pair is not None:
                shown[f"{task} ({split} {pair[0]})"] = f"{pair[1]:.4f}"
        values = [pair[1] for pair in found.values() if pair is not None]
        if row["kind"] != "member" and values and len({pair[0] for pair in found.values() if pair}) == 1:
            shown[f"mean ({split})"] = f"{sum(values) / len(values):.4f}"
    return shown


def _metric(metrics: Mapping[str, Any], split: str) -> tuple[str, float] | None:
    return next(((m, value) for m in SHOWN_METRICS if (value := metrics.get(f"{split}_{m}")) is not None), None)


def _write(
    folder: Path, plan: MergePlan, rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str], best: str
) -> None:
    write_json(folder / SUMMARY_FILE, {"best": best, "rows": rows, "not tried": reasons})
    shown = [_shown(row, best) for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    cells = [[sentence(row["model"]), *(row.get(column, "-") for column in columns[1:])] for row in shown]
    members = ", ".join(code(member.label) for member in plan.members)
    parts = [
        f"# Merge methods compared on {', '.join(plan.tasks) or 'one task'}",
        f"Members: {members}. Every method has its paper's hyper-parameters, or those given. `*` marks the method "
        "with the best mean validation score, which alone was written as a model; the test split chose nothing.",
        table(columns, cells, numeric=range(1, len(columns))),
    ]
    if reasons:
        told = [[code(name), sentence(reason)] for name, reason in reasons.items()]
        parts += ["Not tried, or not finished:", table(["Method", "Reason"], told)]
    parts += [f"All metrics are in `{SUMMARY_FILE}`."]
    write_text(folder / CARD_FILE, "\n\n".join(parts) + "\n")
