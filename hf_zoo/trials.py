"""A task's held-out data, loaded once, on which members, candidates and the finished merge are measured alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zoo.auto import model_of
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.data.columns import NEEDS, find_columns, label_names
from hf_zoo.data.sources import load_splits
from hf_zoo.data.tables import Collator, Table, build_collator, build_table
from hf_zoo.errors import MergeError
from hf_zoo.evaluation import evaluate_model, load_processor, match_labels, objective_of
from hf_zoo.finding import main_score
from hf_zoo.functional import Anatomy, Network
from hf_zoo.ingredients import Ingredient
from hf_zoo.joining import task_reader
from hf_zoo.losses import compute_loss
from hf_zoo.population import Member
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.schema import AugmentationSpec, DataSpec, ObjectiveSpec
from hf_zoo.structure import class_of, skeleton

CHOOSING_SPLIT = "validation"


@dataclass(frozen=True)
class Trial:
    """A task's held-out data, ready to measure models of one kind.

    Attributes:
        task: The task.
        members: Its members; the first one's class, config and processor are used.
        objective: What they learned.
        description: Of the data, for the manifest.
        tables: Split -> samples, without the training split.
        collators: Split -> what makes its batches.
        batch_size: Samples a forward pass.
        device: Where to compute.
    """

    task: str
    members: tuple[Ingredient, ...]
    objective: ObjectiveSpec
    description: dict[str, Any]
    tables: dict[str, Table]
    collators: dict[str, Collator]
    batch_size: int
    device: str

    @classmethod
    def open(
        cls,
        task: str,
        members: Sequence[Ingredient],
        spec: DataSpec | None,
        batch_size: int,
        num_eval: int | None,
        with_test: bool = True,
    ) -> Trial:
        """Load a task's held-out data.

        Args:
            task: The task.
            members: Its members.
            spec: Its data; null for what its first member was trained on.
            batch_size: Samples a forward pass.
            num_eval: Use only this many samples of each split; null for the spec's own choice.
            with_test: Load the test split too; a search does without.

        Raises:
            MergeError: If it is not known what to measure the task on.
            DataError: If the data is not what the task needs.
        """
        first = members[0]
        manifest = first.manifest
        if manifest is None or manifest.objective is None:
            raise MergeError(
                f"{first.reference}: no manifest says what it learned, so it cannot be measured: set `evaluate: false`"
            )
        if spec is None:  # a shared head is measured on what each task's own member learned, not the first one
            spec = _own_data(next((member for member in members if member.task == task), first), task)
        if num_eval is not None:
            spec = dataclasses.replace(spec, num_eval=num_eval)
        if not with_test:
            spec = dataclasses.replace(spec, test_split=None)
        objective = objective_of(Member(manifest, folder=first.folder))
        splits = load_splits(spec)
        columns = find_columns(splits.train, spec, NEEDS[objective.name])
        labels: tuple[str, ...] = ()
        if columns.label is not None:
            named = label_names(splits.train, columns.label, f"{spec.path}, split train")
            labels = match_labels(skeleton(*class_of(first.folder)), named, str(first.reference))
        processor = load_processor(first.folder, objective)
        if columns.text is not None and spec.max_length > processor.model_max_length:
            spec = dataclasses.replace(spec, max_length=processor.model_max_length)  # the members read no more
        held_out = {name: split for name, split in splits.items() if name != "train"}
        tables = {n: build_table(s, columns, spec, processor, labels, n) for n, s in held_out.items()}
        collators = {
            name: build_collator(objective, table, processor, len(labels), spec.split_seed, AugmentationSpec())
            for name, table in tables.items()
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        description = splits.description | {"labels": list(labels)}
        return cls(task, tuple(members), objective, description, tables, collators, batch_size, device)

    def model(self, tensors: CheckpointReader) -> PreTrainedModel:
        """Build the task's model of tensors under its members' own names.

        Raises:
            ModelError: If a tensor is missing or left over.
        """
        return model_of(*class_of(self.members[0].folder), dict(tensors.items()))

    def measure(self, tensors: CheckpointReader) -> dict[str, float]:
        """Return the metrics of a model on every held-out split, as `SPLIT_METRIC`."""
        model = self.model(tensors).to(torch.device(self.device))  # type: ignore[arg-type]
        return {
            f"{split}_{metric}": value
            for split in self.tables
            for metric, value in self._metrics(model, split).items()
        }

    def score(self, tensors: CheckpointReader) -> float:
        """Return how good a model is on the validation split, larger is better.

        Raises:
            MergeError: If the data has no validation split.
        """
        self.check_validation()
        model = self.model(tensors).to(torch.device(self.device))  # type: ignore[arg-type]
        return main_score(self._metrics(model, CHOOSING_SPLIT))

    def check_validation(self) -> None:
        """Refuse data that nothing can be chosen by or learned from.

        Raises:
            MergeError: If the data has no validation split.
        """
        if CHOOSING_SPLIT not in self.tables:
            raise MergeError(
                f"{self.task}: its data has no validation split to choose by; the test split is never used for a "
                "choice: set `validation_split` or `validation_fraction`"
            )

    @property
    def num_validation(self) -> int:
        """Samples of the validation split."""
        return len(self.tables[CHOOSING_SPLIT])

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield the validation split once, on the trial's device.

        Args:
            batch_size: Samples a batch; the last one may hold fewer.
            generator: Draws the order; null keeps that of the data.
        """
        table, collator = self.tables[CHOOSING_SPLIT], self.collators[CHOOSING_SPLIT]
        count = len(table)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for part in order.split(batch_size):
            batch = collator([table[index] for index in part.tolist()])
            yield {name: value.to(self.device) for name, value in batch.items()}

    def loss(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean loss of a batch, a scalar that carries the gradient."""
        return compute_loss(self.objective, logits, labels, statistics=False).loss

    def anatomy(self, names: Collection[str]) -> Anatomy:
        """Return what merged tensors are called on disk and in modules.

        Args:
            names: Their names on disk: those of whole members, or of trunks saved alone.
        """
        return Anatomy.of(self.members[0], names)

    def network(self, anatomy: Anatomy) -> Network:
        """Return the task's model, to be called with weights.

        Args:
            anatomy: Of these weights; those of a trunk are joined with the mean head of the task's members.
        """
        first = self.members[0]
        whole = task_reader(self.members, first.trunk) if anatomy.trunk_alone else first.reader
        return Network(self.model(whole), anatomy, self.device)

    def _metrics(self, model: PreTrainedModel, split: str) -> dict[str, float]:
        table, collator = self.tables[split], self.collators[split]
        return evaluate_model(model, table, collator, self.objective, self.batch_size, self.device)


def mean_score(trials: Sequence[Trial], heads_apart: bool) -> Callable[[Mapping[str, Tensor]], float]:
    """Return the mean validation score over tasks, as a function of candidate weights.

    Args:
        trials: The tasks.
        heads_apart: Whether candidates are trunks, to be joined with each task's own head, or whole models.
    """

    def score(tensors: Mapping[str, Tensor]) -> float:
        scores = task_scores(trials, heads_apart, tensors)
        return sum(scores.values()) / len(scores)

    return score


def task_scores(trials: Sequence[Trial], heads_apart: bool, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return task -> validation score of candidate weights, larger is better.

    Args:
        trials: The tasks.
        heads_apart: Whether the candidate is a trunk, to be joined with each task's own head, or a whole model.
        tensors: Its tensors.
    """
    reader = tensors if isinstance(tensors, CheckpointReader) else CheckpointReader.of(tensors, "candidate")
    return {trial.task: trial.score(task_reader(trial.members, reader) if heads_apart else reader) for trial in trials}


def _own_data(member: Ingredient, task: str) -> DataSpec:
    recipe = member.manifest.recipe if member.manifest is not None else {}
    if not isinstance(recipe.get("data"), dict):
        raise MergeError(f"{member.reference}: its manifest does not say its data: give `data.{task}.path`")
    spec = bind(recipe["data"], DataSpec, f"{member.reference}: zoo.json", "data")
    local = member.manifest is not None and member.manifest.dataset.get("source") == "local"
    if local and not Path(spec.path).exists():
        raise MergeError(f"{member.reference}: its data {spec.path!r} is not here: give `data.{task}.path`")
    return spec
