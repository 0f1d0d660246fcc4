"""Task vectors merged so that none disturbs another's inputs, which the task vectors themselves stand for."""

# K = members, O = outputs, I = inputs of a linear layer

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors
from hf_zoo.matrices import add_to_base, matrix_shape, task_matrices
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import Need, Paper, TensorwiseMethod


@dataclass(frozen=True, kw_only=True)
class Wudi(TensorwiseMethod):
    """Add the task vector that interferes least with every task, found by gradient descent without data.

    WUDI-Merging, Cheng et al. (2025): a fine-tuned layer's task vector lies in the span of the inputs it was trained
    on, so its rows stand in for them. From the sum of the task vectors, Adam minimises `sum_i ||(t - t_i) t_i^T||^2 /
    ||t_i||^2` for each matrix, laid out as (outputs, inputs); kernels count as (outputs, everything else). What is no
    matrix is averaged, as in the authors' code. A step costs one product of matrices, (O, I) by (I, I), whatever the
    number of members: a model of 100 million parameters takes tens of minutes on two cores; merge it on a GPU.

    Attributes:
        num_iterations: Steps of Adam.
        learning_rate: Of Adam, which moves an entry by about as much a step: the authors' 1e-5 suits task vectors
            whose entries are around 1e-4 to 1e-3.
        scale: Factor of the merged task vector; the paper has none.
        inputs_first: Whether matrices are stored as (inputs, outputs), as those of GPT-2's layers are.
    """

    paper: ClassVar[Paper] = Paper(
        "Whoever started the interference should end it: guiding data-free model merging via task vectors",
        "Cheng et al.",
        2025,
        "https://arxiv.org/abs/2503.08099",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    num_iterations: int = 300
    learning_rate: float = 1e-5
    scale: float = 1.0
    inputs_first: bool = False

    def __post_init__(self) -> None:
        if self.num_iterations < 0:
            raise MergeError(f"num_iterations must be 0 or more, got {self.num_iterations}")
        if not 0 < self.learning_rate < math.inf:
            raise MergeError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not math.isfinite(self.scale):
            raise MergeError(f"scale must be finite, got {self.scale}")

    def combine(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the merged tensor; one task vector is held at a time, and their sum and Gram matrices."""
        if matrix_shape(tensors.shape) is None:
            return add_to_base(tensors, weighted_mean(tensors.task_vectors()), self.scale)
        # The loss is quadratic in t: its gradient is 2 (t A - B), A = sum_i G_i, B = sum_i t_i G_i,
        # G_i = t_i^T t_i / ||t_i||^2.
        total_OI = gram_II = target_OI = torch.empty(0)
        for index, matrix in enumerate(task_matrices(tensors)):
            matrix_OI = matrix.T if self.inputs_first else matrix
            square = matrix_OI.square().sum()
            unit_OI = matrix_OI / torch.where(square == 0, 1.0, square.sqrt())
            one_II = unit_OI.T @ unit_OI
            if index:
                total_OI.add_(matrix_OI)
                gram_II.add_(one_II)
                target_OI.addmm_(matrix_OI, one_II)
            else:
                total_OI, gram_II, target_OI = matrix_OI.clone(), one_II, matrix_OI @ one_II
        merged_OI = self._descend(*(part.to(tensors.inputs.dtype) for part in (total_OI, gram_II, target_OI)))
        return add_to_base(tensors, merged_OI.T if self.inputs_first else merged_OI, self.scale)

    def _descend(self, merged_OI: Tensor, gram_II: Tensor, target_OI: Tensor) -> Tensor:
        merged_OI = merged_OI.contiguous()
        optimizer = torch.optim.Adam([merged_OI], lr=self.learning_rate)
        gradient_OI = torch.empty_like(merged_OI)
        merged_OI.grad = gradient_OI
        for _ in range(self.num_iterations):
            torch.addmm(target_OI, merged_OI, gram_II, beta=-2, alpha=2, out=gradient_OI)
            optimizer.step()
        return merged_OI.detach()
