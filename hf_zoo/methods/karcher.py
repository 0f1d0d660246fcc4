"""The Riemannian mean of many members on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.geometry import cosines, gram_matrices, mix, norms_of, note
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Paper, per_member, require_shares

OPPOSITE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Karcher(ElementwiseMethod):
    """Give the members' Karcher mean direction their mean length, tensor by tensor: slerp for many members.

    The mean direction m is the point of the unit sphere with the least sum of weighted squared angles to the members'
    directions, sum_k w_k log_m(u_k) = 0, found as in Buss & Fillmore (2001), algorithm A1: m <- exp_m(sum_k w_k
    log_m(u_k)) from the normalised weighted mean on. m lies in the span of the members, so the steps are taken in
    float64 on K coefficients, given all inner products; the members are read twice however many steps there are. For
    two members of one length it is `slerp` at their weight.

    mergekit's `karcher` has equal weights and at most 10 steps down to 1e-5, keeps directions in the members' own type
    and so differs in bfloat16 by that type's rounding; `max_iterations` and `tolerance` set to its values give its
    numbers in float32. Where a member is opposite to the mean, or directions cancel out, there is no mean direction:
    such a tensor (usually of one entry) gets the members' weighted mean and is named in the report as `averaged`.
    Where steps run out, the last point is taken and the tensor is named as `not_converged`, with the last step's
    length.

    Attributes:
        weights: One for each member, not negative, some positive; they are normalised. Null weighs all alike.
        max_iterations: Steps after which to give up.
        tolerance: Step length, an angle, at which the mean is reached.
    """

    paper: ClassVar[Paper] = Paper(
        "Spherical averages and applications to spherical splines and interpolation",
        "Buss & Fillmore",
        2001,
        "https://doi.org/10.1145/502122.502124",
    )
    notes: ClassVar[bool] = True
    surveys: ClassVar[bool] = True

    weights: tuple[float, ...] | None = None
    max_iterations: int = 1000
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        require_shares(self.weights)
        if self.max_iterations < 0 or not self.tolerance > 0:
            raise MergeError(
                "max_iterations must not be negative and tolerance be above 0, "
                f"got {self.max_iterations} and {self.tolerance}"
            )

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of weights.

        Raises:
            MergeError: If there is not one weight per member.
        """
        super().check(inputs)
        self._weights(inputs)

    def survey(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the members' factors, (1, K)."""
        gram_KK = gram_matrices(tensors)[0]
        weights_K, norms_K = self._weights(tensors.inputs), norms_of(gram_KK)
        directed_K = torch.where(norms_K > 0, weights_K, 0.0)
        if not directed_K.any():
            return weights_K[None]
        mean_K, step = spherical_mean(
            cosines(gram_KK), directed_K / directed_K.sum(), self.max_iterations, self.tolerance
        )
        if mean_K is None:
            note(tensors.inputs, "averaged", tensors.name, "the members have no mean direction")
            return weights_K[None]
        if step > self.tolerance:
            note(tensors.inputs, "not_converged", tensors.name, step)
        return (weights_K @ norms_K * torch.where(norms_K > 0, mean_K / norms_K, 0.0))[None]

    def blend(self, pieces: MemberTensors, survey: Tensor) -> Tensor:
        """Return the entries of the mean direction at the mean length."""
        return mix(pieces, survey)

    def _weights(self, inputs: MergeInputs) -> Tensor:
        weights = per_member(1.0 if self.weights is None else self.weights, inputs, "karcher: weights")
        return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def spherical_mean(
    cosines_KK: Tensor, weights_K: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor | None, float]:
    """Find the Karcher mean of unit vectors, as coefficients of them.

    Args:
        cosines_KK: Their inner products, float64.
        weights_K: Weights, not negative, their sum 1; 0 for a vector without direction.
        max_iterations: Steps after which to give up.
        tolerance: Step length at which the mean is reached.

    Returns:
        The mean's coefficients, (K,), null where a vector of positive weight is opposite to it or all cancel out; and
        the last step's length.
    """

    def length(coefficients_K: Tensor) -> float:
        return math.sqrt(max(float(coefficients_K @ cosines_KK @ coefficients_K), 0.0))

    mean_K, step = weights_K.clone(), math.inf
    for iteration in range(max_iterations + 1):
        size = length(mean_K)
        if size < 1e-8:
            return None, step
        mean_K = mean_K / size
        to_mean_K = (cosines_KK @ mean_K).clamp(-1, 1)
        if bool(((to_mean_K < OPPOSITE - 1) & (weights_K > 0)).any()):
            return None, step
        sine_K = ((1 - to_mean_K) * (1 + to_mean_K)).sqrt()
        # log_m(u) = theta / sin(theta) (u - cos(theta) m), whose factor is 1 where the angle vanishes.
        pull_K = weights_K * torch.where(sine_K > 0, torch.acos(to_mean_K) / sine_K, 1.0)
        tangent_K = pull_K - (pull_K @ to_mean_K) * mean_K
        step = length(tangent_K)
        if step <= tolerance or iteration == max_iterations:
            break
        mean_K = math.cos(step) * mean_K + math.sin(step) / step * tangent_K
    return mean_K / length(mean_K), step
