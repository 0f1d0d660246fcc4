"""The ranges of single values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_zoo.recipe.binding import Mistake, overlap
from hf_zoo.recipe.schema import MergeRecipe


@dataclass(frozen=True)
class Interval:
    """The values a number may have, and how to say so."""

    low: float
    high: float = math.inf
    opens: str = "[]"

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        above = value > self.low if self.opens[0] == "(" else value >= self.low
        return above and (value < self.high if self.opens[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.opens[0] == "(" else f"{self.low:g} or more"
        return f"in {self.opens[0]}{self.low:g}, {self.high:g}{self.opens[1]}"


POSITIVE = Interval(0, opens="(]")
COUNT = Interval(1)
NOT_NEGATIVE = Interval(0)
PROBABILITY = Interval(0, 1)
SHARE = Interval(0, 1, "[)")

DATA_RANGES = {
    "validation_fraction": SHARE,
    "num_train": COUNT,
    "num_eval": COUNT,
    "max_length": Interval(3),
    "image_size": COUNT,
    "split_seed": NOT_NEGATIVE,
}
STATISTICS_RANGES = {"num_samples": COUNT, "max_examples": COUNT, "batch_size": COUNT}
RANGES = {
    "model.head.hidden": COUNT,
    "model.head.dropout": SHARE,
    "model.adapter.rank": COUNT,
    "model.adapter.alpha": POSITIVE,
    "model.adapter.dropout": SHARE,
    "tokenizer.vocab_size": Interval(100),
    **{f"data.{key}": interval for key, interval in DATA_RANGES.items()},
    "augmentation.flip": PROBABILITY,
    "augmentation.rotation": Interval(0, 180),
    "augmentation.color_jitter": Interval(0, 2.5),
    "augmentation.grayscale": PROBABILITY,
    "augmentation.blur": NOT_NEGATIVE,
    "augmentation.mixup": NOT_NEGATIVE,
    "augmentation.cutmix": NOT_NEGATIVE,
    "augmentation.label_smoothing": SHARE,
    "augmentation.random_erasing": PROBABILITY,
    "objective.temperature": POSITIVE,
    "objective.projection_dim": COUNT,
    "objective.mlm_probability": Interval(0, 1, "()"),
    "training.epochs": COUNT,
    "training.max_steps": COUNT,
    "training.batch_size": COUNT,
    "training.eval_batch_size": COUNT,
    "training.accumulation": COUNT,
    "training.learning_rate": POSITIVE,
    "training.weight_decay": NOT_NEGATIVE,
    "training.betas": SHARE,
    "training.momentum": SHARE,
    "training.warmup": NOT_NEGATIVE,
    "training.max_grad_norm": NOT_NEGATIVE,
    "snapshots.every_epochs": COUNT,
    "snapshots.every_steps": COUNT,
    "snapshots.log_spaced": COUNT,
    "snapshots.keep_last": COUNT,
    "publish.workers": COUNT,
    **{f"statistics.{key}": interval for key, interval in STATISTICS_RANGES.items()},
    "statistics.seed": NOT_NEGATIVE,
    **STATISTICS_RANGES,
    "diagnostics.scales": POSITIVE,
    "diagnostics.max_examples": COUNT,
    "diagnostics.batch_size": COUNT,
    "eval_batch_size": COUNT,
    "num_eval": COUNT,
    "num_threads": COUNT,
    "max_shard_size": POSITIVE,
}


def check_ranges(recipe: Any, mistaken: Sequence[str] = ()) -> list[Mistake]:
    """Return the values outside their ranges.

    Args:
        recipe: A recipe; parts that could not be bound are null.
        mistaken: Paths that have a mistake already; they are left out.
    """
    ranges = dict(RANGES)
    if isinstance(recipe, MergeRecipe):
        ranges |= {f"data.{task}.{key}": span for task in recipe.data for key, span in DATA_RANGES.items()}
    mistakes = []
    for path, interval in ranges.items():
        value = _lookup(recipe, path)
        if any(overlap(path, other) for other in mistaken):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not interval.holds(number):
                mistakes.append(Mistake(path, f"must be {interval}, got {number:g}"))
    return mistakes


def _lookup(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        if value is None:
            return None
    return value
