"""Task vectors as matrices: which tensors are matrices, and their singular values and directions.

Directions come from the eigenvectors of the smaller Gram matrix, in float64: faster than a singular value
decomposition, and exact to `eps (largest / value)^2` in the direction of a value. Values below a millionth of the
largest are rounding of weights in float32; they count as zero.
"""

# K = members, O = outputs, I = inputs, R = singular values kept

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors

LEAST_VALUE = 1e-6  # of the largest


@dataclass(frozen=True)
class Directions:
    """A matrix as `left @ diag(values) @ right`, without directions of singular value zero, which are arbitrary.

    Attributes:
        left: Left singular vectors, (O, R).
        values: Singular values, descending, (R,).
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
    if matrix.shape[0] < matrix.shape[1]:
        turned = directions(matrix.T)
        return Directions(turned.right.T, turned.values, turned.left.T)
    if not matrix.numel():
        return Directions(matrix[:, :0], matrix.new_zeros(0), matrix[:0])
    # A power of two keeps squares in range and changes no digit.
    exponent = torch.frexp(matrix.abs().max())[1]
    unit = torch.ldexp(matrix, -exponent)
    squares, vectors = torch.linalg.eigh(unit.T @ unit)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rank = int((squares > squares[0] * LEAST_VALUE**2).sum())
    right = vectors[:, :rank].T
    values = torch.ldexp(squares[:rank].sqrt(), exponent)
    return Directions(matrix @ right.T / values, values, right)


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
