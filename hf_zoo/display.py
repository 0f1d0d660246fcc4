"""What the training verbs show: bars on a terminal, a line a member elsewhere, tables at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.cli import guarded
from hf_zoo.recipe.grid import MemberPlan, expand, select
from hf_zoo.recipe.loader import load_recipe, parse_arguments
from hf_zoo.recipe.schema import TrainRecipe

if TYPE_CHECKING:
    from hf_zoo.population import Manifest, Population

HELP = """usage: hf-zoo {verb} RECIPE [key.path=value ...] [--dry-run]

Train the population a recipe describes. Finished members are skipped, an interrupted one goes on: run the same command
again after a kill. `accelerate launch -m hf_zoo.{verb} RECIPE` does the same on several devices.

  RECIPE            a YAML file, or the name of one in recipes/
  key.path=value    overrides a key: seed=3, training.epochs=2, vary.seed=[0,1], members=0:8, publish.namespace=org
  --dry-run         list the members with factors, parameters, steps and disk use, and stop"""


def run_training(verb: str, recipe_class: type[TrainRecipe], arguments: Sequence[str]) -> int:
    """Run `pretrain` or `finetune` and return the exit status: 1 when a member failed, 2 for a user's mistake."""

    def body() -> int:
        source, overrides, flags = parse_arguments(arguments)
        if "--help" in flags:
            print(HELP.format(verb=verb))
            return 0
        recipe = load_recipe(source, recipe_class, overrides)
        if "--dry-run" in flags:
            return _dry_run(recipe)
        return _train(recipe)

    return guarded(body)


def _dry_run(recipe: TrainRecipe) -> int:
    from hf_zoo.training.estimate import estimate

    quieten()
    plans = select(expand(recipe), recipe.members)
    costs = estimate(plans)
    rows = []
    for plan in plans:
        cost = costs.members[plan.name]
        size = f"{cost.num_bytes / 2**20:.1f}"
        rows.append({"member": plan.name, **plan.factors, "parameters": f"{cost.num_parameters:,}",
                     "steps": cost.num_steps, "snapshots": cost.num_snapshots, "MiB": size})  # fmt: skip
    print(format_table(rows))
    print(
        f"{len(plans)} members in {Path(recipe.output) / recipe.name}, {costs.num_bytes / 2**20:.1f} MiB; "
        "nothing was done"
    )
    return 0


def _train(recipe: TrainRecipe) -> int:
    from accelerate import PartialState

    from hf_zoo.training.engine import train_population

    quieten()
    outcome = train_population(recipe, Bars())
    if not PartialState().is_main_process:
        return 1 if outcome.failures else 0
    print(format_table(results_of(outcome.population)))
    print(f"{len(outcome.population)} members in {outcome.population.folder}")
    if outcome.elsewhere:
        print(f"in training by another run on this folder: {', '.join(outcome.elsewhere)}", file=sys.stderr)
    for name, reason in outcome.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if recipe.publish.namespace is not None:
        from hf_zoo.publish import publish_folder

        publish_folder(Path(recipe.output) / recipe.name, recipe.publish)
    return 1 if outcome.failures else 0


class Bars:
    """Two progress bars with the time left, for the population and for its current member."""

    def __init__(self) -> None:
        self.population: Any = None
        self.current: Any = None
        self.began, self.done, self.finished_before = 0.0, 0, 0

    def begin(self, folder: Path, plans: Sequence[MemberPlan], finished: int) -> None:
        """Open the population's bar."""
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        print(f"{folder}: {len(plans)} members, {finished} finished before", file=sys.stderr)
        self.population = tqdm(
            total=len(plans), initial=finished, desc=folder.name, unit="member", disable=not terminal, position=0
        )
        self.began, self.done, self.finished_before = time.monotonic(), finished, finished

    def member(self, plan: MemberPlan) -> None:
        """Open a member's bar."""
        from tqdm import tqdm

        self.current = tqdm(desc=plan.name, unit="step", disable=self.population.disable, position=1, leave=False)

    def step(self, done: int, total: int) -> None:
        """Move the member's bar."""
        if self.current.total != total:
            self.current.total = total
            self.current.initial = self.current.n = done
            self.current.refresh()
        else:
            self.current.update(done - self.current.n)

    def finished(self, manifest: Manifest) -> None:
        """Close the member's bar and move the population's."""
        self._close(f"{manifest.name}: {summary(manifest.metrics)}")

    def failed(self, plan: MemberPlan, reason: str) -> None:
        """Close the member's bar and say why it failed."""
        self._close(f"{plan.name}: failed: {reason}")

    def _close(self, line: str) -> None:
        self.current.close()
        self.done += 1
        self.population.update()
        if self.population.disable:
            a_member = (time.monotonic() - self.began) / (self.done - self.finished_before)
            left = a_member * (self.population.total - self.done)
            print(f"[{self.done}/{self.population.total}, {left:.0f} s left] {line}", file=sys.stderr)
        if self.done == self.population.total:
            self.population.close()


def results_of(population: Population) -> list[dict[str, Any]]:
    """Return a row a member: name, status, task, factors and its main metrics."""
    rows = []
    for member in population:
        manifest = member.manifest
        row: dict[str, Any] = {"member": manifest.name, "status": manifest.status, "task": manifest.task}
        rows.append(row | manifest.factors | main_metrics(manifest.metrics))
    return rows


def main_metrics(metrics: dict[str, float]) -> dict[str, str]:
    """Return the losses and the main metric of each split, rounded for a table."""
    shown = ("loss", "accuracy", "top1")
    return {
        name: f"{value:.4f}" for name, value in metrics.items()
        if name.partition("_")[0] in ("validation", "test") and name.partition("_")[2] in shown
    }  # fmt: skip


def summary(metrics: dict[str, float]) -> str:
    """Return the main metrics on one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in main_metrics(metrics).items())


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table of aligned columns; a key only some rows have is empty in the others."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "(nothing)"
    cells = [[("" if row.get(key) is None else str(row[key])) for key in columns] for row in rows]
    titles = [key.rpartition(".")[2] if sum(k.endswith(key.rpartition(".")[2]) for k in columns) == 1 else key
              for key in columns]  # fmt: skip
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(columns))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
             for line in [titles, ["-" * width for width in widths], *cells]]  # fmt: skip
    return "\n".join(lines)


def quieten() -> None:
    """Silence the libraries: the screen belongs to our own bars and tables.

    Those that have not been imported are told by their environment variables: a merge of weights alone never needs
    them, and importing them takes longer than it does.
    """
    import logging

    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    os.environ.update({
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    })
    logging.getLogger("accelerate").setLevel(logging.ERROR)
