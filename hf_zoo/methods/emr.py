"""EMR-merging: elect a unified task vector; masks and rescalers make of it each task's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.task_vectors import require_finite


@dataclass(frozen=True, kw_only=True)
class Emr(ElementwiseMethod):
    """Give every entry the sign of the summed task vectors and the largest magnitude among those that have it.

    Huang et al. (2024), section 3. The unified task vector has, at each entry, the sign of the sum of the task
    vectors and the largest magnitude of the task vectors of that sign. A task's mask keeps the entries whose sign it
    shares, its rescaler sum |tau_t| / sum |masked unified vector| over the whole model restores its size.

    The paper runs each task with its own mask and rescaler. One model cannot hold them all: without `task` the
    merge is the base plus the unified vector, and the report gives the rescalers; with `task` it is that task's
    model. The base, the unified model and one bit an entry and task are then all there is to keep.

    Attributes:
        task: Place of a member, from 0, whose mask and rescaler are to be used; null gives the unified model.
        scale: Multiplies the unified vector; not used with `task`.
    """

    paper: ClassVar[Paper] = Paper(
        "EMR-Merging: Tuning-Free High-Performance Model Merging",
        "Huang et al.",
        2024,
        "https://arxiv.org/abs/2405.17461",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    task: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_finite("emr", scale=self.scale)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a task that is not there.

        Raises:
            MergeError: If there is no member at this place.
        """
        super().check(inputs)
        count = len(inputs.members)
        if self.task is not None and not 0 <= self.task < count:
            raise MergeError(f"emr: task must be a member's place from 0 to {count - 1}, got {self.task}")

    def overview(self, inputs: MergeInputs) -> tuple[float, ...]:
        """Return every task's rescaler, and report them."""
        sizes = torch.zeros(2, len(inputs.members), dtype=torch.float64)
        for tensors in inputs.floating():
            for piece in tensors.pieces():
                vectors = list(piece.task_vectors())
                unified = unify(vectors)
                for place, vector in enumerate(vectors):
                    masked = unified * (vector * unified > 0)
                    sizes[0, place] += vector.abs_().sum(dtype=torch.float64).cpu()
                    sizes[1, place] += masked.abs_().sum(dtype=torch.float64).cpu()
        rescalers = tuple(own / kept if kept else 1.0 for own, kept in sizes.T.tolist())
        inputs.report["rescalers"] = {
            member.source: rescaler for member, rescaler in zip(inputs.members, rescalers, strict=True)
        }
        return rescalers

    def blend(self, pieces: MemberTensors, survey: tuple[float, ...]) -> Tensor:
        """Return the base plus the unified vector, or what a task makes of it; a piece of every member is held."""
        base = pieces.base
        vectors = [member - base for member in pieces]
        unified = unify(vectors)
        if self.task is None:
            return unified.mul_(self.scale).add_(base)
        return unified.mul_(vectors[self.task] * unified > 0).mul_(survey[self.task]).add_(base)


def unify(vectors: list[Tensor]) -> Tensor:
    """Return the elected vector: the sign of the sum, and the largest magnitude of that sign (equation 2).

    Args:
        vectors: Task vectors, (*shape) each.

    Returns:
        The unified vector, (*shape); zero where the sum is.
    """
    total, highest, lowest = vectors[0].clone(), vectors[0].clone(), vectors[0].clone()
    for vector in vectors[1:]:
        total.add_(vector)
        torch.maximum(highest, vector, out=highest)
        torch.minimum(lowest, vector, out=lowest)
    # Where the sum is positive the highest is, and where it is negative the lowest is.
    sign = total.sign_()
    positive = torch.relu(sign)
    return highest.mul_(positive).addcmul_(lowest, positive.sub_(sign))
