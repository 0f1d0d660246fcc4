"""What happens besides the steps of a run: records, snapshots, progress."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_zoo.errors import RecipeError, TrainingError, nearest
from hf_zoo.files import write_text
from hf_zoo.population import RESULTS_FILE, SNAPSHOT_FOLDER
from hf_zoo.recipe.schema import SnapshotSpec
from hf_zoo.training.snapshots import keep_snapshot, latest_checkpoint, snapshot_steps

if TYPE_CHECKING:
    from hf_zoo.training.trainer import ZooTrainer

BEST = "best"
# Metrics that are better when lower; every other is better when higher.
LOWER_IS_BETTER = ("loss", "perplexity", "mean_rank")


class RecordCallback(TrainerCallback):
    """Evaluate at the start and after every epoch, and append the record to `results.jsonl` as it happens.

    Args:
        trainer: The trainer it serves.
        folder: The member's folder.
        evaluate: Returns the metrics of all splits (`validation_accuracy`, ...); every process calls it alike.
    """

    def __init__(self, trainer: ZooTrainer, folder: Path, evaluate: Callable[[], Mapping[str, float]]) -> None:
        self.trainer, self.folder, self.evaluate = trainer, folder, evaluate
        self.records: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take record 0, or, in a resumed run, drop the records past the checkpoint."""
        if state.global_step == 0:
            self.records = [{"epoch": 0.0, "step": 0, **self.evaluate()}]
        else:
            self.records = [record for record in read_records(self.folder) if record["step"] <= state.global_step]
        if state.is_world_process_zero:
            write_text(self.folder / RESULTS_FILE, "".join(json.dumps(record) + "\n" for record in self.records))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the record of the epoch."""
        before = self.records[-1]["step"] if self.records else 0
        running = self.trainer.take_loss_sum() / max(1, state.global_step - before)
        if not math.isfinite(running):
            raise TrainingError(
                f"the loss became {running} between steps {before} and {state.global_step}: lower "
                "training.learning_rate, add training.warmup or set training.max_grad_norm"
            )
        record = {"epoch": state.epoch, "step": state.global_step, "running_loss": running}
        record["learning_rate"] = kwargs["lr_scheduler"].get_last_lr()[0]
        metrics = dict(self.evaluate())
        self.records.append({**record, **metrics})
        if state.is_world_process_zero:
            self._append(self.records[-1])
        self.trainer.log(metrics)  # for the trackers; our records are the truth

    def _append(self, record: dict[str, Any]) -> None:
        with (self.folder / RESULTS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a member's folder; a line cut short by a kill ends them."""
    path = folder / RESULTS_FILE
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class SnapshotCallback(TrainerCallback):
    """Ask the Trainer to save at the right steps, and put what it saved into the member's `snapshots/`.

    A checkpoint to resume from is taken at every scheduled step, and at the end of every epoch where nothing else is
    scheduled; `keep_last` and the like only decide what of it stays.

    Args:
        trainer: The trainer it serves.
        folder: The member's folder.
        spec: Which moments are kept.
        records: The callback that knows which epoch is the best; it comes before this one.
    """

    def __init__(self, trainer: ZooTrainer, folder: Path, spec: SnapshotSpec, records: RecordCallback) -> None:
        self.trainer, self.folder, self.spec, self.records = trainer, folder, spec, records
        self.saved: dict[int, str] = {}
        self.kept: dict[int, str] = {}
        self.steps_per_epoch = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Work out the schedule; keep the untrained network, and what a killed run had saved but not yet kept."""
        self.steps_per_epoch = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        self.saved = snapshot_steps(self.spec, state.max_steps, self.steps_per_epoch)
        self.kept = dict(sorted(self.saved.items())[-self.spec.keep_last :]) if self.spec.keep_last else self.saved
        self._best_score(-1)
        if state.global_step == 0 and 0 in self.kept:
            self._save_untrained(state)
        elif state.global_step > 0 and state.is_world_process_zero:
            self._keep(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save at scheduled steps; those that end an epoch wait for its record."""
        step = state.global_step
        control.should_save = step in self.saved and step % self.steps_per_epoch != 0 and step < state.max_steps
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save at scheduled epochs, at the best one so far and at the end."""
        unscheduled = all(step in (0, state.max_steps) for step in self.saved)
        control.should_save = state.global_step in self.saved or unscheduled or self._is_best(state.global_step)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what was saved."""
        if state.is_world_process_zero:
            self._keep(state.global_step)

    def _keep(self, step: int) -> None:
        checkpoint = latest_checkpoint(self.trainer.folder)
        assert checkpoint is not None
        if step in self.kept:
            keep_snapshot(checkpoint, self.folder, self.kept[step])
        if self._is_best(step):
            keep_snapshot(checkpoint, self.folder, BEST)

    def _save_untrained(self, state: TrainerState) -> None:
        target = self.folder / SNAPSHOT_FOLDER / self.kept[0]
        partial = target.with_name(f".{target.name}.partial")
        if state.is_world_process_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.trainer.save_model(str(partial))
        if state.is_world_process_zero:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

    def _is_best(self, step: int) -> bool:
        """Whether the last record is of this step and better than every one before it."""
        records = self.records.records
        if self.spec.best is None or records[-1]["step"] != step:
            return False
        scores = [self._best_score(index) for index in range(len(records))]
        return all(scores[-1] > score for score in scores[:-1])

    def _best_score(self, index: int) -> float:
        return 0.0 if self.spec.best is None else score_of(self.spec.best, self.records.records[index])


def score_of(metric: str, record: Mapping[str, Any]) -> float:
    """Return a record's value of the metric that names the best epoch, higher for better.

    Args:
        metric: A metric of the validation split.
        record: What was measured.

    Raises:
        RecipeError: If the record has no such metric.
    """
    if metric not in record:
        known = [key for key in record if key.startswith("validation_")]
        raise RecipeError(
            "recipe", [f"snapshots.best: no metric {metric!r}{nearest(metric, known)}: {', '.join(known)}"]
        )
    return -record[metric] if metric.endswith(LOWER_IS_BETTER) else record[metric]


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Return what writes a run's events into a folder of its own: the library's default lies where checkpoints do.

    Raises:
        RecipeError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        mistake = "training.report_to: tensorboard is not installed: run `pip install tensorboard`, or leave it out"
        raise RecipeError("recipe", [mistake]) from error
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class ProgressCallback(TrainerCallback):
    """Report every optimizer step of a member.

    Args:
        report: Called with steps done and steps in all.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report where a fresh or resumed run begins."""
        self.report(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report a step."""
        self.report(state.global_step, state.max_steps)
