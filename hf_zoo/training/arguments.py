"""A recipe's training section as `TrainingArguments`, an optimizer and a schedule of the libraries."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_zoo.errors import RecipeError, nearest
from hf_zoo.recipe.grid import seeds_of
from hf_zoo.recipe.schema import TrainingSpec, TrainRecipe

# What a recipe says elsewhere, and where.
SAID_ELSEWHERE = {
    "output_dir": "output",
    "seed": "seeds.dropout",
    "data_seed": "seeds.order",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "optim": "training.optimizer",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "report_to": "training.report_to",
    "save_strategy": "snapshots",
    "save_steps": "snapshots.every_steps",
    "save_total_limit": "snapshots.keep_last",
    "eval_strategy": "training.evaluate_train",
    "push_to_hub": "publish.namespace",
    "hub_token": "the environment variable HF_TOKEN",
    "hub_model_id": "publish.namespace",
    "remove_unused_columns": "nothing: hf_zoo's tables hold only what is used",
    "label_names": "nothing: the objective knows its labels",
}
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "one_cycle": "constant"}


def training_arguments(recipe: TrainRecipe, folder: Path) -> TrainingArguments:
    """Translate a member's recipe.

    Args:
        recipe: The member's own recipe.
        folder: Folder for what resuming needs.

    Raises:
        RecipeError: If `training.arguments` names something unknown, or something the recipe says elsewhere.
    """
    spec, seeds = recipe.training, seeds_of(recipe)
    _check_further(recipe.name, spec.arguments)
    schedule = SCHEDULES[spec.schedule]
    if schedule == "constant" and spec.warmup and spec.schedule != "one_cycle":
        schedule = "constant_with_warmup"
    values: dict[str, Any] = {
        "output_dir": str(folder),
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
        "report_to": list(spec.report_to) if isinstance(spec.report_to, tuple) else spec.report_to,
        "run_name": recipe.name,
        "save_strategy": "no",  # our callback decides, see `snapshots.py`
        "eval_strategy": "no",  # our callback evaluates, see `records.py`
        "logging_strategy": "epoch" if spec.report_to == "none" else "steps",
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": _on_cpu(),
        "ddp_find_unused_parameters": False,
    }
    if recipe.model.type == "timm" or recipe.model.adapter is not None or recipe.model.freeze_encoder:
        values.pop("ddp_find_unused_parameters")
    try:
        return TrainingArguments(**(values | spec.arguments))
    except (TypeError, ValueError) as error:
        raise RecipeError(recipe.name, [f"training: {error}"]) from error


def optimizer_choice(spec: TrainingSpec) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and arguments, as `Trainer(optimizer_cls_and_kwargs=...)` takes them."""
    common: dict[str, Any] = {"lr": spec.learning_rate, "fused": True}
    if spec.optimizer == "sgd":
        return torch.optim.SGD, common | {"momentum": spec.momentum, "nesterov": spec.nesterov}
    chosen = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.optimizer]
    return chosen, common | {"betas": spec.betas}


def _check_further(source: str, arguments: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    mistakes = []
    for name in arguments:
        if name in SAID_ELSEWHERE:
            mistakes.append(f"training.arguments.{name}: say it with {SAID_ELSEWHERE[name]} instead")
        elif name not in known:
            mistakes.append(f"training.arguments.{name}: TrainingArguments has no such field{nearest(name, known)}")
    if mistakes:
        raise RecipeError(source, mistakes)


def _on_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
