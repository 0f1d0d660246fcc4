"""MagMax: the entry that moved furthest wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.task_vectors import require_finite


@dataclass(frozen=True, kw_only=True)
class Magmax(ElementwiseMethod):
    """Take, entry by entry, the task vector that is largest in magnitude.

    Marczak et al. (2024), section 4: theta = theta_0 + scale * tau with tau the entry of largest magnitude among the
    task vectors. Of two that are equally far on both sides the positive one is taken, so that the members' order does
    not matter. The paper chooses the scale on held-out data.

    Attributes:
        scale: Multiplies the merged vector; lambda in the paper.
    """

    paper: ClassVar[Paper] = Paper(
        "MagMax: Leveraging Model Merging for Seamless Continual Learning",
        "Marczak et al.",
        2024,
        "https://arxiv.org/abs/2407.06322",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_finite("magmax", scale=self.scale)

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the base plus what moved furthest; one member's entries are held at a time."""
        base = pieces.base
        vectors = (member - base for member in pieces)
        highest = next(vectors)
        lowest = highest.clone()
        for vector in vectors:
            torch.maximum(highest, vector, out=highest)
            torch.minimum(lowest, vector, out=lowest)
        return torch.where(highest >= -lowest, highest, lowest).mul_(self.scale).add_(base)
