"""The sum of task vectors with all its singular values made equal."""

# K = members, O = outputs, I = inputs, R = singular vectors

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.matrices import Directions, add_to_base, directions, matrix_shape, nearest_orthogonal, task_matrices
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import Need, Paper, TensorwiseMethod


@dataclass(frozen=True, kw_only=True)
class Isotropic(TensorwiseMethod):
    """Add the sum of task vectors with all its singular values replaced by their mean.

    Marczak et al. (2025). Iso-C: the sum of the task vectors is `U S V^T`, and `mean(S) U V^T` is added. Iso-CTS: only
    the first singular vectors of the sum are kept; the rest of the rank is shared among the tasks, each giving the
    first singular vectors of what its task vector has outside the common left ones; all are made orthogonal
    (Procrustes) before their values are replaced by their mean. Kernels are laid out as (outputs, everything else).
    Task vectors that are no matrices are averaged, as in the paper.

    Directions whose singular value is zero are arbitrary; they get none, and the mean is over the others, so that the
    sum of singular values stays as it is.

    Attributes:
        scale: Factor of the merged task vector, the paper's alpha; chosen on held-out data in the paper.
        subspaces: `common` for Iso-C, `common_and_task` for Iso-CTS.
        common_share: Share of the rank that comes from the sum, in [0, 1]; only for Iso-CTS.
    """

    paper: ClassVar[Paper] = Paper(
        "No task left behind: isotropic model merging with common and task-specific subspaces",
        "Marczak et al.",
        2025,
        "https://arxiv.org/abs/2502.04959",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    scale: float = 1.0
    subspaces: Literal["common", "common_and_task"] = "common"
    common_share: float = 0.8

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise MergeError(f"scale must be finite, got {self.scale}")
        if not 0 <= self.common_share <= 1:
            raise MergeError(f"common_share must be in [0, 1], got {self.common_share}")

    def combine(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the merged tensor; one task vector and the sum are held at a time."""
        shape = matrix_shape(tensors.shape)
        if shape is None:
            return add_to_base(tensors, weighted_mean(tensors.task_vectors()), self.scale)
        total_OI = torch.zeros(shape, dtype=torch.float64, device=tensors.inputs.device)
        for matrix_OI in task_matrices(tensors):
            total_OI.add_(matrix_OI)
        found = directions(total_OI)
        if self.subspaces == "common_and_task":
            found = self._with_tasks(found, tensors, min(shape))
        if not len(found.values):
            return tensors.base
        return add_to_base(tensors, (found.left @ found.right) * found.values.mean(), self.scale)

    def _with_tasks(self, common: Directions, tensors: MemberTensors, rank: int) -> Directions:
        """Replace the last of the common directions by directions of the tasks."""
        count = len(tensors)
        # As in the authors' code, the common share gives way until the rest divides by the number of tasks.
        of_task = min(round((rank - int(rank * self.common_share + 1e-9)) / count), rank // count)
        common = common.first(rank - of_task * count)
        found = [common]
        for matrix_OI in task_matrices(tensors):
            outside_OI = matrix_OI - common.left @ (common.left.T @ matrix_OI)
            found.append(directions(outside_OI).first(of_task))
        return Directions(
            nearest_orthogonal(torch.cat([one.left for one in found], 1)),
            torch.cat([one.values for one in found]),
            nearest_orthogonal(torch.cat([one.right for one in found])),
        )
