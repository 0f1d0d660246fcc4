"""A member's statistics on its own training split: streamed, kept while they grow, and put beside its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.curvature.fisher import DiagonalFisher
from hf_zoo.curvature.gram import GramMatrices
from hf_zoo.curvature.likelihoods import CLASSES, GAUSSIAN, Estimator, likelihood_of
from hf_zoo.curvature.saved import (
    DTYPES,
    STATISTICS_FOLDER,
    check_covers,
    fisher_on_disk,
    gram_on_disk,
    note_in_manifest,
    read_description,
    summarise,
    trace_of,
    write_statistics,
)
from hf_zoo.data.columns import NEEDS, find_columns, label_names
from hf_zoo.data.sources import load_splits
from hf_zoo.data.tables import Collator, Table, build_collator, build_table
from hf_zoo.data.texts import TextTable
from hf_zoo.errors import DataError, PopulationError
from hf_zoo.evaluation import load_processor, match_labels, objective_of
from hf_zoo.files import sha256_of, weights_digest
from hf_zoo.folders import new_folder
from hf_zoo.population import POPULATION_FILE, Member, Population, Reference
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.grid import to_plain, without_root
from hf_zoo.recipe.schema import AugmentationSpec, DataSpec, ObjectiveSpec
from hf_zoo.recipe.statistics import StatisticsSpec
from hf_zoo.shards import WEIGHTS_FILE, TensorInfo, write_weights
from hf_zoo.structure import class_of
from hf_zoo.versions import installed_versions

logger = logging.getLogger(__name__)

STATE_FOLDER = ".curvature"  # hidden, so never published
STATE_FILE = "state.json"
SAVE_EVERY_SECONDS = 30.0
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Examples:
    """What a member's statistics are taken over.

    Attributes:
        table: The samples.
        collator: Makes their clean batches.
        batches: The samples of each batch, texts of like length together: padding costs and means nothing.
        objective: What the member was trained for.
        description: Of the data, for the manifest.
    """

    table: Table
    collator: Collator
    batches: list[np.ndarray]
    objective: ObjectiveSpec
    description: dict[str, Any]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)


def measure_member(
    member: Member | Path | str,
    spec: StatisticsSpec,
    *,
    data: DataSpec | None = None,
    device: torch.device | str | None = None,
    output: Path | None = None,
    revision: str | None = None,
    report: Report | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
) -> list[dict[str, Any]]:
    """Measure a member's statistics and put them into its `statistics/`, or find them there already.

    Killed at any moment, the same call goes on from what it last saved and comes to the same bytes.

    Args:
        member: A member, its folder or its repo.
        spec: What to measure.
        data: What to measure it on; null for the training split its manifest names.
        device: Where to compute; null takes the CPU.
        output: Folder that gets `statistics/`; null for the one with the weights.
        revision: A snapshot; null for the last state.
        report: Called with the kind, examples done and in all.
        save_every_seconds: How often the state is saved.

    Returns:
        The description of each kind, as in `statistics/KIND.json`.

    Raises:
        DataError: If the data cannot be found or is not the member's.
        ModelError: If the model's gradients cannot be taken apart by example.
        PopulationError: If there is no such member, or it lies on a Hub and no `output` is given.
    """
    member = member if isinstance(member, Member) else Member.open(member)
    place = member.path(revision)
    folder = output or place
    if output is None and member.folder is None:
        raise PopulationError(f"{member}: lies on a Hub and cannot be written to: set `output` to a folder")
    weights = weights_digest(place)
    objective = objective_of(member)
    estimator = estimator_of(spec, objective.name)
    data = data or own_data(member)
    kinds = tuple(dict.fromkeys(spec.kinds))
    identities = {kind: _identity(kind, spec, estimator, weights, data) for kind in kinds}
    found = {kind: _finished(folder, kind, identities[kind]) for kind in kinds}
    waiting = [kind for kind in kinds if found[kind] is None]
    if waiting:
        model = load_whole(member, revision)
        examples = open_examples(member, model, data, objective, spec)
        for kind in waiting:
            job = _Job(kind, folder, examples, model, estimator, spec, device, identities[kind])
            job.run(report, save_every_seconds)
            tensors, description = job.result(weights)
            check_covers(place, tensors, kind)
            write_statistics(folder, kind, tensors, description)
            job.forget()
    descriptions = [read_description(folder, kind) or {} for kind in kinds]
    if output is None and revision is None and (manifest := note_in_manifest(folder, descriptions)) is not None:
        from hf_zoo.hub.cards import CARD_FILE, write_card

        if manifest.status == "finished" and (folder / CARD_FILE).is_file():
            write_card(folder, manifest=manifest)
    return descriptions


def estimator_of(spec: StatisticsSpec, objective: str) -> Estimator:
    """Return the estimator a recipe asks for; by default exact, for token objectives sampled."""
    kind = spec.estimator
    if kind is None:
        whole = objective != "contrastive" and likelihood_of(objective) in (CLASSES, GAUSSIAN) and spec.per_example
        kind = "exact" if whole else "sampled"
    return Estimator(kind, spec.num_samples, spec.seed)


def own_data(member: Member) -> DataSpec:
    """Return the data a member's manifest says it was trained on.

    Raises:
        DataError: If it says none.
    """
    content = member.manifest.recipe.get("data")
    if content is None:
        raise DataError(f"{member}: its manifest does not say what it was trained on: set `data`")
    return bind(content, DataSpec, f"{member}: zoo.json", "data")


def load_whole(member: Member, revision: str | None = None) -> PreTrainedModel:
    """Return a member's stock model; an adapter's on its base, as one whole."""
    if member.manifest.library != "peft":
        return member.load(revision)
    model_class, config = class_of(member.path(revision))
    loaded: Any = model_class.from_pretrained(None, config=config, state_dict=dict(member.tensors(revision)))
    return loaded


def open_examples(
    member: Member, model: PreTrainedModel, data: DataSpec, objective: ObjectiveSpec, spec: StatisticsSpec
) -> Examples:
    """Load the training split a member's statistics are taken over, without augmentation.

    Raises:
        DataError: If the data is not what the member's objective needs, or its classes are not the model's.
    """
    splits = load_splits(data)
    columns = find_columns(splits.train, data, NEEDS[objective.name])
    processor = load_processor(member.path(), objective)
    labels: tuple[str, ...] = ()
    if columns.label is not None:
        names = label_names(splits.train, columns.label, f"{data.path}, split train")
        labels = match_labels(model, names, str(member))
    table = build_table(splits.train, columns, data, processor, labels, "train")
    collator = build_collator(objective, table, processor, len(labels), data.split_seed, AugmentationSpec())
    chosen = np.arange(len(table))
    if spec.max_examples is not None and spec.max_examples < len(table):
        key = int.from_bytes(hashlib.sha256(f"{spec.seed}/curvature".encode()).digest()[:16], "big")
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(table))
        chosen = np.sort(order[: spec.max_examples])
    if isinstance(table, TextTable):
        lengths = (table.offsets[1:] - table.offsets[:-1]).numpy()
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    batches = [chosen[start : start + spec.batch_size] for start in range(0, len(chosen), spec.batch_size)]
    return Examples(table, collator, batches, objective, splits.description)


class _Job:
    """One kind of statistics of one member, in the making."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        examples: Examples,
        model: PreTrainedModel,
        estimator: Estimator,
        spec: StatisticsSpec,
        device: torch.device | str | None,
        identity: str,
    ) -> None:
        self.kind, self.examples, self.model, self.estimator, self.spec = kind, examples, model, estimator, spec
        self.folder, self.identity = folder, identity
        self.states = folder / STATE_FOLDER / kind
        options: dict[str, Any] = {"dtype": DTYPES[spec.dtype], "device": device or "cpu"}
        self.work: DiagonalFisher | GramMatrices
        if kind == "fisher":
            name = examples.objective.name
            self.work = DiagonalFisher(model, name, estimator, per_example=spec.per_example, **options)
        else:
            self.work = GramMatrices(model, **options)

    def run(self, report: Report | None, save_every_seconds: float) -> None:
        """Go through the batches from where the last saved state stands."""
        done = self._resume()
        saved = time.monotonic()
        for place, indices in enumerate(self.examples.batches):
            if place < done:
                continue
            batch = self.examples.collator([self.examples.table[int(index)] for index in indices])
            self.work.add(batch, indices)
            if report is not None:
                report(self.kind, self.work.num_examples, len(self.examples))
            if time.monotonic() - saved >= save_every_seconds and place + 1 < len(self.examples.batches):
                self._save(place + 1)
                saved = time.monotonic()

    def result(self, weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors by their names on disk, and what they are."""
        spec = self.spec
        description: dict[str, Any] = {
            "num_examples": self.work.num_examples,
            "reduction": "mean",
            "model_sha256": weights,
            "dataset": self.examples.description,
            "seed": spec.seed,
            "dtype": spec.dtype,
            "objective": self.examples.objective.name,
            "digest": self.identity,
            "versions": installed_versions(),
        }
        if isinstance(self.work, DiagonalFisher):
            tensors = fisher_on_disk(self.model, {name: value.cpu() for name, value in self.work.mean().items()})
            description |= {"estimator": self.estimator.kind, "per_example": spec.per_example}
            if self.estimator.kind == "sampled":
                description["num_samples_per_example"] = self.estimator.num_samples
            if likelihood_of(self.examples.objective.name) not in (CLASSES, GAUSSIAN):
                description["example"] = "a sequence: the log-likelihood is the sum over its predicted tokens"
        else:
            gram = {name: value.cpu() for name, value in self.work.mean().items()}
            tensors, rows, left_out = gram_on_disk(self.model, gram, self.work.rows)
            description |= {"rows": rows, "left_out": left_out}
        return tensors, description | {"trace": trace_of(self.kind, tensors), "tensors": summarise(tensors)}

    def forget(self) -> None:
        """Remove the saved states."""
        shutil.rmtree(self.states, ignore_errors=True)
        parent = self.states.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

    def _save(self, done: int) -> None:
        """Save sums and progress as one folder, whole or not at all, then drop the one before."""
        layout = {name: TensorInfo.of(total) for name, total in self.work.sums.items()}
        target = self.states / f"state-{done:08d}"
        if target.exists():
            shutil.rmtree(target)
        with new_folder(target) as folder:
            write_weights(folder, self.work.sums.items(), layout, max_shard_bytes=1 << 62)
            state = {"digest": self.identity, "done": done, "num_examples": self.work.num_examples}
            if isinstance(self.work, GramMatrices):
                state["rows"] = self.work.rows
            (folder / STATE_FILE).write_text(json.dumps(state))
        for old in self._saved():
            if old != target:
                shutil.rmtree(old)

    def _resume(self) -> int:
        """Take up the last saved state of this very job and return how many batches it holds."""
        for path in self._saved()[::-1]:
            state = json.loads((path / STATE_FILE).read_text())
            if state["digest"] != self.identity:
                continue
            reader = CheckpointReader.open(path)
            for name, total in self.work.sums.items():
                total.copy_(reader[name])
            self.work.num_examples = state["num_examples"]
            if isinstance(self.work, GramMatrices):
                self.work.rows = {name: int(state["rows"][name]) for name in self.work.sums}
            logger.info("going on from %s", path)
            return state["done"]
        return 0

    def _saved(self) -> list[Path]:
        found = self.states.glob("state-*") if self.states.is_dir() else iter(())
        return sorted(path for path in found if (path / STATE_FILE).is_file() and (path / WEIGHTS_FILE).is_file())


def _identity(kind: str, spec: StatisticsSpec, estimator: Estimator, weights: str, data: DataSpec) -> str:
    """Return a SHA-256 of everything a kind of statistics depends on; Gram matrices know no estimator."""
    said: dict[str, Any] = to_plain(dataclasses.replace(spec, kinds=(), estimator=None))
    said = {key: said[key] for key in (field.name for field in dataclasses.fields(StatisticsSpec))}
    said["estimator"] = dataclasses.asdict(estimator)
    if kind == "gram":
        for key in ("estimator", "num_samples", "per_example"):
            said.pop(key)
    content = {
        "kind": kind,
        "spec": said,
        "weights": weights,
        "data": to_plain(data) | {"path": without_root(data.path)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path, kind: str, identity: str) -> Mapping[str, Any] | None:
    """Return the description of finished statistics, if they are these and whole."""
    description = read_description(folder, kind)
    path = folder / STATISTICS_FOLDER / f"{kind}.safetensors"
    if description is None or description.get("digest") != identity or not path.is_file():
        return None
    return description if sha256_of(path) == description.get("sha256") else None


def members_of(where: str) -> Iterator[tuple[Member, str | None]]:
    """Yield a member, or every finished member of a population, by folder or repo, and the snapshot that is meant.

    Raises:
        PopulationError: If there is no such member, or none has finished.
    """
    reference = Reference.parse(where)
    if reference.subfolder is not None:
        raise PopulationError(f"{where}: statistics are measured of members, not of a merge's sub-folder")
    if (Path(where) / POPULATION_FILE).is_file():
        population = Population.open(where)
        finished = [member for member in population if member.manifest.status == "finished"]
        if not finished:
            raise PopulationError(f"{where}: none of its members has finished: train them first")
        yield from ((member, None) for member in finished)
    elif reference.is_local:
        yield Member.open(reference.where), reference.revision
    else:
        yield Member.open(where), None
