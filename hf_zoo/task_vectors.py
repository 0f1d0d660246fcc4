"""Task vectors combined into one: their weighted sum, or the mean of those that agree with an elected sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import Method, Need, per_member

# Smaller than any weight: nothing divided by it stays nothing where no member has a say.
_TINY = 1e-30

Election = Literal["none", "total", "count"]


@dataclass(frozen=True, kw_only=True)
class TaskVectorMethod(Method):
    """Add to the base one vector made of the members' task vectors.

    Attributes:
        election: How signs are elected: not at all (`none`: the vectors are added), by the sum of what is for each
            sign (`total`), or by the number of members (`count`).
        weights: How much each task vector counts; null counts all once, a negative one subtracts.
        normalize: Divide by the weights that took part: of all members in a plain sum, of those that agree where
            signs are elected. Null divides only where signs are elected, as in TIES.
        scale: Multiplies the merged vector; a negative one takes it away.
        tie: What becomes of an entry whose signs weigh the same: `zero` leaves the base, as sgn(0) = 0 in the paper
            of TIES; `positive` elects the positive side, as mergekit does.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    election: Election = "none"
    weights: float | tuple[float, ...] | None = None
    normalize: bool | None = None
    scale: float = 1.0
    tie: Literal["zero", "positive"] = "zero"

    def __post_init__(self) -> None:
        require_finite(self.name(), weights=self.weights, scale=self.scale)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of weights.

        Raises:
            MergeError: If there is not one weight per member, or a sum is to be divided by weights that cancel.
        """
        super().check(inputs)
        weights = weights_of(self.weights, inputs, self.name())
        if self.election == "none" and self.normalize and abs(sum(weights)) < 1e-8:
            raise MergeError(f"{self.name()}: weights {list(weights)} sum to 0: set `normalize: false`")

    def added(self, base: Tensor, vectors: Iterable[Tensor], inputs: MergeInputs) -> Tensor:
        """Return the base plus the merged vector.

        Args:
            base: The base's entries, (*shape).
            vectors: The members' vectors, (*shape) each, in memory of their own; they are overwritten.
            inputs: The merge's inputs.
        """
        weights = weights_of(self.weights, inputs, self.name())
        if self.election == "none":
            merged = weighted_sum(vectors, weights)
            if self.normalize:
                merged.div_(sum(weights))
        else:
            merged = elected(vectors, weights, self.election, self.tie, self.normalize is not False)
        return merged.mul_(self.scale).add_(base) if self.scale != 1 else merged.add_(base)


def weights_of(weights: float | Sequence[float] | None, inputs: MergeInputs, method: str) -> tuple[float, ...]:
    """Return every member's weight; 1 where there are none.

    Raises:
        MergeError: If there is not one a member.
    """
    return per_member(1.0 if weights is None else weights, inputs, f"{method}: weights")


def weighted_sum(vectors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of vectors, one in memory at a time.

    Args:
        vectors: In memory of their own, of one shape; the first is overwritten.
        weights: One each.
    """
    total: Tensor | None = None
    for vector, weight in zip(vectors, weights, strict=True):
        if total is None:
            total = vector.mul_(weight) if weight != 1 else vector
        else:
            total.add_(vector, alpha=weight)
    assert total is not None
    return total


def elected(
    vectors: Iterable[Tensor],
    weights: Sequence[float],
    election: Literal["total", "count"] = "total",
    tie: Literal["zero", "positive"] = "zero",
    mean: bool = True,
    choice: Tensor | None = None,
) -> Tensor:
    """Elect a sign for each entry and merge the members that agree with it (TIES, Yadav et al. 2023, section 3).

    With w the weights and v the vectors, the sign of an entry is that of sum w v (`total`), or the one more members
    have (`count`); merged are the entries w v of that sign, divided by the weights |w| of those members for the mean
    (the paper's disjoint mean, where zeros take no part). One vector is held at a time.

    Args:
        vectors: In memory of their own, of one shape; they are overwritten.
        weights: One each.
        election: What a sign is elected by.
        tie: What becomes of entries whose signs weigh the same.
        mean: Divide by the weights; otherwise the sum.
        choice: Numbers whose signs are the elected ones, where something else has decided; it is overwritten.
    """
    # For both signs: the sum of its entries, and the weights or the number of the members that have it.
    sums: list[Tensor] = []
    parts: list[Tensor] = []
    for vector, weight in zip(vectors, weights, strict=True):
        if weight != 1:
            vector.mul_(weight)
        positive = torch.relu(vector)
        negative = vector.sub_(positive)
        if not sums:
            sums = [torch.zeros_like(positive), torch.zeros_like(positive)]
            parts = [torch.zeros_like(positive) for _ in range(4)]
        for place, (side, sign) in enumerate(((positive, 1.0), (negative, -1.0))):
            sums[place].add_(side)
            if mean or election == "count":
                side.sign_()
            if mean:
                parts[place].add_(side, alpha=sign * abs(weight))
            if election == "count":
                parts[place + 2].add_(side)
    if choice is None:
        choice = torch.add(sums[0], sums[1]) if election == "total" else torch.add(parts[2], parts[3])
    choice.sign_()
    to_positive = torch.relu(choice)
    to_negative = to_positive - choice  # 1 where the negative side is elected
    if tie == "positive":
        to_positive = 1 - to_negative
    merged = sums[0].mul_(to_positive).addcmul_(sums[1], to_negative)
    if mean:
        merged.div_(parts[0].mul_(to_positive).addcmul_(parts[1], to_negative).clamp_(min=_TINY))
    return merged


def require_finite(method: str, **values: Any) -> None:
    """Refuse numbers that are not finite.

    Raises:
        MergeError: If one is not; names it.
    """
    for name, value in values.items():
        if value is not None and not all(map(math.isfinite, value if isinstance(value, tuple) else (value,))):
            raise MergeError(f"{method}: {name} must be finite, got {value}")


def require_fractions(method: str, zero: bool = False, **values: float | tuple[float, ...]) -> None:
    """Refuse what is no fraction.

    Args:
        method: Whose hyper-parameters these are, for the error.
        zero: Whether 0 is allowed.
        **values: Name -> one fraction, or one a member.

    Raises:
        MergeError: If a value does not lie in (0, 1], or [0, 1] with `zero`; names it.
    """
    for name, value in values.items():
        for one in value if isinstance(value, tuple) else (value,):
            if not (0 < one <= 1 or (zero and one == 0)):
                raise MergeError(f"{method}: {name} must lie in {'[' if zero else '('}0, 1], got {one}")
