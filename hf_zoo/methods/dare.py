"""DARE: drop entries of the task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Paper, per_member
from hf_zoo.task_vectors import TaskVectorMethod, require_fractions
from hf_zoo.trimming import drop_at_random


@dataclass(frozen=True, kw_only=True)
class Dare(TaskVectorMethod, ElementwiseMethod):
    """Drop entries of every task vector at random, rescale the rest, and merge what is left.

    Yu et al. (2024), equation 1: each entry is kept with probability `density` (1 - p in the paper) and divided by
    it, so that the expected task vector is what it was. Then the vectors are added as in task arithmetic, or signs
    are elected as in TIES. The paper finds that nine tenths can be dropped, the default here; it tunes `scale`.

    Attributes:
        density: Probability of an entry to be kept, one for all or one per member.
        election: `none` adds the vectors; `total` and `count` elect signs as TIES does and average what agrees.
        rescale: Divide by the density, as in the paper; `norm` instead gives each tensor the sum of magnitudes it had
            before, as mergekit does; `none` leaves the rest as it is.
        weights: How much each task vector counts; null counts all once.
        normalize: Divide by the weights that took part; null does so only where signs are elected.
        scale: Multiplies the merged vector.
        tie: What becomes of an entry whose two signs weigh the same: `zero` leaves the base, `positive` elects the
            positive side, as mergekit does.
    """

    paper: ClassVar[Paper] = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Yu et al.",
        2024,
        "https://arxiv.org/abs/2311.03099",
    )

    density: float | tuple[float, ...] = 0.1
    rescale: Literal["density", "norm", "none"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions("dare", density=self.density)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of densities or weights.

        Raises:
            MergeError: If there is not one per member.
        """
        super().check(inputs)
        per_member(self.density, inputs, "dare: density")

    @property
    def surveys(self) -> bool:  # type: ignore[override]
        """Whether the norms of every tensor must be known."""
        return self.rescale == "norm"

    def survey(self, tensors: MemberTensors, overview: None) -> tuple[float, ...] | None:
        """Return what restores every member's norm: the sum of magnitudes before, divided by that of what is kept."""
        if self.rescale != "norm":
            return None
        before, after = [0.0] * len(tensors), [0.0] * len(tensors)
        for piece in tensors.pieces():
            base = piece.base
            for index, member in enumerate(piece):
                before[index] += float((member - base).abs_().sum(dtype=torch.float64))
            for index, kept in enumerate(self._kept(piece, base)):
                after[index] += float(kept.abs_().sum(dtype=torch.float64))
        return tuple(old / new if new else 1.0 for old, new in zip(before, after, strict=True))

    def blend(self, pieces: MemberTensors, survey: tuple[float, ...] | None) -> Tensor:
        """Return the base plus what is left of the task vectors; one member's entries are held at a time."""
        densities = per_member(self.density, pieces.inputs, "dare: density")
        factors = survey or [1 / density if self.rescale == "density" else 1.0 for density in densities]
        base = pieces.base
        kept = (vector.mul_(factor) for vector, factor in zip(self._kept(pieces, base), factors, strict=True))
        return self.added(base, kept, pieces.inputs)

    def _kept(self, piece: MemberTensors, base: Tensor) -> Iterator[Tensor]:
        """Yield every member's task vector with entries dropped; the same ones each time."""
        densities = per_member(self.density, piece.inputs, "dare: density")
        for index, (member, density) in enumerate(zip(piece, densities, strict=True)):
            yield drop_at_random(member - base, density, piece.generator(index))
