"""Least squares on Gram matrices: the linear layer nearest to several layers' answers to their own inputs."""

# I = inputs of a linear layer, O = its outputs

from __future__ import annotations

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.methods.base import require_shares

# Ridge on Gram matrices of unit diagonal that draws to the members' mean: 1e-8 is less than what rounding the result
# to float32 changes, and settles inputs that no member uses.
RIDGE = 1e-8
RIDGE_GROWTH = 10.0


class Regression:
    """A regression in the making: add one member after the other, then solve.

    `W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1`, in float64; inputs no member uses keep the weighted mean of the W_i.
    One member's matrices are held at a time, besides the sums.

    Args:
        off_diagonal: Factor of the off-diagonals of every Gram matrix, in [0, 1].
    """

    def __init__(self, off_diagonal: float) -> None:
        self.off_diagonal = off_diagonal
        self.gram_II = self.answers_OI = self.mean_OI = torch.empty(0)
        self.weight = 0.0
        self._begun = False

    def add(self, weight_OI: Tensor, gram_II: Tensor, weight: float = 1.0) -> None:
        """Add a member.

        Args:
            weight_OI: Its layer's weight.
            gram_II: Mean of x x^T over the rows its layer reads.
            weight: How much its answers count.
        """
        weight_OI, gram_II = weight_OI.double(), shrunk(gram_II.double(), self.off_diagonal) * weight
        if self._begun:
            self.gram_II.add_(gram_II)
            self.answers_OI.addmm_(weight_OI, gram_II)
            self.mean_OI.add_(weight_OI, alpha=weight)
        else:
            self.gram_II, self.answers_OI, self.mean_OI = gram_II, weight_OI @ gram_II, weight_OI * weight
        self.weight, self._begun = self.weight + weight, True

    def solution(self) -> Tensor:
        """Return the layer's weight, (O, I), in float64. To be asked for once."""
        mean_OI = self.mean_OI.div_(self.weight)
        return mean_OI + solve(self.gram_II, self.answers_OI - mean_OI @ self.gram_II)


def require_regression(off_diagonal: float, weights: tuple[float, ...] | None) -> None:
    """Refuse hyper-parameters out of range.

    Raises:
        MergeError: If the factor is not in [0, 1], or the members' weights are negative or have no positive sum.
    """
    if not 0 <= off_diagonal <= 1:
        raise MergeError(f"off_diagonal must be in [0, 1], got {off_diagonal}")
    require_shares(weights)


def shrunk(gram_II: Tensor, off_diagonal: float) -> Tensor:
    """Return a Gram matrix with its off-diagonals multiplied by a factor."""
    diagonal_I = gram_II.diagonal().clone()
    shrunk_II = gram_II * off_diagonal
    shrunk_II.diagonal().copy_(diagonal_I)
    return shrunk_II


def solve(gram_II: Tensor, rest_OI: Tensor) -> Tensor:
    """Return `rest_OI @ inverse(gram_II)`, small where the matrix says nothing.

    Args:
        gram_II: Finite, symmetric, none of its diagonal negative, float64.
        rest_OI: float64.
    """
    lengths_I = gram_II.diagonal().sqrt()
    lengths_I = torch.where(lengths_I == 0, torch.ones_like(lengths_I), lengths_I)
    unit_II = gram_II / lengths_I / lengths_I[:, None]
    ridge = RIDGE
    while True:
        ridged_II = unit_II.clone()
        ridged_II.diagonal().add_(ridge)
        factor_II, failed = torch.linalg.cholesky_ex(ridged_II)
        if not int(failed):
            return torch.cholesky_solve((rest_OI / lengths_I).T, factor_II).T / lengths_I
        # Rounding to float32 may leave a Gram matrix of few rows with eigenvalues just below zero.
        ridge *= RIDGE_GROWTH
