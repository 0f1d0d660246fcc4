"""The part of a recipe that says which statistics of a member are measured, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class StatisticsSpec:
    """What is kept beside a member's weights so that it can be merged later without data.

    Attributes:
        kinds: `fisher`, the diagonal Fisher information, and `gram`, the Gram matrices of linear layers' inputs.
        estimator: `exact` expectation over labels, labels `sampled` from the model, or `empirical` (observed) ones;
            null is exact for classes and numbers and sampled for tokens.
        num_samples: Labels drawn a prediction, for `sampled`.
        per_example: Square each example's gradient; false squares a batch's, for `sampled` only: cheaper and noisier.
        max_examples: Use at most this many training samples (a seeded choice); null for all.
        batch_size: Samples a pass.
        dtype: Type of computation and sum; float32 is what is stored.
        seed: Seed of the choice and of sampled labels.
    """

    kinds: tuple[Literal["fisher", "gram"], ...] = ("fisher",)
    estimator: Literal["exact", "sampled", "empirical"] | None = None
    num_samples: int = 1
    per_example: bool = True
    max_examples: int | None = None
    batch_size: int = 32
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
