"""Task vectors joined by their first singular vectors, made orthogonal to each other."""

# K = members, O = outputs, I = inputs, R = singular vectors kept of all tasks

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.matrices import add_to_base, directions, matrix_shape, nearest_orthogonal, task_matrices
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import Need, Paper, TensorwiseMethod


@dataclass(frozen=True, kw_only=True)
class TaskSingularVectors(TensorwiseMethod):
    """Add the first singular vectors of all task vectors, made orthogonal so that tasks do not interfere.

    TSV-Merge, algorithm 1 of Gargiulo et al. (2025): of each task vector that is a matrix the share 1/K of its
    singular vectors is kept; the kept left vectors of all tasks, side by side, are replaced by the nearest orthogonal
    matrix (Procrustes), the right ones alike, and the singular values put back in between. Kernels are laid out as
    (outputs, everything else). Task vectors that are no matrices are averaged, as in the paper.

    Singular vectors of zero are arbitrary and left out; where that or two equal task vectors leave fewer directions
    than were kept, Procrustes is solved among those there are.

    Attributes:
        scale: Factor of the merged task vector, the paper's alpha.
        share: Share of each task's singular vectors to keep, in (0, 1]. Null keeps 1/K, at least one.
    """

    paper: ClassVar[Paper] = Paper(
        "Task singular vectors: reducing task interference in model merging",
        "Gargiulo et al.",
        2025,
        "https://arxiv.org/abs/2412.00081",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    scale: float = 1.0
    share: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise MergeError(f"scale must be finite, got {self.scale}")
        if self.share is not None and not 0 < self.share <= 1:
            raise MergeError(f"share must be in (0, 1], got {self.share}")

    def combine(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the merged tensor; one task vector is held at a time, and the kept directions of all."""
        shape = matrix_shape(tensors.shape)
        if shape is None:
            return add_to_base(tensors, weighted_mean(tensors.task_vectors()), self.scale)
        most = min(shape)
        # 1e-9: a share of 0.3 of 10 is 3, whatever 0.3 * 10 rounds to.
        count = most // len(tensors) if self.share is None else int(self.share * most + 1e-9)
        kept = [directions(matrix_OI).first(max(count, 1)) for matrix_OI in task_matrices(tensors)]
        values_R = torch.cat([one.values for one in kept])
        left_OR = nearest_orthogonal(torch.cat([one.left for one in kept], 1))
        right_RI = nearest_orthogonal(torch.cat([one.right for one in kept]))
        return add_to_base(tensors, (left_OR * values_R) @ right_RI, self.scale)
