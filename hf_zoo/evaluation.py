"""Metrics of a model over every sample of a table, and of a member over the splits of a data set."""

# N = samples, C = classes

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_zoo.data.columns import NEEDS, find_columns, label_names
from hf_zoo.data.images import ImageTable
from hf_zoo.data.sources import load_splits
from hf_zoo.data.tables import Collator, Table, build_collator, build_table
from hf_zoo.errors import DataError
from hf_zoo.losses import compute_loss
from hf_zoo.metrics import accuracy, count_confusions, macro_f1, matthews_correlation
from hf_zoo.population import Member
from hf_zoo.recipe.schema import AugmentationSpec, DataSpec, ObjectiveSpec

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

TOP = 5
TOP_FROM_CLASSES = 10  # with fewer classes the five best say little
MAX_LOG_PERPLEXITY = 100.0  # a diverged model's perplexity stays a number that JSON can hold


def evaluate_model(
    model: torch.nn.Module,
    table: Table,
    collator: Collator,
    objective: ObjectiveSpec,
    batch_size: int,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    num_samples: int | None = None,
) -> dict[str, float]:
    """Measure a model on every sample of a table, the last partial batch included.

    Losses are means over samples, over masked tokens or over anchors, so they do not depend on the batch size;
    contrastive ones do, since a batch is what an image has to be told apart from: samples are therefore dealt to
    batches of almost equal size, at most `batch_size`, instead of leaving a small one for the end.

    Args:
        model: Returns `logits`. Its training mode is put back afterwards.
        table: The samples.
        collator: Makes their clean batches.
        objective: What was learned.
        batch_size: Samples a forward pass.
        device: Where the model is; null asks the model.
        accelerator: Shares the samples among the processes of a distributed run and adds their sums up; every process
            gets the same answer.
        num_samples: Measure only the first ones; null for all.

    Returns:
        `loss`, and for classification `accuracy`, `f1`, `matthews_correlation` and, from 10 classes of images on,
        `top5`; for `masked_lm` `accuracy` and `perplexity`; for `contrastive` `top1`, `top5` and `mean_rank`.

    Raises:
        DataError: If the table is empty.
    """
    if not len(table):
        raise DataError("there are no samples to evaluate on")
    autocast = accelerator.autocast() if accelerator is not None else nullcontext()
    batches = _batches(min(len(table), num_samples or len(table)), batch_size)
    if accelerator is not None and not 1 < accelerator.num_processes <= len(batches):
        accelerator = None  # nothing to share: every process measures everything
    if accelerator is not None:
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    tally = _Tally(objective, isinstance(table, ImageTable))
    with autocast:
        for batch, logits in _forward(model, table, collator, batches, device):
            tally.add(logits, batch.get("labels"))
    sums = tally.sums()
    if accelerator is not None:
        packed = torch.from_numpy(np.concatenate([value.ravel() for value in sums.values()])).to(accelerator.device)
        ends = np.cumsum([value.size for value in sums.values()])
        parts = np.split(accelerator.reduce(packed).cpu().numpy(), ends[:-1])
        sums = {name: part.reshape(sums[name].shape) for name, part in zip(sums, parts, strict=True)}
    return tally.metrics(sums)


