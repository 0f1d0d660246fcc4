"""How members' task vectors lie to one another: the cosines between them, and where their signs conflict.

One pass over members and base, piece by piece: the memory does not grow with the models. Sums over entries add up, so
what holds of a group of tensors or of the whole model follows from what was found tensor by tensor.
"""

# K = members, L = entries of a piece

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hf_zoo.geometry import FEWEST_ENTRIES, SURVEYED_ENTRIES, cosines
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import Put, Work
from hf_zoo.streaming import run_works


@dataclass(frozen=True)
class Relations:
    """Sums over some entries of the task vectors v_1 ... v_K, in float64.

    Attributes:
        gram_KK: Inner products.
        opposed_KK: Entries two members moved in opposite directions.
        shared_KK: Entries two members moved.
        mixed: Entries on which not all members that moved them agree.
        moved: Entries two or more members moved.
        added: Sum of |v_1 + ... + v_K|.
        apart: Sum of |v_1| + ... + |v_K|.
    """

    gram_KK: Tensor
    opposed_KK: Tensor
    shared_KK: Tensor
    mixed: float
    moved: float
    added: float
    apart: float

    @classmethod
    def none(cls, count: int) -> Relations:
        """Return the sums over no entries of so many members."""
        zeros = torch.zeros(count, count, dtype=torch.float64)
        return cls(zeros, zeros, zeros, 0.0, 0.0, 0.0, 0.0)

    def __add__(self, other: Relations) -> Relations:
        return Relations(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def cosines_KK(self) -> Tensor:
        """Cosines of task vectors, in [-1, 1]; 0 where one did not move."""
        return cosines(self.gram_KK)

    @property
    def conflicts_KK(self) -> Tensor:
        """Share of the entries two members moved that they moved in opposite directions, in [0, 1]."""
        return self.opposed_KK / self.shared_KK.clamp(min=1)

    @property
    def conflict(self) -> float:
        """Share of the entries two or more members moved on which their signs differ, in [0, 1]."""
        return self.mixed / self.moved if self.moved else 0.0

    @property
    def cancelled(self) -> float:
        """Share of the members' movement that is lost when task vectors are added, in [0, 1]."""
        return max(1 - self.added / self.apart, 0.0) if self.apart else 0.0


def relate(tensors: MemberTensors) -> Relations:
    """Return how the task vectors of one tensor relate.

    Args:
        tensors: A floating tensor of every member, whole, and the base's.
    """
    count = len(tensors)
    size = min(max(SURVEYED_ENTRIES // count, FEWEST_ENTRIES), max(tensors.numel, 1))
    found = Relations.none(count)
    for piece in tensors.pieces(size):
        if piece.numel:
            found = found + _relate_piece(torch.stack([vector.double() for vector in piece.task_vectors()]))
    return found


def relate_all(inputs: MergeInputs, names: Sequence[str], num_threads: int | None = None) -> dict[str, Relations]:
    """Return name -> how its task vectors relate; the same bits for any number of threads.

    Args:
        inputs: Members and base.
        names: Floating tensors that members and base have.
        num_threads: Threads; null for one a core.
    """
    found: dict[str, Relations] = {}

    def work(name: str) -> Work:
        def run(_: Put) -> None:
            found[name] = relate(inputs.tensors(name))

        return Work(inputs.layout[name].numel, run, name)

    run_works(lambda: map(work, names), lambda *_: None, num_threads)
    return {name: found[name] for name in names}


def total_of(relations: Iterable[Relations], count: int) -> Relations:
    """Return the relations of several tensors together.

    Args:
        relations: Those of each.
        count: Number of members.
    """
    return reduce(Relations.__add__, relations, Relations.none(count))


def pair_rows(values_KK: Tensor, labels: Sequence[str], key: str) -> list[dict[str, Any]]:
    """Return one row a pair of members: `first`, `second` and a value."""
    return [
        {"first": labels[i], "second": labels[j], key: float(values_KK[i, j])}
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
    ]


def cosine_row(relations: Relations) -> dict[str, float]:
    """Return mean, smallest and largest cosine over pairs of members; nothing for one member."""
    count = len(relations.gram_KK)
    if count < 2:
        return {}
    above = torch.triu_indices(count, count, 1)
    values = relations.cosines_KK[above[0], above[1]]
    return {"mean": float(values.mean()), "smallest": float(values.min()), "largest": float(values.max())}


def conflict_row(relations: Relations) -> dict[str, float]:
    """Return the share of entries in conflict, and the share of movement that cancels when vectors are added."""
    return {"conflict": relations.conflict, "cancelled": relations.cancelled}


def _relate_piece(vectors_KL: Tensor) -> Relations:
    # Counts of up to 2^24 entries are exact in float32, and its matrix products twice as fast.
    up_KL, down_KL = (vectors_KL > 0).float(), (vectors_KL < 0).float()
    any_KL = up_KL + down_KL
    opposed_KK = up_KL @ down_KL.T
    movers_L = any_KL.sum(0)
    mixed_L = (up_KL.amax(0) > 0) & (down_KL.amax(0) > 0)
    return Relations(
        (vectors_KL @ vectors_KL.T).cpu(),
        (opposed_KK + opposed_KK.T).double().cpu(),
        (any_KL @ any_KL.T).double().cpu(),
        float(mixed_L.sum()),
        float((movers_L > 1).sum()),
        float(vectors_KL.sum(0).abs().sum()),
        float(vectors_KL.abs().sum()),
    )
