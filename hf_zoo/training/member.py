"""One member, from its plan to its finished folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_zoo.building import AUTO_CLASSES, num_parameters
from hf_zoo.curvature.members import measure_member
from hf_zoo.curvature.saved import with_statistics
from hf_zoo.errors import DiskFullError, PopulationError
from hf_zoo.evaluation import evaluate_model
from hf_zoo.files import weights_digest
from hf_zoo.heads import stock_model
from hf_zoo.population import MANIFEST_FILE, SNAPSHOT_FOLDER, TRAINING_FOLDER, Manifest, Member, Snapshot
from hf_zoo.recipe.grid import MemberPlan, differences, digest, portable, without_root
from hf_zoo.recipe.schema import TrainRecipe
from hf_zoo.training.arguments import TENSORBOARD, trackers, training_arguments
from hf_zoo.training.callbacks import (
    BEST,
    ProgressCallback,
    RecordCallback,
    SnapshotCallback,
    read_records,
    tensorboard_callback,
)
from hf_zoo.training.preparing import Prepared, prepare
from hf_zoo.training.snapshots import copy_files, latest_checkpoint
from hf_zoo.training.trainer import ZooTrainer, is_disk_full
from hf_zoo.versions import installed_versions


def train_member(plan: MemberPlan, folder: Path, population: str, report: Callable[[int, int], None]) -> Manifest:
    """Train a member, or go on where a killed run stopped, and finish its folder.

    Args:
        plan: The member.
        folder: Its folder; it may hold a finished or interrupted run of the same recipe.
        population: Name of the population.
        report: Called with optimizer steps done and in all.

    Returns:
        The finished member's manifest.

    Raises:
        PopulationError: If the folder belongs to another recipe.
        TrainingError: If the loss diverges.
        DiskFullError: If there is no room for a checkpoint.
    """
    existing = check_folder(plan, folder)
    if existing is not None and existing.status == "finished":
        return existing
    prepared = prepare(plan.recipe)
    manifest = _first_manifest(plan, population, prepared)
    main = PartialState().is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write(folder)
    try:
        snapshots = _train(plan.recipe, folder, prepared, report)
        if main:
            manifest = _finish(plan.recipe, folder, manifest, snapshots)
    except OSError as error:
        if not is_disk_full(error, folder.parent):
            raise
        raise DiskFullError(folder) from error
    PartialState().wait_for_everyone()
    return manifest


def check_folder(plan: MemberPlan, folder: Path) -> Manifest | None:
    """Return the manifest of a member's folder where it has one.

    Raises:
        PopulationError: If the folder holds a member of another recipe, with the differences.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = Manifest.read(folder)
    if manifest.digest != digest(plan.recipe):
        changes = differences(manifest.recipe, portable(plan.recipe))
        raise PopulationError(
            f"{folder} holds a member of another recipe; what differs (old -> new):\n  "
            + "\n  ".join(changes or ["a path outside the folder, or the version of hf_zoo"])
            + "\nChoose another `name` or `output`, or delete the folder"
        )
    return manifest


def mark_failed(folder: Path, reason: str) -> None:
    """Write into a member's manifest that, and why, its training cannot go on."""
    Manifest.read(folder).replace(status="failed", failure=reason).write(folder)


def _first_manifest(plan: MemberPlan, population: str, prepared: Prepared) -> Manifest:
    recipe, model = plan.recipe, prepared.model
    adapted = hasattr(model, "peft_config")
    whole = stock_model(model) if adapted else model
    return Manifest(
        name=plan.name,
        population=population,
        status="training",
        objective=recipe.objective.name,
        task=recipe.task or Path(recipe.data.path).name,
        description=recipe.description,
        factors={path: without_root(value) for path, value in plan.factors.items()},
        parents=(prepared.parent.entry,) if prepared.parent is not None else (),
        recipe=portable(recipe),
        digest=digest(recipe),
        dataset=prepared.splits.description | {"labels": list(prepared.tables.labels)},
        loading=prepared.loading,
        auto_class=AUTO_CLASSES[recipe.objective.name],
        architecture=type(whole).__name__,
        model_type=whole.config.model_type,
        library="peft" if adapted else "transformers",
        num_parameters=num_parameters(model),
        license=recipe.publish.license,
        language=recipe.publish.language,
        versions=installed_versions(),
    )


