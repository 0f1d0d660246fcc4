"""Small regions of every task vector, found by magnitude and stitched onto the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member
from hf_zoo.task_vectors import require_finite, require_fractions
from hf_zoo.trimming import least_kept, trim

Thresholds = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Localize(ElementwiseMethod):
    """Keep a small region of every task vector and stitch the regions onto the base, the mean where they overlap.

    Localize-and-Stitch, He et al. (2024), in its dataless form: the region of a task is the `density` of its task
    vector's entries that are largest in magnitude, over the whole model; theta = theta_0 + sum_k gamma_k tau_k with
    gamma_k = 1 / (number of regions an entry lies in) inside the region of k and 0 outside. The paper keeps 5 to 10
    percent this way. Unlike TIES no sign is elected. All entries equal to the smallest kept one are kept too.

    Attributes:
        density: Fraction of the entries in a region, one for all or one a member.
        scale: Multiplies what is stitched on; 1 in the paper.
    """

    paper: ClassVar[Paper] = Paper(
        "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
        "He et al.",
        2024,
        "https://arxiv.org/abs/2408.13656",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    density: float | tuple[float, ...] = 0.05
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_fractions("localize", density=self.density)
        require_finite("localize", scale=self.scale)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of densities.

        Raises:
            MergeError: If there is not one a member.
        """
        super().check(inputs)
        per_member(self.density, inputs, "localize: density")

    def overview(self, inputs: MergeInputs) -> Thresholds:
        """Return the smallest magnitude in every member's region."""
        return least_kept(list(inputs.floating()), per_member(self.density, inputs, "localize: density"))

    def blend(self, pieces: MemberTensors, survey: Thresholds) -> Tensor:
        """Return the base plus the stitched regions; one member's entries are held at a time."""
        base = pieces.base
        total, regions = base.new_zeros(base.shape), base.new_zeros(base.shape)
        for member, least in zip(pieces, survey, strict=True):
            part = trim(member - base, least)
            total.add_(part)
            # Entries that were trained to where they were are in no region, even at density 1.
            regions.add_(part.ne_(0))
        return total.div_(regions.clamp_(min=1)).mul_(self.scale).add_(base)