def predict(
    model: torch.nn.Module,
    table: Table,
    collator: Collator,
    batch_size: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a model's logits for every sample of a table, in order.

    Args:
        model: Returns `logits`, one row a sample.
        table: The samples.
        collator: Makes their clean batches.
        batch_size: Samples a forward pass.
        device: Where the model is; null asks the model.

    Returns:
        Float32 on the CPU, (N, C).
    """
    batches = _batches(len(table), batch_size)
    return torch.cat([logits.float().cpu() for _, logits in _forward(model, table, collator, batches, device)])


def evaluate_member(
    member: Member | Path | str,
    data: DataSpec,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a member, through its stock Auto class and its own processor, on the held-out splits of some data.

    The data's classes are matched to the model's by name where the model names them.

    Args:
        member: A member, its folder or its repo.
        data: What to measure it on.
        batch_size: Samples a forward pass.
        device: Where to compute; null takes the CPU.
        revision: A snapshot; null for the last state.

    Returns:
        Metrics of `validation` and `test`, those of the two there are.

    Raises:
        DataError: If the data is not what the member's objective needs, or its classes are not the model's.
        PopulationError: If there is no such member or snapshot.
    """
    member = member if isinstance(member, Member) else Member.open(member)
    objective = objective_of(member)
    model = member.load(revision)
    model.to(torch.device(device or "cpu"))  # type: ignore[arg-type]
    processor = load_processor(member.path(revision), objective)
    splits = load_splits(data)
    columns = find_columns(splits.train, data, NEEDS[objective.name])
    labels: tuple[str, ...] = ()
    if columns.label is not None:
        labels = match_labels(
            model, label_names(splits.train, columns.label, f"{data.path}, split train"), str(member)
        )
    metrics = {}
    for name, split in splits.items():
        if name != "train":
            table = build_table(split, columns, data, processor, labels, name)
            collator = build_collator(objective, table, processor, len(labels), data.split_seed, AugmentationSpec())
            metrics[name] = evaluate_model(model, table, collator, objective, batch_size, device)
    return metrics


def objective_of(member: Member) -> ObjectiveSpec:
    """Return what a member was trained for, with its settings.

    Raises:
        DataError: If its manifest does not say.
    """
    if member.manifest.objective is None:
        raise DataError(f"{member}: its manifest names no objective, so it cannot be evaluated")
    recipe = member.manifest.recipe.get("objective")
    return ObjectiveSpec(**recipe) if recipe else ObjectiveSpec(name=member.manifest.objective)  # type: ignore[arg-type]


def load_processor(folder: Path, objective: ObjectiveSpec) -> Any:
    """Load the tokenizer or image processor in a member's folder.

    Raises:
        DataError: If there is none.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    auto_class = AutoTokenizer if "text" in NEEDS[objective.name] else AutoImageProcessor
    try:
        return auto_class.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no {auto_class.__name__[4:]} can be loaded from it: {error}") from error


def match_labels(model: PreTrainedModel, labels: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Return the names of the data's classes in the order of the model's outputs.

    Args:
        model: Its config names its outputs, or has the library's `LABEL_0`, `LABEL_1`.
        labels: The data's classes.
        source: Whose the model is, for the error.

    Raises:
        DataError: If they are not the same classes.
    """
    id2label = getattr(model.config, "id2label", None) or {}
    own = tuple(str(id2label[index]) for index in sorted(id2label))
    if len(own) == len(labels) and (set(own) == set(labels) or all(re.fullmatch(r"LABEL_\d+", name) for name in own)):
        return own if set(own) == set(labels) else labels
    raise DataError(
        f"{source} tells {len(own)} classes apart ({', '.join(own)}), the data has {len(labels)} ({', '.join(labels)})"
    )


class _Tally:
    """Sums of one evaluation."""

    def __init__(self, objective: ObjectiveSpec, of_images: bool) -> None:
        self.objective = objective
        self.of_images = of_images
        self.classifies = objective.name in ("image_classification", "sequence_classification")
        self.parts: dict[str, list[Tensor]] = {}
        self.num_classes = 0

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        """Add a batch; nothing waits for the device here."""
        output = compute_loss(self.objective, logits, labels, statistics=not self.classifies)
        found = {"loss": output.loss_sum, "weight": output.weight, **output.statistics}
        if self.classifies:
            assert labels is not None, "compute_loss refuses batches without labels"
            self.num_classes = logits.shape[-1]
            found |= {"predictions": logits.argmax(-1), "references": labels}
            if self.of_images and self.num_classes >= TOP_FROM_CLASSES:
                own = logits.gather(1, labels[:, None])
                found["top5"] = ((logits >= own).sum(1) <= TOP).sum()
        for name, value in found.items():
            self.parts.setdefault(name, []).append(value.detach().reshape(-1))

    def sums(self) -> dict[str, np.ndarray]:
        """Return what adds up over processes, in float64."""
        joined = {name: torch.cat(values).cpu().numpy() for name, values in self.parts.items()}
        if self.classifies and joined:
            predictions, references = joined.pop("predictions"), joined.pop("references")
            confusions = count_confusions(predictions, references, self.num_classes)
            return {"confusions": confusions.astype(np.float64), **self._added(joined)}
        return self._added(joined)

    def metrics(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the means."""
        means = {
            name: float(value / sums["weight"]) for name, value in sums.items() if name not in ("confusions", "weight")
        }
        if "confusions" in sums:
            confusions = sums["confusions"]
            means["accuracy"] = accuracy(confusions)
            means["f1"] = macro_f1(confusions)
            means["matthews_correlation"] = matthews_correlation(confusions)
        if self.objective.name == "masked_lm":
            means["perplexity"] = math.exp(min(means["loss"], MAX_LOG_PERPLEXITY))
        return means

    @staticmethod
    def _added(joined: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(value.astype(np.float64).sum()) for name, value in joined.items()}


def _batches(num_samples: int, batch_size: int) -> list[np.ndarray]:
    """Deal samples in order to as few batches as there can be, of sizes as equal as they can be."""
    return np.array_split(np.arange(num_samples), math.ceil(num_samples / batch_size))


def _forward(
    model: torch.nn.Module,
    table: Table,
    collator: Collator,
    batches: list[np.ndarray],
    device: torch.device | str | None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield every batch, on the model's device, with its logits; the model evaluates meanwhile."""
    device = device or next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for indices in batches:
            batch = collator([table[int(index)] for index in indices])
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            with torch.no_grad():
                outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
            yield batch, outputs.logits
    finally:
        for module, mode in modes:
            module.training = mode