def _train(
    recipe: TrainRecipe, folder: Path, prepared: Prepared, report: Callable[[int, int], None]
) -> Mapping[int, str]:
    """Run the Trainer and return the snapshots kept: step -> name."""
    arguments = training_arguments(recipe, folder / TRAINING_FOLDER)
    tables = prepared.tables
    trainer = ZooTrainer(
        prepared.model,
        arguments,
        objective=recipe.objective,
        training=recipe.training,
        freeze_encoder=recipe.model.freeze_encoder and recipe.model.adapter is None,
        train_dataset=tables.train,
        data_collator=tables.train_collator,
        processing_class=tables.processor if hasattr(tables.processor, "save_pretrained") else None,
    )
    records = RecordCallback(trainer, folder, lambda: evaluate_splits(trainer, recipe, prepared))
    snapshots = SnapshotCallback(trainer, folder, recipe.snapshots, records)
    for callback in (records, snapshots, ProgressCallback(report)):
        trainer.add_callback(callback)
    if TENSORBOARD in trackers(recipe.training) and trainer.is_world_process_zero():
        trainer.add_callback(tensorboard_callback(folder.parent / TENSORBOARD / folder.name))
    checkpoint = latest_checkpoint(folder / TRAINING_FOLDER)
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint is not None else None
    if state is not None and state.global_step >= state.max_steps:
        # Killed after its last step: the Trainer would finish the epoch, so only the callbacks catch up.
        for callback in (records, snapshots):
            callback.on_train_begin(
                trainer.args, state, trainer.control, train_dataloader=trainer.get_train_dataloader()
            )
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return snapshots.kept


def evaluate_splits(trainer: ZooTrainer, recipe: TrainRecipe, prepared: Prepared) -> dict[str, float]:
    """Return the metrics of every split as `SPLIT_METRIC`; the training split is read clean, without augmentation."""
    # A sharded model runs on all processes or on none: there each process sees every sample.
    shared = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    metrics: dict[str, float] = {}
    for name, table in prepared.tables.items():
        if name == "train" and not recipe.training.evaluate_train:
            continue
        values = evaluate_model(
            cast(nn.Module, trainer.model),
            table,
            prepared.tables.eval_collators[name],
            recipe.objective,
            batch_size=trainer.args.per_device_eval_batch_size,
            device=trainer.args.device,
            accelerator=trainer.accelerator if shared else None,
        )
        metrics |= {f"{name}_{metric}": value for metric, value in values.items()}
    return metrics


def _finish(recipe: TrainRecipe, folder: Path, manifest: Manifest, kept: Mapping[int, str]) -> Manifest:
    """Put the last weights at the root, complete the manifest, draw the card, and drop what only resuming needed."""
    from hf_zoo.hub.cards import write_card

    records = read_records(folder)
    checkpoint = latest_checkpoint(folder / TRAINING_FOLDER)
    assert checkpoint is not None
    copy_files(checkpoint, folder, link=False)
    steps = {name: step for step, name in kept.items()}
    by_step = {record["step"]: record for record in records}
    snapshots = []
    for path in sorted((folder / SNAPSHOT_FOLDER).glob("[!.]*")):
        record = by_step.get(steps.get(path.name, -1), {}) if path.name != BEST else _best_record(manifest, records)
        step = steps.get(path.name, record.get("step", 0))
        epoch = record.get("epoch", step / max(1, records[-1]["step"]) * records[-1]["epoch"])
        snapshots.append(
            Snapshot(name=path.name, step=step, epoch=epoch, sha256=weights_digest(path), metrics=_metrics(record))
        )
    manifest = manifest.replace(
        status="finished",
        results=tuple(records),
        metrics=_metrics(records[-1]),
        snapshots=tuple(sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.name))),
        sha256=weights_digest(folder),
    )
    if recipe.statistics is not None:
        descriptions = measure_member(
            Member(manifest, folder=folder), recipe.statistics, data=recipe.data, device=PartialState().device
        )
        manifest = with_statistics(manifest, descriptions)
    # The manifest comes last but for the clean-up: a folder that says `finished` is.
    write_card(folder, manifest=manifest)
    manifest.write(folder)
    shutil.rmtree(folder / TRAINING_FOLDER, ignore_errors=True)
    return manifest


def _best_record(manifest: Manifest, records: list[dict[str, Any]]) -> dict[str, Any]:
    from hf_zoo.training.callbacks import LOWER_IS_BETTER

    metric = manifest.recipe["snapshots"]["best"]
    sign = -1 if metric.endswith(LOWER_IS_BETTER) else 1
    return max(records, key=lambda record: sign * record[metric])


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key not in ("epoch", "step", "learning_rate")}
