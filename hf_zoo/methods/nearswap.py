"""One member, with another's entries where the two nearly agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Paper


@dataclass(frozen=True, kw_only=True)
class Nearswap(ElementwiseMethod):
    """Move every entry of the first of two members towards the second, by no more than t.

    Stated by its author as first + w (second - first) with w = min(t / |second - first|, 1), which is the first member
    plus their difference cut to [-t, t]: entries nearer than t are swapped, others moved by t. mergekit's `nearswap`
    takes the first member as `base_model`; it takes differences below 1e-6 for 1e-6, which matters for t below that
    alone.

    Attributes:
        t: Largest change of an entry, not negative; the author's model has 0.0001.
    """

    paper: ClassVar[Paper] = Paper(
        "QuartetAnemoi-70B-t0.0001",
        "alchemonaut",
        2024,
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    )
    arity: ClassVar[tuple[int, int | None]] = (2, 2)

    t: float = 0.0001

    def __post_init__(self) -> None:
        if not self.t >= 0:
            raise MergeError(f"t must not be negative, got {self.t}")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the first member's entries, moved."""
        first, second = pieces
        return (second - first).clamp_(-self.t, self.t).add_(first)
