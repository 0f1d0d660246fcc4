"""A recipe's training section as `TrainingArguments`, an optimizer and a schedule of the libraries."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hf_zoo.errors import RecipeError, nearest
from hf_zoo.recipe.grid import seeds_of
from hf_zoo.recipe.schema import TrainingSpec, TrainRecipe

TENSORBOARD = "tensorboard"
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "one_cycle": "constant"}


def training_arguments(recipe: TrainRecipe, folder: Path | None) -> TrainingArguments:
    """Translate a member's recipe.

    Args:
        recipe: The member's own recipe.
        folder: Folder for what resuming needs; null for a check without a run.

    Raises:
        RecipeError: If `training.arguments` names something unknown, which the recipe's own rules cannot know.
    """
    spec, seeds = recipe.training, seeds_of(recipe)
    _check_further(recipe.name, spec.arguments)
    _check_trackers(recipe.name, spec)
    schedule = SCHEDULES[spec.schedule]
    if schedule == "constant" and spec.warmup and spec.schedule != "one_cycle":
        schedule = "constant_with_warmup"
    values: dict[str, Any] = {
        "output_dir": str(folder) if folder is not None else None,
        "seed": seeds["dropout"],
        "data_seed": seeds["order"],
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps or -1,
        "per_device_train_batch_size": spec.batch_size,
        "per_device_eval_batch_size": spec.eval_batch_size or spec.batch_size,
        "gradient_accumulation_steps": spec.accumulation,
        "learning_rate": spec.learning_rate,
        "weight_decay": spec.weight_decay,
        "lr_scheduler_type": schedule,
        "warmup_steps": spec.warmup if spec.warmup < 1 else int(spec.warmup),
        "max_grad_norm": spec.max_grad_norm,
        "bf16": spec.precision == "bf16",
        "fp16": spec.precision == "fp16",
        "report_to": [name for name in trackers(spec) if name != TENSORBOARD],
        "run_name": recipe.name,
        "save_strategy": "no",  # our callback decides, see `snapshots.py`
        "eval_strategy": "no",  # our callback evaluates, see `records.py`
        "logging_strategy": "steps" if trackers(spec) else "epoch",
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": _on_cpu(),
    }
    try:
        arguments = TrainingArguments(**(values | spec.arguments))
    except (TypeError, ValueError) as error:
        raise RecipeError(recipe.name, [f"training: {error}"]) from error
    if spec.precision == "fp32":
        arguments.mixed_precision = "no"  # whatever the launcher says
    return arguments


def trackers(spec: TrainingSpec) -> tuple[str, ...]:
    """Return the names of the trackers a run reports to."""
    names = (spec.report_to,) if isinstance(spec.report_to, str) else spec.report_to
    return tuple(name for name in names if name != "none")


def optimizer_choice(spec: TrainingSpec) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and arguments, as `Trainer(optimizer_cls_and_kwargs=...)` takes them."""
    common: dict[str, Any] = {"lr": spec.learning_rate, "fused": True}
    if spec.optimizer == "sgd":
        return torch.optim.SGD, common | {"momentum": spec.momentum, "nesterov": spec.nesterov}
    chosen = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.optimizer]
    return chosen, common | {"betas": spec.betas}


def _check_further(source: str, arguments: dict[str, Any]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    mistakes = []
    for name, value in arguments.items():
        if name not in defaults:
            hint = nearest(name, list(defaults))
            mistakes.append(f"training.arguments.{name}: TrainingArguments has no such field{hint}")
        elif type(defaults[name]) in (bool, int, float) and type(value) not in (bool, int, float):
            kind = type(defaults[name]).__name__
            mistakes.append(f"training.arguments.{name}: expected {kind}, got {value!r}")
    if mistakes:
        raise RecipeError(source, mistakes)


def _check_trackers(source: str, spec: TrainingSpec) -> None:
    installed = get_available_reporting_integrations()
    mistakes = []
    for name in trackers(spec):
        if name not in INTEGRATION_TO_CALLBACK:
            known = list(INTEGRATION_TO_CALLBACK)
            mistakes.append(f"training.report_to: unknown tracker {name!r}{nearest(name, known)}: {', '.join(known)}")
        elif name not in installed:
            mistakes.append(f"training.report_to: {name} is not installed: `pip install {name}`, or leave it out")
    if mistakes:
        raise RecipeError(source, mistakes)


def _on_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
