"""The mean direction of many members at their mean length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.geometry import cosines, gram_matrices, mix, norms_of, note
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member, require_shares


@dataclass(frozen=True, kw_only=True)
class Multislerp(ElementwiseMethod):
    """Give the members' mean direction their mean length, tensor by tensor.

    Goddard (2025) projects the members' directions to the tangent space at their weighted mean direction, averages
    them there and projects back. The average there is zero, since the tangent space was laid at the mean itself, so
    the result is the weighted mean direction: where the steps to the `karcher` mean begin. mergekit's `multislerp` is
    the same; a `base_model` there is `task_vectors: true` here. Where directions cancel out, which has no answer,
    mergekit refuses more than two members; here such a tensor gets the members' weighted mean and is named in the
    report as `averaged`.

    Attributes:
        weights: One for each member, not negative, some positive. Null weighs all alike.
        normalize: Whether weights are made to sum to one; if not, their sum scales the length.
        task_vectors: Whether the members' differences to the base are merged and added to it, not the weights.
    """

    paper: ClassVar[Paper] = Paper(
        "Multi-SLERP", "Goddard", 2025, "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    )
    notes: ClassVar[bool] = True
    surveys: ClassVar[bool] = True

    weights: tuple[float, ...] | None = None
    normalize: bool = True
    task_vectors: bool = False

    def __post_init__(self) -> None:
        require_shares(self.weights)
        if self.task_vectors:
            object.__setattr__(self, "needs", frozenset({Need.BASE}))

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of weights.

        Raises:
            MergeError: If there is not one weight per member.
        """
        super().check(inputs)
        self._weights(inputs)

    def survey(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the members' factors, (1, K)."""
        gram_KK = gram_matrices(tensors, task_vectors=self.task_vectors)[0]
        weights_K, norms_K = self._weights(tensors.inputs), norms_of(gram_KK)
        directed_K = torch.where(norms_K > 0, weights_K, 0.0)
        length = (directed_K @ cosines(gram_KK) @ directed_K).clamp(min=0).sqrt() / directed_K.sum().clamp(min=1e-300)
        if length < 1e-8:
            if norms_K.any():
                note(tensors.inputs, "averaged", tensors.name, "the members' directions cancel out")
            return weights_K[None]
        factors_K = torch.where(norms_K > 0, directed_K / norms_K, 0.0) / (length * directed_K.sum())
        return (weights_K @ norms_K * factors_K)[None]

    def blend(self, pieces: MemberTensors, survey: Tensor) -> Tensor:
        """Return the entries of the mean direction at the mean length."""
        return mix(pieces, survey, task_vectors=self.task_vectors)

    def _weights(self, inputs: MergeInputs) -> Tensor:
        weights = per_member(1.0 if self.weights is None else self.weights, inputs, "multislerp: weights")
        normalize = self.normalize or self.weights is None
        return torch.tensor(weights, dtype=torch.float64) / (sum(weights) if normalize else 1.0)
