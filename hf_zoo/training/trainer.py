"""`ZooTrainer`: the Trainer of one member.

It adds to `transformers.Trainer` what a population needs: objectives as objects, checkpoints that appear whole, a
resume that loads every architecture strictly, and a running loss that survives it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_zoo.errors import CheckpointError, DiskFullError
from hf_zoo.files import write_json
from hf_zoo.heads import trunk_module
from hf_zoo.losses import compute_loss
from hf_zoo.recipe.schema import ObjectiveSpec, TrainingSpec
from hf_zoo.training.arguments import optimizer_choice
from hf_zoo.training.snapshots import CHECKPOINT_PREFIX

EPOCH_STATE_FILE = "epoch_state.json"
FREE_BYTES_AT_LEAST = 64 << 20


class ZooTrainer(Trainer):
    """Train one member of a population.

    Its checkpoints lie in `args.output_dir` as `checkpoint-STEP`, whole or not at all, and only the last one is kept:
    what of a run is to stay is the business of `hf_zoo.training.snapshots`.

    Args:
        model: A model with a head, or a PEFT model around one.
        args: `training_arguments(recipe, folder)`, or any others.
        objective: What is learned.
        training: Optimizer, schedule and decay; null leaves all three to `args`.
        freeze_encoder: Keep the trunk in evaluation mode: its weights do not train, so its statistics and dropout must
            not move either.
        train_dataset: A table of `hf_zoo.data`.
        data_collator: Its collator.
        processing_class: The tokenizer or image processor saved with every checkpoint.
        callbacks: Further callbacks.
    """

    # Each batch's loss is its mean: the Trainer divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        objective: ObjectiveSpec,
        train_dataset: Dataset,
        data_collator: Callable[..., dict[str, Any]],
        training: TrainingSpec | None = None,
        freeze_encoder: bool = False,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.objective: ObjectiveSpec = objective
        self.training_spec: TrainingSpec | None = training
        self.freeze_encoder = freeze_encoder
        self.folder = Path(str(args.output_dir))
        self._partial_folder: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_choice(training) if training is not None else None,
        )
        self.model_accepts_loss_kwargs = False  # we divide, see `loss_is_scaled_for_ga`
        self.loss_sum = torch.zeros((), device=args.device)
        self.add_callback(EpochCallback())
        if args.disable_tqdm:
            self.pop_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective's mean loss of a batch, and on request the model's outputs."""
        if self.freeze_encoder:
            trunk_module(cast(nn.Module, self.model)).eval()
        labels = inputs.get("labels")
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = compute_loss(self.objective, outputs.logits, labels, statistics=False).loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Do one forward and backward pass, and add to the epoch's running loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_sum += loss
        return loss

    def take_loss_sum(self) -> float:
        """Return the sum of the steps' losses since the last call, averaged over processes, and start anew."""
        loss_sum = self.accelerator.reduce(self.loss_sum.detach().clone(), "mean").item()
        self.loss_sum.zero_()
        return loss_sum

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that decay: all of them where the recipe says so, else all but biases and norms."""
        if self.training_spec is not None and self.training_spec.decay_all:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the schedule; `one_cycle` is torch's, stepped every optimizer step (Smith & Topin 2017)."""
        if self.training_spec is None or self.training_spec.schedule != "one_cycle":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            schedule: Any = OneCycleLR(chosen, max_lr=self.training_spec.learning_rate, total_steps=num_training_steps)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return cast(LRScheduler, self.lr_scheduler)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial_folder) if self._partial_folder is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, rename it when it is whole, and drop the one before."""
        folder = self.folder
        self._partial_folder = folder / "partial"
        if self.is_world_process_zero():
            shutil.rmtree(self._partial_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        partial = self._partial_folder
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error, folder):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise DiskFullError(folder) from error
        finally:
            self._partial_folder = None
        loss_sum = self.accelerator.reduce(self.loss_sum.detach().clone(), "mean").item()
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{CHECKPOINT_PREFIX}{self.state.global_step}"
            write_json(partial / name / EPOCH_STATE_FILE, {"loss_sum": loss_sum, **self._setting()})
            _sync_folder(partial / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(partial / name, folder / name)
            for old in folder.glob(f"{CHECKPOINT_PREFIX}*"):
                if old.name != name:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle nobody needs: it would hold a token where one is among the arguments.
        (Path(output_dir or self.folder) / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint strictly, through `from_pretrained`, which knows the names on disk of every family."""
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / EPOCH_STATE_FILE).read_text())
        changed = [f"{key} {state[key]}, now {value}" for key, value in self._setting().items() if state[key] != value]
        if changed:
            raise CheckpointError(
                f"{folder}: was trained with {'; '.join(changed)}: go on as it began, or delete the member's folder"
            )
        self.loss_sum.fill_(state["loss_sum"])
        unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(unwrapped, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_strictly(unwrapped, folder)

    def _setting(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one before it: it decides what a step is."""
        return {"num_processes": self.accelerator.num_processes, "precision": self.accelerator.mixed_precision}

    def _load_best_model(self) -> None:
        load_strictly(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))


class EpochCallback(TrainerCallback):
    """Tell the training table which epoch its samples are drawn in.

    accelerate tells the sampler, and the table only where there is no sampler of its own: not in a resumed epoch, and
    not with several processes.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch, before the first sample is asked for."""
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a failed write failed for want of room; the libraries say it in their own words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = str(error)
    if "os error 28" in text or "No space left" in text or "os error 122" in text:
        return True
    # torch.save says only that its archive came out too short.
    return "inline_container" in text and shutil.disk_usage(folder).free < FREE_BYTES_AT_LEAST


def load_strictly(model: PreTrainedModel, folder: Path) -> None:
    """Fill a model with the weights of a folder written by `save_pretrained`.

    Args:
        model: The model; it is changed in place.
        folder: A folder with the same architecture's weights.

    Raises:
        CheckpointError: If a tensor is missing, superfluous or of another shape.
    """
    answer: Any = type(model).from_pretrained(folder, config=model.config, output_loading_info=True)
    loaded, info = answer
    wrong = [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}" for kind in info if info[kind]]
    if wrong:
        raise CheckpointError(f"{folder}: not the weights of this {type(model).__name__}: {'; '.join(wrong)}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename after it never names an empty file."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
