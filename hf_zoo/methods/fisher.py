"""The mean of the members, weighted entry by entry by their diagonal Fisher information."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.information import check_fishers, fisher_of, has_fisher, moment_of
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member, require_shares


@dataclass(frozen=True, kw_only=True)
class Fisher(ElementwiseMethod):
    """Average the members, each entry weighted by its diagonal Fisher information.

    Equation 4 of Matena & Raffel (2022): `theta = sum_i lambda_i F_i theta_i / sum_i lambda_i F_i`. Tensors without a
    Fisher, such as running statistics, get the mean weighted by lambda, as do entries whose Fishers are all zero.

    Attributes:
        weights: One per member, the paper's lambda, none negative, their sum positive. Null weighs all alike.
        floor: Least Fisher of an entry, 0 or more. It is compared with the Fisher as it was estimated, a mean over
            examples; where entries are mostly smaller, the merge comes close to the plain mean.
        normalize: Divide each member's floored Fisher by its L2 norm over the whole model, so that no member weighs
            more because its loss is steeper.
        favour_target: Raise to the floor only the first member's Fisher: where all are zero, its value is kept.
    """

    paper: ClassVar[Paper] = Paper(
        "Merging models with Fisher-weighted averaging",
        "Matena & Raffel",
        2022,
        "https://arxiv.org/abs/2111.09832",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FISHER})

    weights: tuple[float, ...] | None = None
    floor: float = 1e-6
    normalize: bool = False
    favour_target: bool = False

    def __post_init__(self) -> None:
        require_shares(self.weights)
        if not 0 <= self.floor < math.inf:
            raise MergeError(f"floor must be 0 or more and finite, got {self.floor}")

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse Fishers of other models and a wrong number of weights.

        Raises:
            MergeError: If Fishers and members do not fit, or there is not one weight per member.
        """
        super().check(inputs)
        check_fishers(inputs, self.name())
        if self.weights is not None:
            per_member(self.weights, inputs, "fisher: weights")

    def overview(self, inputs: MergeInputs) -> tuple[float, ...]:
        """Return the factor of every member's Fisher: its weight, over the Fisher's norm where that is asked for.

        Raises:
            MergeError: If a Fisher to normalize is zero everywhere.
        """
        assert inputs.fisher is not None
        weights = per_member(self.weights or 1.0, inputs, "fisher: weights")
        if not self.normalize:
            return weights
        norms = [math.sqrt(moment_of(fisher, 2)[0]) for fisher in inputs.fisher]
        for fisher, norm in zip(inputs.fisher, norms, strict=True):
            if norm == 0:
                raise MergeError(
                    f"fisher: the Fisher of {fisher.source} is zero everywhere and has no norm: estimate it again"
                )
        inputs.report["fisher_norms"] = dict(zip([member.source for member in inputs.members], norms, strict=True))
        # Only ratios matter: a largest factor of one keeps products away from the ends of float32.
        factors = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
        return tuple(factor / max(factors) for factor in factors)

    def blend(self, pieces: MemberTensors, survey: tuple[float, ...]) -> Tensor:
        """Return the weighted mean; one member's entries and Fisher are held at a time."""
        if not has_fisher(pieces):
            return weighted_mean(pieces, self.weights)
        total = weight = torch.empty(0)
        for index, member in enumerate(pieces):
            fisher = fisher_of(pieces, index)
            if self.floor and (index == 0 or not self.favour_target):
                fisher = fisher.clamp(min=self.floor)
            fisher = fisher * survey[index]
            if index:
                total.addcmul_(fisher, member)
                weight.add_(fisher)
            else:
                total, weight = fisher * member, fisher
        unknown = weight == 0
        merged = total.div_(weight)
        if bool(unknown.any()):
            merged = torch.where(unknown, weighted_mean(pieces, self.weights), merged)
        return merged
