"""Metrics as `evaluate.Metric` subclasses that need no download, over plain functions of NumPy arrays."""

# N = samples, C = classes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zoo.errors import DataError, nearest

if TYPE_CHECKING:
    import evaluate

IGNORED = -100


def count_confusions(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often each class was taken for each.

    Args:
        predictions: Predicted classes in [0, C), (N,).
        references: True classes in [0, C), (N,).
        num_classes: C.

    Returns:
        Int64, (C, C); the row is the true class, the column the predicted one.
    """
    flat = np.asarray(references, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(confusions: np.ndarray) -> float:
    """Return the share of hits."""
    return float(np.trace(confusions) / confusions.sum())


def macro_f1(confusions: np.ndarray) -> float:
    """Return the plain mean over classes of the harmonic mean of precision and recall.

    Classes that neither occur nor are predicted are left out of the mean; a class never hit counts 0.
    """
    hits = np.diag(confusions).astype(np.float64)
    occurrences = confusions.sum(0) + confusions.sum(1)
    return float((2 * hits / np.maximum(occurrences, 1))[occurrences > 0].mean())


def matthews_correlation(confusions: np.ndarray) -> float:
    """Return the correlation of predicted and true classes (Gorodkin 2004), 0 where either is constant."""
    counts = confusions.astype(np.float64)
    total, hits = counts.sum(), np.trace(counts)
    true, predicted = counts.sum(1), counts.sum(0)
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float((hits * total - true @ predicted) / np.sqrt(spread)) if spread else 0.0


def top_k_accuracy(scores: np.ndarray, references: np.ndarray, k: int) -> float:
    """Return the share of samples whose true class is among the k of the highest scores; ties count against it.

    Args:
        scores: (N, C).
        references: True classes, (N,).
        k: How many classes count as a hit, at least 1.
    """
    own = np.take_along_axis(scores, np.asarray(references, np.int64)[:, None], axis=1)
    return float(((scores >= own).sum(1) <= k).mean())


def masked_accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of hits among the positions whose reference is not -100.

    Raises:
        DataError: If no position is masked.
    """
    masked = np.asarray(references) != IGNORED
    if not masked.any():
        raise DataError("masked accuracy needs at least one reference other than -100")
    return float((np.asarray(predictions)[masked] == np.asarray(references)[masked]).mean())


def retrieval(ranks: np.ndarray) -> dict[str, float]:
    """Return how often the other view of an image ranked first and among the first five, and its mean rank.

    Args:
        ranks: Rank of each anchor's positive, 1 for the first, (N,).
    """
    ranks = np.asarray(ranks)
    return {
        "top1": float((ranks <= 1).mean()),
        "top5": float((ranks <= 5).mean()),
        "mean_rank": float(ranks.mean()),
    }


@dataclass(frozen=True)
class _Definition:
    """An `evaluate.Metric` to be: its columns, each `int`, `[int]` or `[float]`, and its function."""

    description: str
    columns: dict[str, str]
    compute: Callable[..., dict[str, float]]
    citation: str = ""


def load_metric(name: str, **options: Any) -> evaluate.Metric:
    """Return a metric by name: one of ours, which needs no network, else what `evaluate.load` finds.

    Args:
        name: `accuracy`, `f1`, `matthews_correlation`, `top_k_accuracy`, `masked_accuracy` or `retrieval`, or the
            name of a metric on the Hub or its folder.
        **options: Passed to the metric's constructor.

    Raises:
        DataError: If there is no such metric.
    """
    if name in _DEFINITIONS:
        return _metric_class(name)(keep_in_memory=True, **options)
    import evaluate

    try:
        return evaluate.load(name, **options)
    except (FileNotFoundError, ConnectionError, ModuleNotFoundError) as error:
        raise DataError(
            f"no metric {name!r}{nearest(name, list(_DEFINITIONS))}: hf_zoo has {', '.join(_DEFINITIONS)}, and "
            f"`evaluate` does not find it either: {error}"
        ) from error


def metric_names() -> tuple[str, ...]:
    """Return the names of the metrics that need no network."""
    return tuple(_DEFINITIONS)


@cache
def _metric_class(name: str) -> type[evaluate.Metric]:
    """Make the `evaluate.Metric` of a definition, only when one is asked for: `evaluate` takes seconds to import."""
    import datasets
    import evaluate

    definition = _DEFINITIONS[name]
    kinds = {
        "int": datasets.Value("int64"),
        "[int]": datasets.Sequence(datasets.Value("int64")),
        "[float]": datasets.Sequence(datasets.Value("float64")),
    }

    class ZooMetric(evaluate.Metric):
        """A metric with a NumPy body."""

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=definition.description,
                citation=definition.citation,
                inputs_description="",
                features=datasets.Features({column: kinds[kind] for column, kind in definition.columns.items()}),
            )

        def _compute(self, **columns: Any) -> dict[str, float]:
            return definition.compute(**columns)

    ZooMetric.__name__ = ZooMetric.__qualname__ = "".join(part.capitalize() for part in name.split("_"))
    return ZooMetric


def _confusions_of(predictions: Sequence[int], references: Sequence[int]) -> np.ndarray:
    classes = max(max(predictions), max(references)) + 1
    return count_confusions(np.asarray(predictions), np.asarray(references), classes)


def _compute_masked(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
    flat = [np.concatenate([np.asarray(row) for row in rows]) for rows in (predictions, references)]
    return {"masked_accuracy": masked_accuracy(*flat)}


def _compute_top_k(predictions: Sequence[Sequence[float]], references: Sequence[int], k: int = 5) -> dict[str, float]:
    return {"top_k_accuracy": top_k_accuracy(np.asarray(predictions), np.asarray(references), k)}


_CLASSES = {"predictions": "int", "references": "int"}
_DEFINITIONS = {
    "accuracy": _Definition(
        "Share of predicted classes that are the true ones.",
        _CLASSES,
        lambda predictions, references: {"accuracy": accuracy(_confusions_of(predictions, references))},
    ),
    "f1": _Definition(
        "Mean over classes of the harmonic mean of precision and recall.",
        _CLASSES,
        lambda predictions, references: {"f1": macro_f1(_confusions_of(predictions, references))},
    ),
    "matthews_correlation": _Definition(
        "Correlation of predicted and true classes.",
        _CLASSES,
        lambda predictions, references: {
            "matthews_correlation": matthews_correlation(_confusions_of(predictions, references))
        },
        "Gorodkin (2004), Comparing two K-category assignments by a K-category correlation coefficient.",
    ),
    "top_k_accuracy": _Definition(
        "Share of samples whose true class is among the k (5) of the highest scores.",
        {"predictions": "[float]", "references": "int"},
        _compute_top_k,
    ),
    "masked_accuracy": _Definition(
        "Share of masked tokens, those with a reference other than -100, that were predicted.",
        {"predictions": "[int]", "references": "[int]"},
        _compute_masked,
    ),
    "retrieval": _Definition(
        "How often an image's other view ranked first and among the first five, and its mean rank.",
        {"predictions": "int"},
        lambda predictions: retrieval(np.asarray(predictions)),
    ),
}
