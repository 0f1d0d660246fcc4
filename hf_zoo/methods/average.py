"""The weighted mean of the members."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Paper, per_member


@dataclass(frozen=True, kw_only=True)
class Average(ElementwiseMethod):
    """Average the members' weights.

    The uniform soup of Wortsman et al. (2022), section 2, where no weights are given.

    Attributes:
        weights: One per member, finite, their sum positive; they are normalised to sum to one. Null weighs all alike.
    """

    paper: ClassVar[Paper] = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        "Wortsman et al.",
        2022,
        "https://arxiv.org/abs/2203.05482",
    )
    linear: ClassVar[bool] = True

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is not None and not (all(map(math.isfinite, weights)) and sum(weights) > 0):
            raise MergeError(f"weights must be finite and their sum above 0, got {list(weights)}")

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of weights.

        Raises:
            MergeError: If there is not one weight per member.
        """
        super().check(inputs)
        if self.weights is not None:
            per_member(self.weights, inputs, "average: weights")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the weighted mean; one member's entries are held at a time."""
        return weighted_mean(pieces, self.weights)
