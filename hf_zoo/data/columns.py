"""Which columns of a dataset hold images, texts and labels, and what the labels are called."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zoo.errors import DataError, nearest
from hf_zoo.recipe.schema import DataSpec

if TYPE_CHECKING:
    import datasets

TEXT_NAMES = ("text", "sentence", "content", "document")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "context"),
    ("text", "text_pair"),
    ("text1", "text2"),
)
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels")
NEEDS = {
    "image_classification": frozenset({"image", "label"}),
    "contrastive": frozenset({"image"}),
    "masked_lm": frozenset({"text"}),
    "sequence_classification": frozenset({"text", "label"}),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use; null for those an objective does not need."""

    image: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def find_columns(dataset: datasets.Dataset, spec: DataSpec, needs: Set[str]) -> Columns:
    """Find the columns an objective needs, by the recipe, by their usual names, or by their type.

    Args:
        dataset: Samples; the names and types of its columns are looked at.
        spec: Columns it names are taken as they are.
        needs: Of `image`, `text`, `label`. The second text of a pair is looked for only together with a label, since
            a language model reads single texts.

    Raises:
        DataError: If a column named in the recipe is missing or of the wrong type, none fits, or several do.
    """
    image = _one_column(dataset, spec, "image", IMAGE_NAMES) if "image" in needs else None
    label = _one_column(dataset, spec, "label", LABEL_NAMES) if "label" in needs else None
    text = pair = None
    if "text" in needs:
        text, pair = _text_columns(dataset, spec, paired="label" in needs)
    return Columns(image, text, pair, label)


def find_label(dataset: datasets.Dataset, spec: DataSpec) -> str | None:
    """Return the label's column where there is exactly one candidate, else nothing.

    Raises:
        DataError: If the recipe names a column that is not there.
    """
    if spec.label is not None:
        _check_named(dataset, spec, "label")
        return spec.label
    candidates = _candidates(dataset, "label", LABEL_NAMES)
    return candidates[0] if len(candidates) == 1 else None


def label_names(dataset: datasets.Dataset, column: str, source: str) -> tuple[str, ...]:
    """Return the names of the classes in the order of their indices.

    Args:
        dataset: The training samples.
        column: Its label column: `ClassLabel`, or texts, whole numbers or booleans, whose distinct values are sorted.
        source: Whose it is, for errors.

    Raises:
        DataError: If labels are missing, of another type, or all the same.
    """
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    _check_label_type(feature, column, source)
    values = dataset.unique(column)
    if None in values:
        raise DataError(f"{source}: column {column!r} has samples without a label")
    if len(values) < 2:
        raise DataError(f"{source}: every label in column {column!r} is {values[0]!r}: there is nothing to learn")
    return tuple(str(value) for value in sorted(values))


def encode_labels(dataset: datasets.Dataset, column: str, names: Sequence[str], source: str) -> np.ndarray:
    """Return class indices.

    Args:
        dataset: Samples of any split.
        column: Its label column.
        names: Names of the classes, as `label_names` gave them for the training samples.
        source: Whose it is, for errors.

    Returns:
        Int64, (N,), in [0, K).

    Raises:
        DataError: If a label is missing (also the -1 of a test set without labels) or is none of the classes.
    """
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        own = list(feature.names)
    else:
        _check_label_type(feature, column, source)
        own = []
    place = {name: index for index, name in enumerate(names)}
    indices = np.empty(len(dataset), np.int64)
    for row, value in enumerate(dataset.with_format(None)[column][:]):
        if value is None or (own and value == -1):
            raise DataError(
                f"{source}: row {row} has no label in column {column!r} (it is {value}). The test sets of GLUE and "
                "others hide their labels: name another split, or null for data.test_split"
            )
        name = own[value] if own and 0 <= value < len(own) else str(value)
        if name not in place:
            raise DataError(
                f"{source}: label {value!r} in row {row} of column {column!r} is none of the {len(place)} classes "
                f"{', '.join(names)}"
            )
        indices[row] = place[name]
    return indices


