"""Models to merge: found in a folder or on a Hub, opened without reading their weights, and compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, PopulationError
from hf_zoo.files import remembered_sha256, weights_digest
from hf_zoo.population import MANIFEST_FILE, SNAPSHOT_FOLDER, Manifest, Member, Parent, Reference

if TYPE_CHECKING:
    from hf_zoo.structure import Structure

STATISTICS_FOLDER = "statistics"
TOKENIZER_FILE = "tokenizer.json"
NOT_OF_THE_PROCESSOR = frozenset({"config.json", "adapter_config.json", MANIFEST_FILE, "population.json"})
# Indices of weights, and what trainers leave behind: of one member, and not true of a merge.
NOTES_OF_TRAINING = re.compile(r"\.index\.json$|^trainer_state|^training_args|^optimizer|^results|_results\.json$")
PROCESSOR_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py"})


@dataclass(frozen=True)
class Ingredient:
    """A model to merge.

    Attributes:
        reference: How it was named.
        folder: Its files on this machine.
        manifest: What is known of it; null for a model not made by hf_zoo.
        commit: The commit its files are of; null for a folder.
        tensors: Its weights where they are shown under another form than the files have; null for the files' own.
        origin: Where the files of its weights lie, if not in its folder.
        scratch: What keeps a folder made for it as long as it is used.
        measured: Kind -> its statistics, under the form its weights are shown in; null for the files' own.
    """

    reference: Reference
    folder: Path
    manifest: Manifest | None = None
    commit: str | None = None
    tensors: CheckpointReader | None = None
    origin: Path | None = None
    scratch: TemporaryDirectory[str] | None = None
    measured: Mapping[str, CheckpointReader] | None = None

    @cached_property
    def reader(self) -> CheckpointReader:
        """A lazy reader of its weights."""
        return self.tensors or CheckpointReader.open(self.folder, str(self.reference))

    @cached_property
    def structure(self) -> Structure:
        """Its trunk and head; asked for only where they matter, since transformers must be imported for it."""
        from hf_zoo.structure import Structure

        return Structure.read(self.folder)

    @cached_property
    def trunk(self) -> CheckpointReader:
        """A lazy reader of its trunk, under the names of a trunk saved alone."""
        return self.reader.select({alone: own for own, alone in self.structure.trunk.items()})

    @cached_property
    def head(self) -> CheckpointReader:
        """A lazy reader of its head, under its own names."""
        return self.reader.select({name: name for name in self.structure.head})

    def statistics_file(self, kind: str) -> Path | None:
        """Return the file of statistics stored beside its weights; null where there is none."""
        path = (self.origin or self.folder) / STATISTICS_FOLDER / f"{kind}.safetensors"
        return path if path.is_file() else None

    def statistics(self, kind: str) -> CheckpointReader | None:
        """Return statistics stored beside its weights, under the weights' names; null where there are none.

        Args:
            kind: `fisher` or `gram`.

        Raises:
            MergeError: If they were measured on other weights than lie beside them.
        """
        if self.measured is not None:
            return self.measured.get(kind)
        path = self.statistics_file(kind)
        if path is None:
            return None
        described = path.with_suffix(".json")
        measured_on = json.loads(described.read_text()).get("model_sha256") if described.is_file() else None
        if measured_on not in (None, weights_digest(self.origin or self.folder)):
            raise MergeError(
                f"{self.reference}: its {kind} statistics were measured on other weights than lie beside them "
                f"(SHA-256 {str(measured_on)[:12]}...): measure them again with `hf-zoo curvature {self.reference}`"
            )
        return CheckpointReader.of_file(path, f"{self.reference}: {kind}")

    @property
    def num_examples(self) -> float | None:
        """Size of its training set, as its manifest says; null where it does not."""
        samples = {} if self.manifest is None else self.manifest.dataset.get("num_samples") or {}
        return float(samples["train"]) if "train" in samples else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of its `config.json`, for an adapter that of the whole model."""
        path = self.folder / "config.json"
        if path.is_file():
            return json.loads(path.read_text())
        from hf_zoo.structure import class_of

        return json.loads(class_of(self.folder)[1].to_json_string())

    def names_in_order(self, trunk_alone: bool) -> list[str]:
        """Return its tensors' names in the order a sample passes through them; of its trunk as saved alone, or all."""
        structure = self.structure
        return list(structure.trunk.values()) if trunk_alone else [*structure.trunk, *structure.head]

    @property
    def name(self) -> str:
        """`org/name` on a Hub, else the member's or folder's name: never a path."""
        if self.commit is not None:
            return self.reference.where
        if self.manifest is not None:
            return self.manifest.name
        return (self.origin or self.folder).resolve().name if self.reference.is_local else self.reference.where

    @property
    def label(self) -> str:
        """Its name, with revision and sub-folder where it was named with them."""
        return str(Reference(self.name, self.reference.revision, self.reference.subfolder))

    @property
    def task(self) -> str | None:
        """What it can do, as its manifest says."""
        if self.reference.subfolder is not None:
            return self.reference.subfolder
        return self.manifest.task if self.manifest is not None else None

    @property
    def auto_class(self) -> str | None:
        """The Auto class that loads it; null for a class none knows."""
        if self.manifest is not None and self.manifest.auto_class is not None:
            return self.manifest.auto_class
        return _auto_class_by_name(self.config) or self.structure.auto_class

    @cached_property
    def sha256(self) -> str:
        """The hash of its weights file, or of all its shards together."""
        folder = self.origin or self.folder
        if any(folder.glob("*.safetensors")):
            return weights_digest(folder)
        files = CheckpointReader.open(folder, str(self.reference)).files
        return hashlib.sha256("".join(remembered_sha256(path) for path in files).encode()).hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes in order; the library's placeholders where it has none."""
        id2label = self.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        return tuple(str(id2label[key]) for key in sorted(id2label, key=int))

    def parent(self, role: str = "member") -> Parent:
        """Return how a merge's manifest names it."""
        revision = self.commit if self.commit is not None else self.reference.revision
        return Parent(repo=self.name, revision=revision, sha256=self.sha256, role=role, task=self.task)

    def processor_files(self) -> dict[str, Path]:
        """Return the files of its tokenizer or image processor, and of its code, by name."""
        return {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and path.suffix in PROCESSOR_SUFFIXES
            and path.name not in NOT_OF_THE_PROCESSOR
            and not NOTES_OF_TRAINING.search(path.name)
        }


