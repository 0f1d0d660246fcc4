"""The one place that knows which table, processor and collator an objective needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_zoo.data.columns import NEEDS, Columns, check_texts, encode_labels, find_columns, label_names
from hf_zoo.data.images import (
    ImageCollator,
    ImageTable,
    Normalisation,
    decode_images,
    make_image_processor,
    measure_normalisation,
    read_image_processor,
)
from hf_zoo.data.sources import Splits
from hf_zoo.data.texts import (
    ClassificationCollator,
    MaskedCollator,
    TextTable,
    tokenize_documents,
    tokenize_samples,
    train_tokenizer,
)
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import AugmentationSpec, DataSpec, ObjectiveSpec, TokenizerSpec, TrainRecipe

if TYPE_CHECKING:
    import datasets

Table = ImageTable | TextTable
Collator = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Tables:
    """Everything a training run reads.

    Attributes:
        train: Training samples.
        validation: Samples for every choice; null when there are none.
        test: Samples reported at the end; null when there are none.
        train_collator: Makes training batches, with augmentation or masking.
        eval_collators: Split -> what makes its clean batches, the same ones every time; also for `train`.
        processor: Tokenizer or image processor that belongs into the member's folder.
        labels: Names of the classes in the order of their indices; empty where the objective has none.
        normalisation: What images are normalised with; null for text.
    """

    train: Table
    validation: Table | None
    test: Table | None
    train_collator: Collator
    eval_collators: dict[str, Collator]
    processor: Any
    labels: tuple[str, ...] = ()
    normalisation: Normalisation | None = None

    def items(self) -> list[tuple[str, Table]]:
        """Return the tables there are, by split."""
        named = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, table) for name, table in named if table is not None]


def build_tables(recipe: TrainRecipe, splits: Splits, processor: Any = None) -> Tables:
    """Build tables and collators of one member.

    Args:
        recipe: The member's own recipe.
        splits: Its data.
        processor: The parent's tokenizer or image processor. Null loads the recipe's tokenizer or trains one on the
            training texts, or measures the training images.

    Raises:
        DataError: If the data is not what the objective needs.
    """
    from hf_zoo.recipe.grid import seeds_of

    spec, objective = recipe.data, recipe.objective
    columns = find_columns(splits.train, spec, NEEDS[objective.name])
    labels: tuple[str, ...] = ()
    if columns.label is not None:
        labels = label_names(splits.train, columns.label, f"{spec.path}, split train")
    if columns.text is not None:
        processor = processor or make_tokenizer(splits.train, columns, recipe.tokenizer, spec)
    tables = {
        name: build_table(split, columns, spec, processor, labels, name, _num_channels(recipe))
        for name, split in splits.items()
    }
    normalisation = None
    if isinstance(train := tables["train"], ImageTable):
        processor, normalisation = _image_processor(processor, train, spec)
    eval_collators = {
        # The same masks and views for every member, whatever its seeds: their metrics can be compared.
        name: build_collator(objective, table, processor, len(labels), spec.split_seed, recipe.augmentation)
        for name, table in tables.items()
    }
    train_collator = build_collator(
        objective, train, processor, len(labels), seeds_of(recipe)["augmentation"], recipe.augmentation, train=True
    )
    return Tables(
        train=train,
        validation=tables.get("validation"),
        test=tables.get("test"),
        train_collator=train_collator,
        eval_collators=eval_collators,
        processor=processor,
        labels=labels,
        normalisation=normalisation,
    )


def build_table(
    dataset: datasets.Dataset,
    columns: Columns,
    spec: DataSpec,
    processor: Any,
    labels: Sequence[str],
    split: str,
    num_channels: int | None = None,
) -> Table:
    """Decode or tokenise one split.

    Args:
        dataset: Its samples.
        columns: The columns in use. A text without label is read as a document.
        spec: The data's part of the recipe.
        processor: A tokenizer for texts; for images a processor whose size and channels are taken, or null.
        labels: Names of the classes.
        split: Its name, for errors.
        num_channels: Channels of images without a processor, 1 or 3; null takes what they have.

    Raises:
        DataError: If a sample is not what it should be.
    """
    source = f"{spec.path}, split {split}"
    encoded = None if columns.label is None else encode_labels(dataset, columns.label, labels, source)
    if columns.image is not None:
        size = spec.image_size
        if processor is not None:
            normalisation, own_size = read_image_processor(processor)
            size, num_channels = size or own_size, len(normalisation.mean)
        images = decode_images(dataset, columns.image, source, size, num_channels)
        return ImageTable(images, None if encoded is None else torch.from_numpy(encoded))
    assert columns.text is not None, "every objective reads an image or a text"
    texts = dataset[columns.text][:]
    check_texts(texts, columns.text, source)
    if columns.label is None:
        return tokenize_documents(texts, processor, spec.max_length)
    pairs = None
    if columns.text_pair is not None:
        pairs = dataset[columns.text_pair][:]
        check_texts(pairs, columns.text_pair, source)
    return tokenize_samples(texts, pairs, encoded, processor, spec.max_length)


def build_collator(
    objective: ObjectiveSpec,
    table: Table,
    processor: Any,
    num_classes: int,
    seed: int,
    augmentation: AugmentationSpec,
    train: bool = False,
) -> Collator:
    """Build what makes batches of a table.

    Args:
        objective: What is learned.
        table: The samples.
        processor: The tokenizer or image processor.
        num_classes: Number of classes, for soft targets.
        seed: Seed of augmentation, masking and views.
        augmentation: Random changes of images: of training images, and of contrastive views always.
        train: Whether the batches are trained on.
    """
    if isinstance(table, ImageTable):
        normalisation, _ = read_image_processor(processor)
        views = 2 if objective.name == "contrastive" else 1
        return ImageCollator(table, augmentation, normalisation, num_classes, seed, train, views)
    if objective.name == "masked_lm":
        return MaskedCollator(processor, objective.mlm_probability, seed, train)
    return ClassificationCollator(processor)


def make_tokenizer(dataset: datasets.Dataset, columns: Columns, tokenizer: TokenizerSpec, spec: DataSpec) -> Any:
    """Load the recipe's tokenizer, or train one on the training texts.

    Args:
        dataset: The training samples.
        columns: Their columns.
        tokenizer: The tokenizer's part of the recipe.
        spec: The data's part of the recipe.

    Raises:
        DataError: If the tokenizer cannot be loaded or is not a fast one.
    """
    if tokenizer.path is None:
        texts = [text for name in (columns.text, columns.text_pair) if name is not None for text in dataset[name]]
        check_texts(texts, str(columns.text), spec.path)
        return train_tokenizer(texts, tokenizer, spec.max_length)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer.path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tokenizer.path: no tokenizer can be loaded from {tokenizer.path}: {error}") from error
    if not loaded.is_fast:
        raise DataError(f"tokenizer.path: {tokenizer.path} is no fast tokenizer (it has no tokenizer.json)")
    return loaded


def _image_processor(processor: Any, train: ImageTable, spec: DataSpec) -> tuple[Any, Normalisation]:
    """Return the processor that turns a picture into what this table holds, and what it normalises with."""
    if processor is None:
        normalisation = measure_normalisation(train, f"{spec.path}, split train")
    else:
        normalisation, size = read_image_processor(processor)
        if (size, size) == train.size:
            return processor, normalisation
    return make_image_processor(train.size, normalisation), normalisation


def _num_channels(recipe: TrainRecipe) -> int | None:
    """Return the number of channels the recipe's network is told to read, if it is."""
    config = recipe.model.config
    return config.get("num_channels") or (config.get("model_args") or {}).get("in_chans")