def is_label_type(feature: Any) -> bool:
    """Return whether a column's values can be classes: texts, whole numbers or booleans."""
    kind = str(getattr(feature, "dtype", None))
    return kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint"))


def check_texts(texts: Sequence[Any], column: str, source: str) -> None:
    """Check that every sample has a text.

    Raises:
        DataError: If one is missing.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{source}: row {row} of column {column!r} is no text but {text!r}")


def _one_column(dataset: datasets.Dataset, spec: DataSpec, kind: str, usual: Sequence[str]) -> str:
    named = getattr(spec, kind)
    if named is not None:
        _check_named(dataset, spec, kind)
        return named
    candidates = _candidates(dataset, kind, usual)
    if len(candidates) == 1:
        return candidates[0]
    raise _undecided(dataset, spec, kind, candidates)


def _text_columns(dataset: datasets.Dataset, spec: DataSpec, paired: bool) -> tuple[str, str | None]:
    """Return the first text's column, and the second's where the samples are pairs."""
    if spec.text_pair is not None:
        _check_named(dataset, spec, "text_pair")
        if spec.text is None:
            raise DataError(
                f"{spec.path}: data.text_pair is {spec.text_pair!r}: name the first text too, as data.text"
            )
    if spec.text is not None:
        _check_named(dataset, spec, "text")
        return spec.text, spec.text_pair
    strings = [name for name in dataset.column_names if _is_kind(dataset.features[name], "text")]
    pairs = [pair for pair in PAIR_NAMES if set(pair) <= set(strings)] if paired else []
    single = [name for name in TEXT_NAMES if name in strings and not any(name in pair for pair in pairs)]
    if len(pairs) == 1 and not single:
        return pairs[0]
    if pairs:
        raise _undecided(dataset, spec, "text", ["/".join(pair) for pair in pairs] + single)
    candidates = single or strings
    if len(candidates) == 1:
        return candidates[0], None
    raise _undecided(dataset, spec, "text", candidates)


def _candidates(dataset: datasets.Dataset, kind: str, usual: Sequence[str]) -> list[str]:
    """Return columns of a usual name, else those whose type says what they are."""
    named = [name for name in usual if name in dataset.column_names]
    if named:
        return named
    import datasets

    types = {"image": datasets.Image, "label": datasets.ClassLabel}
    return [name for name, feature in dataset.features.items() if isinstance(feature, types[kind])]


def _check_named(dataset: datasets.Dataset, spec: DataSpec, kind: str) -> None:
    name = getattr(spec, kind)
    columns = dataset.column_names
    if name not in columns:
        raise DataError(
            f"{spec.path}: no column {name!r} (data.{kind}){nearest(name, columns)}: it has {', '.join(columns)}"
        )
    wanted = "text" if kind == "text_pair" else kind
    if not _is_kind(dataset.features[name], wanted):
        raise DataError(f"{spec.path}: column {name!r} (data.{kind}) holds no {wanted} but {dataset.features[name]}")


def _is_kind(feature: Any, kind: str) -> bool:
    import datasets

    if kind == "image":
        return isinstance(feature, datasets.Image)
    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")
    return True  # what a label may be is checked where it is read


def _undecided(dataset: datasets.Dataset, spec: DataSpec, kind: str, candidates: Sequence[str]) -> DataError:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in dataset.features.items())
    if candidates:
        return DataError(
            f"{spec.path}: which column is the {kind}: {' or '.join(candidates)}? Say data.{kind}=COLUMN"
            + (" (and data.text_pair)" if any("/" in name for name in candidates) else "")
        )
    return DataError(f"{spec.path}: no column of {kind}s found: it has {columns}. Say data.{kind}=COLUMN")


def _check_label_type(feature: Any, column: str, source: str) -> None:
    if not is_label_type(feature):
        raise DataError(f"{source}: column {column!r} holds {_type_name(feature)}: a label is a class, text or number")


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