def labels_of(ingredients: Sequence[Ingredient]) -> list[str]:
    """Return models' labels, numbered where several have the same: folders in different places may be called alike."""
    labels = [one.label for one in ingredients]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]


def open_ingredient(text: str | Path | Member) -> Ingredient:
    """Open a model to merge: `WHERE[@REVISION][#SUBFOLDER]`, or a member.

    Args:
        text: A folder or `org/name`, each also with `@revision` and `#subfolder`; or an opened member.

    Raises:
        PopulationError: If there is no such folder, snapshot or sub-folder.
        MergeError: If its config cannot be read, or its weights are quantized.
        HubError: If a Hub does not give it.
    """
    opened = _opened(text)
    path = opened.folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise MergeError(f"{opened.reference}: its config.json cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{opened.reference}: its config.json is no mapping: save the model again")
    if content.get("quantization_config"):
        kind = dict(content["quantization_config"]).get("quant_method", "unknown")
        raise MergeError(
            f"{opened.reference} is quantized ({kind}): its tensors are codes, whose mean is no weight: name "
            "the model it was made from, or save it dequantized"
        )
    return opened


def _opened(text: str | Path | Member) -> Ingredient:
    if isinstance(text, Member):
        where = str(text.folder) if text.folder is not None else str(text.repo)
        return Ingredient(Reference(where), text.path(), text.manifest, text.commit)
    reference = Reference.parse(str(text))
    if reference.is_local:
        folder, commit = Path(reference.where), None
        manifest = Manifest.read(folder) if (folder / MANIFEST_FILE).is_file() else None
        if reference.revision is not None:
            folder = (
                folder / SNAPSHOT_FOLDER / reference.revision
                if manifest is None
                else _snapshot(manifest, folder, reference)
            )
    else:
        folder = _fetch(reference)
        commit = folder.name
        manifest = Manifest.read(folder, reference.where) if (folder / MANIFEST_FILE).is_file() else None
    if reference.subfolder is not None:
        folder = folder / reference.subfolder
    if not folder.is_dir():
        raise PopulationError(f"{reference}: there is no folder {folder.name!r} in {reference.where}")
    if manifest is not None and manifest.status != "finished" and reference.revision is None:
        raise PopulationError(
            f"{reference}: its training has not finished ({manifest.status}): finish it, or name a snapshot"
        )
    return Ingredient(reference, folder, manifest, commit)


