"""SCE: select where the members differ most, calculate their coefficients, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.task_vectors import elected, require_finite, require_fractions
from hf_zoo.trimming import kth_largest, num_kept


@dataclass(frozen=True)
class Selection:
    """What is known of a tensor.

    Attributes:
        least: The smallest variance over the members of an entry that is merged.
        coefficients: Every member's weight; they sum to one.
    """

    least: float
    coefficients: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sce(ElementwiseMethod):
    """Merge the entries the members disagree on most, weighted by their energy, without minority signs.

    Wan et al. (2024), section 3.3, tensor by tensor. Select: the `select_topk` of the entries with the largest
    variance over the members' task vectors. Calculate: a member's coefficient is the sum of squares of its selected
    entries, divided by that of all members. Erase: an entry whose sign is not that of the sum over the members is set
    to zero. The sum of what is left, weighted by the coefficients and times `scale`, is added to the base. Entries
    equal to the smallest selected variance are selected too.

    mergekit divides by the coefficients of the members that agree (`normalize: true`), counts the fraction among the
    entries that differ at all, and weighs all members alike where their mean squares sum to less than 1e-6, which they
    do for most fine-tuned models; the coefficients are exact here.

    Attributes:
        select_topk: Fraction of each tensor's entries to merge; tau in the paper.
        normalize: Divide each entry by the coefficients of the members that agree with its sign.
        scale: Multiplies the merged vector.
        tie: What becomes of an entry whose signs weigh the same: `zero` leaves the base, `positive` keeps the positive
            side, as mergekit does.
    """

    paper: ClassVar[Paper] = Paper(
        "FuseChat: Knowledge Fusion of Chat Models", "Wan et al.", 2024, "https://arxiv.org/abs/2408.07990"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    surveys: ClassVar[bool] = True

    select_topk: float = 0.1
    normalize: bool = False
    scale: float = 1.0
    tie: Literal["zero", "positive"] = "zero"

    def __post_init__(self) -> None:
        require_fractions("sce", select_topk=self.select_topk)
        require_finite("sce", scale=self.scale)

    def survey(self, tensors: MemberTensors, overview: None) -> Selection:
        """Return the smallest variance that is selected, and the members' coefficients."""
        least = 0.0
        if self.select_topk < 1 and len(tensors) > 1:
            rank = num_kept(self.select_topk, tensors.numel)
            ((least,),) = kth_largest([tensors], [(rank,)], rows=_variance_row)
        energies = torch.zeros(len(tensors), dtype=torch.float64)
        for piece in tensors.pieces():
            for index, vector in enumerate(_selected(list(piece.task_vectors()), least)):
                energies[index] += vector.square_().sum(dtype=torch.float64).cpu()
        total = float(energies.sum())
        if total == 0:
            return Selection(least, (1 / len(tensors),) * len(tensors))
        return Selection(least, tuple((energies / total).tolist()))

    def blend(self, pieces: MemberTensors, survey: Selection) -> Tensor:
        """Return the base plus the weighted sum of what agrees; a piece of every member is held."""
        base = pieces.base
        vectors = _selected([member - base for member in pieces], survey.least)
        total = vectors[0].clone()
        for vector in vectors[1:]:
            total.add_(vector)
        merged = elected(vectors, survey.coefficients, tie=self.tie, mean=self.normalize, choice=total)
        return merged.mul_(self.scale).add_(base)


def variance(vectors: list[Tensor]) -> Tensor:
    """Return each entry's variance over the members: the mean squared distance to their mean."""
    mean = vectors[0].clone()
    for vector in vectors[1:]:
        mean.add_(vector)
    mean.div_(len(vectors))
    total = torch.zeros_like(mean)
    for vector in vectors:
        distance = vector - mean
        total.addcmul_(distance, distance)
    return total.div_(len(vectors))


def _variance_row(piece: MemberTensors) -> Iterator[Tensor]:
    yield variance(list(piece.task_vectors()))


def _selected(vectors: list[Tensor], least: float) -> list[Tensor]:
    """Set the entries whose variance is too small to zero, in place."""
    if least > 0:
        selected = variance(vectors) >= least
        for vector in vectors:
            vector.mul_(selected)
    return vectors
