"""Which entries of a task vector are kept: the largest, by exact thresholds, or some by chance.

A threshold is the k-th largest of many values. It is found by counting, never by sorting: the bits of a non-negative
float are ordered like the float, so a histogram of their upper sixteen tells which bin holds the k-th, and a second
pass over the values, now only over those of that bin, tells its lower sixteen. Values come piece by piece and are not
kept, so a threshold over a whole model costs a megabyte a member, and it does not depend on the pieces or their order.

Entries equal to a threshold are all kept, as in the published code of TIES: which of equal entries were to go would
otherwise depend on the order they are stored in. Where many are equal (bfloat16 weights differ by few distinct
amounts) somewhat more than the density asks for is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hf_zoo.inputs import MemberTensors

_DIGIT = 16
_BINS = 1 << _DIGIT
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

Rows = Callable[[MemberTensors], Iterable[Tensor]]


def num_kept(density: float, count: int) -> int:
    """Return how many of some entries a density keeps: rounded down, but at least one where there are any."""
    return min(count, max(1, int(density * count)))


def magnitudes(piece: MemberTensors) -> Iterator[Tensor]:
    """Yield the magnitudes of every member's task vector, flat."""
    return (vector.abs_() for vector in piece.task_vectors())


def kth_largest(
    tensors: Iterable[MemberTensors], ranks: Sequence[Sequence[int]], rows: Rows = magnitudes
) -> list[tuple[float, ...]]:
    """Find the k-th largest of the values of each row, exactly.

    Args:
        tensors: The tensors the values are made of: one, or those of a whole model.
        ranks: For each row the ranks wanted, from 1 for the largest to the number of values; none for a row that is
            not looked at.
        rows: Makes of a piece the values of every row: flat, non-negative, in float32 or float64; by default the
            magnitudes of the members' task vectors. They may be overwritten.

    Returns:
        For each row the values at its ranks; zeros where there are no values at all.
    """
    whole = list(tensors)
    if not any(ranks):
        return [() for _ in ranks]
    if not sum(tensor.numel for tensor in whole):
        return [(0.0,) * len(wanted) for wanted in ranks]
    if len(whole) == 1 and len(pieces := list(whole[0].pieces())) == 1:
        return [
            _partitioned(values, wanted) if wanted else ()
            for values, wanted in zip(rows(pieces[0]), ranks, strict=True)
        ]
    return _by_digits(whole, ranks, rows)


def least_kept(
    tensors: Sequence[MemberTensors], densities: Sequence[float], rows: Rows = magnitudes
) -> tuple[float, ...]:
    """Return the smallest value that each row keeps where a density of its largest is kept.

    Args:
        tensors: The tensors among whose entries the largest are chosen: one, or those of a whole model.
        densities: Fraction of the values to keep, one a row; at 1 nothing is looked for and zero returned.
        rows: As for `kth_largest`.
    """
    count = sum(tensor.numel for tensor in tensors)
    ranks = [() if density == 1 else (num_kept(density, count),) for density in densities]
    return tuple(found[0] if found else 0.0 for found in kth_largest(tensors, ranks, rows))


def trim(vector: Tensor, threshold: float) -> Tensor:
    """Return a vector with its entries below a threshold in magnitude set to zero; those equal to it are kept."""
    if threshold <= 0:
        return vector
    kind = np.float64 if vector.dtype == torch.float64 else np.float32
    # `hardshrink` also drops what is equal to its bound, so the bound is the float below.
    return torch.nn.functional.hardshrink(vector, float(np.nextafter(kind(threshold), kind(0))))


