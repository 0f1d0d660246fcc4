"""Model Breadcrumbs: task vectors without their smallest and their largest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import hardshrink

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Paper, per_member
from hf_zoo.task_vectors import TaskVectorMethod, require_fractions
from hf_zoo.trimming import kth_largest, num_kept, trim

Bounds = tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(TaskVectorMethod, ElementwiseMethod):
    """Mask the smallest and the largest entries of each tensor of every task vector, then merge what is left.

    Davari and Belilovsky (2024), section 3: in each tensor of a task vector the `gamma` of its entries that is
    largest in magnitude and the smallest ones are set to zero, so that `density` of them stay; the sum of what is
    left, times `scale`, is added to the base. The paper chooses all three on held-out data. Entries equal to the
    smallest or largest that stay also stay.

    Attributes:
        density: Fraction of the entries that stay, one for all or one per member.
        gamma: Fraction of the entries that are masked for being the largest, one for all or one per member; fewer
            where not enough others are left.
        election: `none` adds the vectors, as in the paper; `total` and `count` elect signs as TIES does and average
            what agrees.
        weights: How much each task vector counts; null counts all once.
        normalize: Divide by the weights that took part; null does so only where signs are elected.
        scale: Multiplies the merged vector; alpha in the paper.
        tie: What becomes of an entry whose two signs weigh the same: `zero` leaves the base, `positive` elects the
            positive side, as mergekit does.
    """

    paper: ClassVar[Paper] = Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Davari and Belilovsky",
        2024,
        "https://arxiv.org/abs/2312.06795",
    )
    surveys: ClassVar[bool] = True

    density: float | tuple[float, ...] = 0.1
    gamma: float | tuple[float, ...] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions("breadcrumbs", density=self.density)
        require_fractions("breadcrumbs", zero=True, gamma=self.gamma)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of densities, gammas or weights.

        Raises:
            MergeError: If there is not one per member.
        """
        super().check(inputs)
        per_member(self.density, inputs, "breadcrumbs: density")
        per_member(self.gamma, inputs, "breadcrumbs: gamma")

    def survey(self, tensors: MemberTensors, overview: None) -> Bounds:
        """Return the smallest and the largest magnitude each member keeps of a tensor; null where none is masked."""
        densities = per_member(self.density, tensors.inputs, "breadcrumbs: density")
        gammas = per_member(self.gamma, tensors.inputs, "breadcrumbs: gamma")
        ranks = [_ranks(density, gamma, tensors.numel) for density, gamma in zip(densities, gammas, strict=True)]
        return tuple(_bounds(found) for found in kth_largest([tensors], ranks))

    def blend(self, pieces: MemberTensors, survey: Bounds) -> Tensor:
        """Return the base plus what is left of the task vectors; one member's entries are held at a time."""
        base = pieces.base
        return self.added(
            base,
            (_between(member - base, *bounds) for member, bounds in zip(pieces, survey, strict=True)),
            pieces.inputs,
        )


def _ranks(density: float, gamma: float, count: int) -> tuple[int, ...]:
    """Return the ranks from the largest of the smallest and of the largest entry that stay."""
    kept = num_kept(density, count)
    masked = min(int(gamma * count), count - kept)
    if kept == count:
        return ()
    return (masked + kept, masked + 1) if masked else (kept,)


def _bounds(found: tuple[float, ...]) -> tuple[float, float | None]:
    return (found[0] if found else 0.0, found[1] if len(found) > 1 else None)


def _between(vector: Tensor, least: float, most: float | None) -> Tensor:
    """Keep the entries between two magnitudes, both included."""
    trimmed = trim(vector, least)
    # What is above the bound is taken away from itself, exactly.
    return trimmed if most is None else trimmed.sub_(hardshrink(vector, most))
