"""PCB-merging: entries compete, within their task vector and with those of other tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member
from hf_zoo.task_vectors import require_finite, require_fractions
from hf_zoo.trimming import least_kept

_TINY = 1e-30


@dataclass(frozen=True)
class Balance:
    """What is known of the whole task vectors; K members.

    Attributes:
        lowest: The smallest product of two members' entries, (K, K).
        highest: The largest, (K, K).
        within: Mean over the entries of exp(K (n - 1)), n the normalised square of a member's entry, (K,).
        between: Mean over the entries of exp(n - 1), n the normalised product of two members' entries, (K, K).
        least: The smallest balance each member keeps, (K,).
    """

    lowest: Tensor
    highest: Tensor
    within: Tensor
    between: Tensor
    least: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pcb(ElementwiseMethod):
    """Weight every entry by how it competes within its task vector and with the other task vectors.

    Du et al. (2024), section 3. With K members, Norm scaling a whole vector to [0, 1] and Softmax going over all its
    entries, the balance of task i is

        beta_i = Softmax(K Norm(tau_i * tau_i)) * sum_j Softmax(Norm(tau_i * tau_j)).

    Each task keeps the `density` of its entries with the largest balance; the merged vector is the mean of the task
    vectors, weighted entry by entry with what is kept of the balances, and is added to the base. The vectors are the
    whole model's. The authors' published code differs: it takes tanh(tau_i sum_j tau_j) for the second factor and
    shifts what is kept down to zero.

    The cost grows with the square of the number of members: 4 K^2 exponentials an entry.

    Attributes:
        density: Fraction of the entries each task keeps; r in the paper, 0.2 without held-out data.
        scale: Multiplies a task's vector, one for all or one per member; lambda in the paper.
    """

    paper: ClassVar[Paper] = Paper(
        "Parameter Competition Balancing for Model Merging", "Du et al.", 2024, "https://arxiv.org/abs/2410.02396"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    density: float = 0.2
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        require_fractions("pcb", density=self.density)
        require_finite("pcb", scale=self.scale)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of scales.

        Raises:
            MergeError: If there is not one per member.
        """
        super().check(inputs)
        per_member(self.scale, inputs, "pcb: scale")

    def overview(self, inputs: MergeInputs) -> Balance:
        """Return what normalises the balances, and the smallest that each member keeps: four passes over the model."""
        tensors = list(inputs.floating())
        known = _normalisers(tensors, len(inputs.members), inputs.device)
        densities = (self.density,) * len(inputs.members)
        least = least_kept(tensors, densities, partial(_balances_of_piece, known=known))
        return Balance(known.lowest, known.highest, known.within, known.between, least)

    def blend(self, pieces: MemberTensors, survey: Balance) -> Tensor:
        """Return the base plus the balanced mean; a piece of every member is held."""
        base = pieces.base
        vectors = [member - base for member in pieces]
        total, weight = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
        scales = per_member(self.scale, pieces.inputs, "pcb: scale")
        for balance, vector, least, scale in zip(
            balances(vectors, survey), vectors, survey.least, scales, strict=True
        ):
            balance.mul_(balance >= least)
            weight.add_(balance)
            total.addcmul_(balance, vector, value=scale)
        return total.div_(weight.clamp_(min=_TINY)).add_(base)


def balances(vectors: list[Tensor], known: Balance) -> list[Tensor]:
    """Return each entry's balance, times the square of the number of entries, which cancels in the merge.

    Args:
        vectors: The members' task vectors, flat.
        known: What normalises them.
    """
    found = []
    for i, vector in enumerate(vectors):
        inter = torch.zeros_like(vector)
        for j, other in enumerate(vectors):
            inter.add_(_normalised(vector, other, known, i, j).sub_(1).exp_().div_(known.between[i, j]))
        intra = _normalised(vector, vector, known, i, i).sub_(1).mul_(len(vectors)).exp_().div_(known.within[i])
        found.append(inter.mul_(intra))
    return found


def _balances_of_piece(piece: MemberTensors, known: Balance) -> list[Tensor]:
    return balances(list(piece.task_vectors()), known)


def _normalised(vector: Tensor, other: Tensor, known: Balance, i: int, j: int) -> Tensor:
    """Return products scaled to [0, 1] over the whole model; zero where all products are alike."""
    low, high = known.lowest[i, j], known.highest[i, j]
    return (vector * other).sub_(low).mul_(1 / (high - low) if high > low else 0.0)


def _normalisers(tensors: list[MemberTensors], count: int, device: str) -> Balance:
    """Find the range of every product, then the means of the exponentials."""
    wide = {"dtype": torch.float64, "device": device}
    lowest = torch.full((count, count), torch.inf, **wide)  # type: ignore[call-overload]
    highest = -lowest
    pieces = [piece for tensor in tensors for piece in tensor.pieces() if piece.numel]
    for piece in pieces:
        vectors = list(piece.task_vectors())
        for i, vector in enumerate(vectors):
            for j, other in enumerate(vectors):
                low, high = torch.aminmax(vector * other)
                lowest[i, j] = torch.minimum(lowest[i, j], low.double())
                highest[i, j] = torch.maximum(highest[i, j], high.double())
    known = Balance(lowest, highest, torch.zeros(count, **wide), torch.zeros(count, count, **wide))  # type: ignore[call-overload]
    for piece in pieces:
        vectors = list(piece.task_vectors())
        for i, vector in enumerate(vectors):
            for j, other in enumerate(vectors):
                scaled = _normalised(vector, other, known, i, j).sub_(1)
                known.between[i, j] += scaled.exp().sum(dtype=torch.float64)
                if i == j:
                    known.within[i] += scaled.mul_(count).exp_().sum(dtype=torch.float64)
    size = max(1, sum(piece.numel for piece in pieces))
    known.between.div_(size)
    known.within.div_(size)
    return known
