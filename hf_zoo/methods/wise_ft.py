"""The straight line from the base to a member, or from one member to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper


@dataclass(frozen=True, kw_only=True)
class WiseFt(ElementwiseMethod):
    """Stand on the straight line from the base to a member, or from one member to another.

    Wortsman et al. (2022), equation 1: (1 - alpha) times the weights before fine-tuning plus alpha times those after.

    Attributes:
        alpha: How far to go: 0 is the line's start, 1 its end; the paper recommends 0.5 where nothing is known.
        start: Where the line starts: at the `base`, with one member, or at the first of two members, `member`.
    """

    paper: ClassVar[Paper] = Paper(
        "Robust fine-tuning of zero-shot models", "Wortsman et al.", 2022, "https://arxiv.org/abs/2109.01903"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    arity: ClassVar[tuple[int, int | None]] = (1, 1)

    alpha: float = 0.5
    start: Literal["base", "member"] = "base"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise MergeError(f"alpha must lie in 0 to 1, got {self.alpha}")
        if self.start == "member":
            object.__setattr__(self, "needs", frozenset())
            object.__setattr__(self, "arity", (2, 2))

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the point's entries."""
        start, end = pieces.base if self.start == "base" else pieces[0], pieces[len(pieces) - 1]
        wide = torch.promote_types(start.dtype, end.dtype)
        return torch.lerp(start.to(wide), end.to(wide), self.alpha)
