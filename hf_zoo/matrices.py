"""Task vectors as matrices: which tensors are matrices, and their singular values and directions.

Everything is decomposed in float64: the methods that use it set small singular values equal to large ones, which makes
of rounding in float32 a difference that can be seen.
"""

# K = members, O = outputs, I = inputs, R = singular values kept

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors


@dataclass(frozen=True)
class Directions:
    """A matrix as `left @ diag(values) @ right`, without directions of singular value zero, which are arbitrary.

    Attributes:
        left: Left singular vectors, (O, R).
        values: Singular values, descending, above rounding errors of the largest, (R,).
        right: Right singular vectors, (R, I).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Directions:
        """Return the directions of the largest singular values."""
        return Directions(self.left[:, :count], self.values[:count], self.right[:count])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the shape of a tensor as a matrix: outputs, and everything else; null for a vector.

    Axes of length one are no axes: a class token of (1, 1, D) is a vector, position embeddings of (1, N, D) a matrix.
    """
    lengths = [length for length in shape if length != 1]
    return (lengths[0], math.prod(lengths[1:])) if len(lengths) > 1 and 0 not in lengths else None


def directions(matrix: Tensor) -> Directions:
    """Decompose a matrix of float64."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Directions(left, values, right).first(_rank(values, max(matrix.shape)))


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix with all singular values set to one (Procrustes); those of zero stay.

    For columns that are linearly independent this is the nearest matrix with orthonormal columns.
    """
    found = directions(matrix)
    return found.left @ found.right


def task_matrices(tensors: MemberTensors) -> Iterator[Tensor]:
    """Yield every member's task vector as a matrix of float64, (O, I), in memory of its own.

    Args:
        tensors: A tensor of every member that has a `matrix_shape`, and the base.
    """
    shape = matrix_shape(tensors.shape)
    assert shape is not None
    return (vector.double().reshape(shape) for vector in tensors.task_vectors())


def add_to_base(tensors: MemberTensors, vector: Tensor, scale: float) -> Tensor:
    """Return the base plus a merged task vector times a factor, in the tensor's shape and the computing type."""
    base = tensors.base
    return torch.add(base, vector.reshape(base.shape).to(base.dtype), alpha=scale)


def _rank(values: Tensor, size: int) -> int:
    if not len(values):
        return 0
    least = values[0] * size * torch.finfo(values.dtype).eps
    return int((values > least).sum())
