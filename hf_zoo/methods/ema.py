"""The exponential moving average along a run's snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Paper


@dataclass(frozen=True, kw_only=True)
class Ema(ElementwiseMethod):
    """Average members along a run, given in the order of training, the later the more.

    Polyak averaging with forgetting, as in Morales-Brotons et al. (2024): average <- decay average + (1 - decay)
    member, along the members in their order.

    Attributes:
        decay: What is kept of the average at each member, from 0 (the last member alone) to below 1. Papers average
            training steps with 0.99 and more; members are mostly epochs apart, so the default forgets faster.
        start: Whether the average starts at the `first` member, which then counts as all that came before it; or at
            `zero`, rescaled at the end, (1 - decay) / (1 - decay^K) decay^(K - k) for member k of K: the plain mean as
            decay nears 1.
    """

    paper: ClassVar[Paper] = Paper(
        "Exponential moving average of weights in deep learning: dynamics and benefits",
        "Morales-Brotons et al.",
        2024,
        "https://arxiv.org/abs/2411.18704",
    )
    linear: ClassVar[bool] = True

    decay: float = 0.9
    start: Literal["first", "zero"] = "first"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise MergeError(f"decay must be at least 0 and below 1, got {self.decay}")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the average; one member's entries are held at a time."""
        count = len(pieces)
        weights = [(1 - self.decay) * self.decay ** (count - place) for place in range(1, count + 1)]
        if self.start == "first":
            weights[0] = self.decay ** (count - 1)
        return weighted_mean(pieces, weights)