def check_one_trunk(ingredients: Sequence[Ingredient]) -> None:
    """Refuse models whose trunks are not of one kind or read different tokens.

    Raises:
        MergeError: Names the two models and what differs.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        if _kind(first) != _kind(other):
            kinds = [one.structure.trunk_architecture for one in (first, other)]
            if kinds[0] != kinds[1]:
                raise MergeError(
                    f"{first.reference} is a {kinds[0]} and {other.reference} a {kinds[1]}: merge models of one kind"
                )
        if _vocabulary(first) != _vocabulary(other):
            raise MergeError(
                f"{first.reference} and {other.reference} have different vocabularies: one row of their embeddings "
                "stands for two different tokens. Say which tokens the merge shall know (`tokenizer: union` or `base`)"
            )


def check_one_label_space(ingredients: Sequence[Ingredient]) -> None:
    """Refuse models whose heads mean different classes; the same ones in another order can be brought into one.

    Raises:
        MergeError: Names the two models and their classes.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        if other.labels != first.labels:
            from hf_zoo.labels import label_order

            label_order(str(first.reference), first.labels, str(other.reference), other.labels)


def _snapshot(manifest: Manifest, folder: Path, reference: Reference) -> Path:
    return Member(manifest, folder=folder).path(reference.revision)


def _fetch(reference: Reference) -> Path:
    from hf_zoo.hub.client import fetch_repo

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", reference.where) or reference.where.startswith("."):
        raise PopulationError(f"{reference}: no such folder, and a repo of a Hub is written org/name")
    return fetch_repo(reference.where, reference.revision)


def _auto_class_by_name(config: Mapping[str, Any]) -> str | None:
    """Return the Auto class a model's class is named for (`AutoModelForMaskedLM` of `XForMaskedLM`), null if none is.

    The library's own naming spares importing it. Whether there is such an Auto class is looked up in its source.
    """
    named = re.fullmatch(r"[A-Z]\w*?For(\w+)", (config.get("architectures") or [""])[0])
    found = find_spec("transformers")
    if named is None or found is None or found.origin is None or config.get("auto_map"):
        return None
    source = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    known = f"class AutoModelFor{named[1]}(" in source.read_text(encoding="utf-8") if source.is_file() else False
    return f"AutoModelFor{named[1]}" if known else None


def _kind(ingredient: Ingredient) -> tuple[Any, Any]:
    """Return what its config calls it: equal for models of one class, also without transformers imported."""
    config = ingredient.config
    return config.get("model_type"), config.get("architectures")


def _vocabulary(ingredient: Ingredient) -> Mapping[str, Any] | None:
    path = ingredient.folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    pieces = model.get("vocab") or ()
    known = set(pieces) if isinstance(pieces, dict) else {piece for piece, _ in pieces}
    # Tokens put on top have rows too, and members that were each given one have theirs at the same place.
    added = {one["content"]: one["id"] for one in content.get("added_tokens") or () if one["content"] not in known}
    return {key: model.get(key) for key in ("type", "vocab", "merges")} | {"added": added}
