"""A task's held-out data, loaded once, on which members, candidates and the finished merge are measured alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from hf_zoo.ingredients import Ingredient
from hf_zoo.joining import task_reader
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
        cls, task: str, members: Sequence[Ingredient], spec: DataSpec | None, batch_size: int, num_eval: int | None
    ) -> Trial:
        """Load a task's held-out data.

        Args:
            task: The task.
            members: Its members.
            spec: Its data; null for what the first member was trained on.
            batch_size: Samples a forward pass.
            num_eval: Use only this many samples of each split; null for the spec's own choice.

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
        if spec is None:
            spec = _own_data(first, task)
        if num_eval is not None:
            spec = dataclasses.replace(spec, num_eval=num_eval)
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
        if CHOOSING_SPLIT not in self.tables:
            raise MergeError(
                f"{self.task}: its data has no validation split to choose by; the test split is never used for a "
                "choice: set `validation_split` or `validation_fraction`"
            )
        model = self.model(tensors).to(torch.device(self.device))  # type: ignore[arg-type]
        return main_score(self._metrics(model, CHOOSING_SPLIT))

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
        reader = tensors if isinstance(tensors, CheckpointReader) else CheckpointReader.of(tensors, "candidate")
        scores = [trial.score(task_reader(trial.members, reader) if heads_apart else reader) for trial in trials]
        return sum(scores) / len(scores)

    return score


def _own_data(member: Ingredient, task: str) -> DataSpec:
    recipe = member.manifest.recipe if member.manifest is not None else {}
    if not isinstance(recipe.get("data"), dict):
        raise MergeError(f"{member.reference}: its manifest does not say its data: give `data.{task}.path`")
    spec = bind(recipe["data"], DataSpec, f"{member.reference}: zoo.json", "data")
    local = member.manifest is not None and member.manifest.dataset.get("source") == "local"
    if local and not Path(spec.path).exists():
        raise MergeError(f"{member.reference}: its data {spec.path!r} is not here: give `data.{task}.path`")
    return spec
