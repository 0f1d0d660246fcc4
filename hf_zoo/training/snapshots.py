"""Which moments of a run are kept, and how they come to lie in the member's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hf_zoo.population import SNAPSHOT_FOLDER
from hf_zoo.recipe.schema import SnapshotSpec

CHECKPOINT_PREFIX = "checkpoint-"
# What only a resumed training reads; everything else in a checkpoint is the model's.
TRAINING_FILES = frozenset({
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "epoch_state.json",
})


def snapshot_steps(spec: SnapshotSpec, max_steps: int, steps_per_epoch: int) -> dict[int, str]:
    """Return the scheduled optimizer steps and the names of their snapshots, before `keep_last` and without the best.

    Args:
        spec: The recipe's section.
        max_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of an epoch.

    Returns:
        Step -> `epoch-003` at the end of a whole epoch when epochs are what is kept, else `step-000123`.
    """
    names: dict[int, str] = {}
    if spec.every_steps is not None:
        names |= {step: f"step-{step:06d}" for step in range(spec.every_steps, max_steps + 1, spec.every_steps)}
    if spec.log_spaced is not None:
        names |= {step: f"step-{step:06d}" for step in log_spaced(max_steps, spec.log_spaced)}
    if spec.every_epochs is not None:
        epochs = range(spec.every_epochs, max_steps // steps_per_epoch + 1, spec.every_epochs)
        names |= {epoch * steps_per_epoch: f"epoch-{epoch:03d}" for epoch in epochs}
    by_epoch = spec.every_epochs is not None or not names
    if max_steps not in names:
        whole = by_epoch and max_steps % steps_per_epoch == 0
        names[max_steps] = f"epoch-{max_steps // steps_per_epoch:03d}" if whole else f"step-{max_steps:06d}"
    if spec.initial:
        names[0] = "epoch-000" if by_epoch else "step-000000"
    return dict(sorted(names.items()))


def log_spaced(max_steps: int, count: int) -> list[int]:
    """Return up to `count` distinct steps in [1, max_steps] at equal distances on a logarithmic scale."""
    if count < 2:
        return [max_steps]
    return sorted({round(max_steps ** (index / (count - 1))) for index in range(count)})


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the most steps, or null; half-written ones bear another name."""
    found = [path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name[len(CHECKPOINT_PREFIX) :].isdigit()]
    return max(found, key=lambda path: int(path.name[len(CHECKPOINT_PREFIX) :]), default=None)


def model_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that belong to the model: weights, config, processor, code."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return [path for path in files if path.name not in TRAINING_FILES and not path.name.startswith("rng_state")]


def keep_snapshot(checkpoint: Path, member: Path, name: str) -> Path:
    """Put a checkpoint's model files under `snapshots/NAME`, whole or not at all; an older one of that name goes.

    Files are hard links where the file system has them: a checkpoint is never written to again.
    """
    target = member / SNAPSHOT_FOLDER / name
    old = target.with_name(f".{name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run killed in the middle of this
    partial = target.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_files(checkpoint, partial, link=True)
    if target.exists():
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    return target


def copy_files(checkpoint: Path, target: Path, *, link: bool) -> None:
    """Copy, or hard-link, a checkpoint's model files into a folder."""
    target.mkdir(parents=True, exist_ok=True)
    for path in model_files(checkpoint):
        destination = target / path.relative_to(checkpoint)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(path, destination)
                continue
            except OSError:  # another file system, or one without links
                pass
        partial = destination.with_name(f".{destination.name}.partial")
        shutil.copyfile(path, partial)
        os.replace(partial, destination)
