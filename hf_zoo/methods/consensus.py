"""Consensus merging: only the entries that matter to several tasks, found by TALL masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member
from hf_zoo.task_vectors import require_finite, weights_of


@dataclass(frozen=True, kw_only=True)
class Consensus(ElementwiseMethod):
    """Add to the base those entries of the summed task vectors that matter to several tasks.

    Wang et al. (2024), sections 3 and 4. With tau the sum of the task vectors, an entry belongs to the TALL mask of a
    task t where |tau_t| >= mask_scale |tau - tau_t|: there the sum is near the task's own weights. Entries in fewer
    than `min_tasks` masks are left as in the base: in none they are catastrophic, in one selfish. The paper chooses
    the mask scale of each task between 0.2 and 0.6, and `scale`, on held-out data; the defaults are the middle, and
    what task arithmetic uses without such data.

    A task's own mask restores almost that task's model from the sum (section 3): `task` gives that model.

    Attributes:
        mask_scale: How strict the masks are, one for all or one per member; lambda in the paper.
        min_tasks: In how many masks an entry must be: 2 in the paper, 1 keeps selfish entries, 0 is task arithmetic.
        task: Place of a member, from 0, whose own mask is to be used alone, with a scale of 1; null merges for all.
        scale: Multiplies the merged vector; not used with `task`.
        weights: How much each task vector counts in the sum; null counts all once.
    """

    paper: ClassVar[Paper] = Paper(
        "Localizing Task Information for Improved Model Merging and Compression",
        "Wang et al.",
        2024,
        "https://arxiv.org/abs/2405.07813",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    mask_scale: float | tuple[float, ...] = 0.4
    min_tasks: int = 2
    task: int | None = None
    scale: float = 0.4
    weights: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_finite("consensus", mask_scale=self.mask_scale, scale=self.scale, weights=self.weights)
        if self.min_tasks < 0:
            raise MergeError(f"consensus: min_tasks must be 0 or more, got {self.min_tasks}")

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of mask scales or weights, and more tasks than there are.

        Raises:
            MergeError: If there is not one per member, or a task is asked for that is not there.
        """
        super().check(inputs)
        per_member(self.mask_scale, inputs, "consensus: mask_scale")
        weights_of(self.weights, inputs, "consensus")
        count = len(inputs.members)
        if self.task is not None and not 0 <= self.task < count:
            raise MergeError(f"consensus: task must be a member's place from 0 to {count - 1}, got {self.task}")
        if self.task is None and self.min_tasks > count:
            raise MergeError(f"consensus: min_tasks {self.min_tasks} masks out everything of {count} members")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the base plus the masked sum; a piece of every member is held."""
        weights = weights_of(self.weights, pieces.inputs, "consensus")
        scales = per_member(self.mask_scale, pieces.inputs, "consensus: mask_scale")
        base = pieces.base
        vectors = [member - base for member in pieces]
        total = torch.zeros_like(vectors[0])
        for vector, weight in zip(vectors, weights, strict=True):
            total.add_(vector, alpha=weight)
        if self.task is not None:
            return total.mul_(tall_mask(vectors[self.task], total, scales[self.task])).add_(base)
        votes = torch.zeros(total.shape, dtype=torch.int32, device=total.device)
        for vector, mask_scale in zip(vectors, scales, strict=True):
            votes += tall_mask(vector, total, mask_scale)
        return total.mul_(votes >= self.min_tasks).mul_(self.scale).add_(base)


def tall_mask(vector: Tensor, total: Tensor, mask_scale: float) -> Tensor:
    """Return where a task vector is at least so large as the rest of the sum, times a factor: equation 5 of the paper.

    Args:
        vector: A task vector, (*shape).
        total: The sum of all of them, (*shape).
        mask_scale: The factor.

    Returns:
        The mask, (*shape), boolean.
    """
    return vector.abs() >= (total - vector).abs_().mul_(mask_scale)
