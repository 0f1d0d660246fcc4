"""What a member needs before its first step: parent, data, processor, model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_zoo.building import Demands, build_model
from hf_zoo.data.images import ImageTable
from hf_zoo.data.sources import Splits, load_splits
from hf_zoo.data.tables import Tables, build_collator, build_tables
from hf_zoo.errors import ModelError, PopulationError
from hf_zoo.files import weights_digest
from hf_zoo.population import MANIFEST_FILE, Manifest, Member, Parent, Reference
from hf_zoo.recipe.grid import seeds_of
from hf_zoo.recipe.schema import DataSpec, TrainRecipe
from hf_zoo.structure import class_of

TEXT_OBJECTIVES = ("masked_lm", "sequence_classification")


@dataclass(frozen=True)
class ParentModel:
    """A model to start from, on this machine.

    Attributes:
        folder: Its weights.
        entry: What the child's manifest says of it.
    """

    folder: Path
    entry: Parent


@dataclass(frozen=True)
class Prepared:
    """A member ready to train.

    Attributes:
        model: The model.
        loading: What came from the parent.
        splits: The data.
        tables: Samples, collators and processor.
        parent: The parent; null for a fresh model.
    """

    model: PreTrainedModel
    loading: dict[str, Any]
    splits: Splits
    tables: Tables
    parent: ParentModel | None


def prepare(recipe: TrainRecipe) -> Prepared:
    """Load data and parent of a member and build its model.

    The data of one `data` section is loaded once for all members of a process.

    Args:
        recipe: The member's own recipe.

    Raises:
        ZooError: If data, parent and model do not fit together.
    """
    parent = resolve_parent(recipe.parent) if recipe.parent is not None else None
    splits = _splits(recipe.data)
    tables = _tables(recipe, splits, parent)
    built = build_model(recipe, demands_of(recipe, tables), parent.folder if parent is not None else None)
    return Prepared(built.model, built.loading, splits, tables, parent)


def resolve_parent(text: str) -> ParentModel:
    """Find a parent, a member or any other saved model, and fetch it where it is on a Hub.

    Args:
        text: A folder or `org/name`, each also with `@revision`.

    Raises:
        PopulationError: If there is no such folder, snapshot or repo.
    """
    reference = Reference.parse(text)
    if reference.is_local:
        root = Path(reference.where)
        manifest = Manifest.read(root) if (root / MANIFEST_FILE).is_file() else None
        if manifest is not None and manifest.status != "finished" and reference.revision is None:
            raise PopulationError(
                f"parent {text}: its training has not finished ({manifest.status}): finish it first, or name one of "
                "its snapshots with @NAME"
            )
        folder = Member(manifest, folder=root).path(reference.revision) if manifest is not None else root
        if manifest is None and reference.revision is not None:
            raise PopulationError(f"parent {text}: a folder without {'zoo.json'} has no revisions")
        name, revision, task = (
            (manifest.name, reference.revision, manifest.task) if manifest else (root.name, None, None)
        )
    else:
        from hf_zoo.hub.client import fetch_repo

        if reference.where.count("/") != 1 or reference.where.startswith(("/", ".", "~")):
            raise PopulationError(
                f"parent {text}: no such folder. Train the parent's population first, or name a repo as org/name"
            )
        folder = fetch_repo(reference.where, reference.revision)
        name, revision, task = reference.where, folder.name, None
        if (folder / MANIFEST_FILE).is_file():
            task = Manifest.read(folder, text).task
    if not (folder / "config.json").is_file():
        raise ModelError(f"parent {text}: {folder} holds no model (no config.json)")
    class_of(folder)  # a config that cannot be read is told as such, before a tokenizer stumbles over it
    return ParentModel(folder, Parent(repo=name, revision=revision, sha256=weights_digest(folder), task=task))


def demands_of(recipe: TrainRecipe, tables: Tables) -> Demands:
    """Return what data and objective ask of the model."""
    if recipe.objective.name in TEXT_OBJECTIVES:
        tokenizer = tables.processor
        return Demands(
            labels=tables.labels,
            num_outputs=len(tables.labels),
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            max_length=recipe.data.max_length,
        )
    contrastive = recipe.objective.name == "contrastive"
    assert isinstance(tables.train, ImageTable)
    assert tables.normalisation is not None
    return Demands(
        labels=() if contrastive else tables.labels,
        num_outputs=recipe.objective.projection_dim if contrastive else len(tables.labels),
        image_size=tables.train.size,
        num_channels=tables.train.num_channels,
        mean=tables.normalisation.mean,
        std=tables.normalisation.std,
    )


@lru_cache(maxsize=4)
def _splits(spec: DataSpec) -> Splits:
    return load_splits(spec)


# What decoding and tokenising depend on -> their result, the last few; members of a population mostly share one.
known_tables: dict[str, Tables] = {}
MAX_KNOWN_TABLES = 4


def _tables(recipe: TrainRecipe, splits: Splits, parent: ParentModel | None) -> Tables:
    """Return a member's tables: samples decoded once for all members that read the same ones, collators of its own."""
    folder = parent.folder if parent is not None else None
    channels = recipe.model.config.get("num_channels"), recipe.model.config.get("model_args")
    key = repr((recipe.data, recipe.tokenizer, recipe.objective, folder, channels))
    if key not in known_tables:
        while len(known_tables) >= MAX_KNOWN_TABLES:
            del known_tables[next(iter(known_tables))]
        known_tables[key] = build_tables(recipe, splits, _processor(recipe, parent))
    shared = known_tables[key]
    make = partial(
        build_collator,
        recipe.objective,
        processor=shared.processor,
        num_classes=len(shared.labels),
        augmentation=recipe.augmentation,
    )
    return dataclasses.replace(
        shared,
        train_collator=make(table=shared.train, seed=seeds_of(recipe)["augmentation"], train=True),
        # The same masks and views for every member, whatever its seeds: their metrics can be compared.
        eval_collators={name: make(table=table, seed=recipe.data.split_seed) for name, table in shared.items()},
    )


def _processor(recipe: TrainRecipe, parent: ParentModel | None) -> Any:
    """Return the tokenizer or image processor the recipe or the parent brings; null when the data makes one."""
    if recipe.objective.name in TEXT_OBJECTIVES:
        if recipe.tokenizer.path is not None:
            if parent is not None:
                _check_vocabulary(recipe.tokenizer.path, parent)
            return None  # the tables load it
        return _tokenizer(parent.folder) if parent is not None else None
    if parent is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(parent.folder)
    except (OSError, ValueError, KeyError):
        return None  # a parent without processor: the data's own mean and size are used


def _check_vocabulary(path: str, parent: ParentModel) -> None:
    """Check that a recipe's tokenizer gives every token the number the parent knows it by."""
    own, known = AutoTokenizer.from_pretrained(path).get_vocab(), _tokenizer(parent.folder).get_vocab()
    if own != known:
        raise ModelError(
            f"tokenizer.path: {path} has another vocabulary ({len(own)} tokens) than the parent {parent.entry.repo} "
            f"({len(known)}): leave it out to take the parent's"
        )


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer can be loaded: set tokenizer.path ({error})") from error