def drop_at_random(vector: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Set entries to zero in place, each kept by itself with a probability of exactly the density.

    Every entry takes sixteen random bits. The few that fall on the density's own bin, in which sixteen bits cannot
    decide, are decided by a further draw.

    Args:
        vector: Flat, contiguous, in float32 or float64.
        density: Probability to be kept, from 0 to 1.
        draw: Source of chance, on the processor.

    Returns:
        The vector.
    """
    if density >= 1:
        return vector
    words = torch.empty((vector.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=draw)
    bits = words.view(torch.int16)[: vector.numel()]
    level = int(density * _BINS)
    integer = _INTEGERS[vector.dtype]
    # The sign of the difference, spread over all bits: all ones below the level, zero from it on.
    kept = bits.to(integer).sub_(level - _BINS // 2).bitwise_right_shift_(8 * integer.itemsize - 1)
    undecided = np.flatnonzero(bits.numpy() == level - _BINS // 2)
    if len(undecided):
        coins = torch.rand(len(undecided), generator=draw, dtype=torch.float64)
        kept[torch.from_numpy(undecided)[coins < density * _BINS - level]] = -1
    vector.view(integer).bitwise_and_(kept.to(vector.device))
    return vector


def _partitioned(values: Tensor, ranks: Sequence[int]) -> tuple[float, ...]:
    if not values.numel():
        return (0.0,) * len(ranks)
    places = [values.numel() - rank for rank in ranks]
    ordered = np.partition(values.cpu().numpy(), sorted(set(places)))  # vectorised; ten times faster than `kthvalue`
    return tuple(float(ordered[place]) for place in places)


def _by_digits(
    tensors: Sequence[MemberTensors], ranks: Sequence[Sequence[int]], rows: Rows
) -> list[tuple[float, ...]]:
    """Find the bits of every wanted value, sixteen at a time from the upper end; one pass over the values for each."""
    kind = torch.float64 if any(map(_is_double, tensors)) else torch.float32
    num_bits = 8 * kind.itemsize
    found = [
        {rank: (0, rank) for rank in wanted} for wanted in ranks
    ]  # rank -> upper bits, rank among those with them
    for shift in range(num_bits - _DIGIT, -1, -_DIGIT):
        counts = [{upper: _Histogram(upper, shift, num_bits) for upper, _ in row.values()} for row in found]
        for piece in chain.from_iterable(tensor.pieces() for tensor in tensors):
            for values, of_row in zip(rows(piece), counts, strict=True):
                for histogram in of_row.values():
                    histogram.add(values.to(kind))
        for row, of_row in zip(found, counts, strict=True):
            for rank, (upper, within) in row.items():
                row[rank] = of_row[upper].find(within)
    integer, floats = (np.int64, np.float64) if num_bits == 64 else (np.int32, np.float32)
    return [
        tuple(float(integer(row[rank][0]).view(floats)) for rank in wanted)
        for row, wanted in zip(found, ranks, strict=True)
    ]


def _is_double(tensors: MemberTensors) -> bool:
    inputs = tensors.inputs
    readers = (*inputs.members, *(() if inputs.base is None else (inputs.base,)))
    return torch.float64 in {inputs.dtype, *(reader.dtype(tensors.name) for reader in readers)}


class _Histogram:
    """Counts of the next sixteen bits of those values whose upper bits are known.

    Args:
        upper: The known bits.
        shift: Place of the lowest bit that is counted.
        num_bits: Bits of a value.
    """

    def __init__(self, upper: int, shift: int, num_bits: int) -> None:
        self.upper = upper
        self.shift = shift
        self.is_first = shift + _DIGIT == num_bits
        self.counts = np.zeros(_BINS, np.int64)
        # Few values of a piece are left in later passes: they are gathered, in one place, and counted together. Many
        # small tensors kept between large ones would keep the memory of the large ones from being used again.
        self.waiting = torch.empty(0 if self.is_first else _BINS, dtype=torch.int64)
        self.num_waiting = 0

    def add(self, values: Tensor) -> None:
        """Count values, flat and non-negative."""
        bits = values.view(_INTEGERS[values.dtype])
        if not self.is_first:
            # numpy compares and selects with vector instructions, torch does not
            plain = bits.numpy() if bits.device.type == "cpu" else bits
            bits = torch.as_tensor(plain[plain >> (self.shift + _DIGIT) == self.upper])
            bits &= (1 << (self.shift + _DIGIT)) - 1
        bits = bits >> self.shift
        if self.num_waiting + len(bits) > len(self.waiting):
            self._count(self.waiting[: self.num_waiting])
            self.num_waiting = 0
        if len(bits) > len(self.waiting):
            self._count(bits)
        else:
            self.waiting[self.num_waiting : self.num_waiting + len(bits)] = bits
            self.num_waiting += len(bits)

    def find(self, rank: int) -> tuple[int, int]:
        """Return the bits of the bin that holds a rank from the largest, and the rank within it."""
        self._count(self.waiting[: self.num_waiting])
        at_least = self.counts[::-1].cumsum()[::-1]
        digit = int(np.count_nonzero(at_least >= rank)) - 1
        above = int(at_least[digit + 1]) if digit + 1 < _BINS else 0
        return (self.upper << _DIGIT) | digit, rank - above

    def _count(self, digits: Tensor) -> None:
        counts = torch.bincount(digits).cpu().numpy()
        self.counts[: len(counts)] += counts
