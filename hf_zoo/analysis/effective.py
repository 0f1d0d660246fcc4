"""How much each entry of a member counts in a merge.

The effective weight of a member at an entry is the derivative of the merged entry with respect to the member's own,
what was learned of whole tensors (thresholds, norms) held fixed. Where a merge is `theta_0 + sum_t w_t (theta_t -
theta_0)` with weights that do not depend on the members' values, it is w_t: for gradient matching `alpha_t (H_0 + H_t)
/ (H_0 + sum_t alpha_t H_t)`, for task arithmetic alpha, for the average 1/K. Of a method that selects entries it shows
the selection: 0 where the member was trimmed or outvoted. No method has to say anything for it: its own `blend` is
asked what happens when one member goes a little further.
"""

# K = members, S = sampled entries

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Put, Work
from hf_zoo.streaming import run_works
from hf_zoo.varying import Merger, Part

# Entries of a tensor that are looked at: in a few runs, spread evenly from its first to its last.
NUM_RUNS = 8
RUN_ENTRIES = 512
# How much further a member goes: small enough to stay on its side of a threshold, large enough for float64.
STEP = 2.0**-12
# Movements smaller than this share of the weight are rounding of float32.
LEAST_MOVEMENT = 1e-7
QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}
NUM_BINS = 40


@dataclass(frozen=True)
class Weights:
    """Effective weights of a tensor's sampled entries.

    Attributes:
        values: A member each: weights of the entries it moved, float32.
        size: Entries of the tensor.
    """

    values: tuple[NDArray[np.float32], ...]
    size: int

    def share(self, member: int) -> float:
        """How many entries of the tensor each sampled one stands for."""
        return self.size / max(len(self.values[member]), 1)


def effective_weights(merger: Merger, inputs: MergeInputs, num_threads: int | None = None) -> dict[str, Weights]:
    """Return name -> the members' effective weights on a sample of its entries.

    Left out are tensors that are not merged entry by entry, as those of methods that work on matrices, tensors of
    methods that would have to learn from data again, and tensors only some members have.

    Args:
        merger: The methods, and who makes what.
        inputs: The merge's inputs; nothing is added to their report.
        num_threads: Threads; null for one a core. The result does not depend on it.
    """
    inputs = replace(inputs, report={})
    found: dict[str, Weights] = {}
    works: list[Work] = []
    for part in measured_parts(merger):
        assert isinstance(part.method, ElementwiseMethod)
        works += _works(part.method, part.inputs(inputs), found)
    run_works(lambda: works, lambda *_: None, num_threads)
    return {name: found[name] for name in inputs.layout if name in found}


def measured_parts(merger: Merger) -> list[Part]:
    """Return the parts of a merge whose effective weights can be told."""
    return [
        part
        for part in merger.parts
        if isinstance(part.method, ElementwiseMethod)
        and not part.method.needs & {Need.SCORE, Need.DATA}
        and part.members is None
    ]


def weight_row(weights: Iterable[Weights], member: int) -> dict[str, Any]:
    """Return mean and quantiles of a member's weights over the entries it moved, larger tensors counting more.

    Returns:
        `entries` looked at, and `mean`, `q05`, `median`, `q95`; those are null where the member moved none.
    """
    values, shares = _joined(weights, member)
    row: dict[str, Any] = {"entries": len(values), "mean": None, **dict.fromkeys(QUANTILES)}
    if len(values):
        row["mean"] = float(np.average(values, weights=shares))
        order = np.argsort(values, kind="stable")
        below = np.cumsum(shares[order])
        for name, share in QUANTILES.items():
            row[name] = float(values[order][min(np.searchsorted(below, share * below[-1]), len(values) - 1)])
    return row


def histogram(weights: Sequence[Weights], labels: Sequence[str]) -> dict[str, Any]:
    """Return a histogram of each member's weights.

    Args:
        weights: Those of all tensors.
        labels: The members.

    Returns:
        `edges` of the bins, from the 0.5th to the 99.5th percentile of all weights, which outliers do not stretch, and
        `shares`: member -> share of its entries in each bin; what lies outside counts to the first and last.
    """
    joined = [_joined(weights, member) for member in range(len(labels))]
    every = np.concatenate([values for values, _ in joined]) if joined else np.zeros(0)
    if not len(every):
        return {"edges": [], "shares": {}}
    low, high = (float(value) for value in np.quantile(every, [0.005, 0.995]))
    margin = max(0.05 * (high - low), 1e-3 * max(abs(low), abs(high)), 1e-6)
    edges = np.linspace(low - margin, high + margin, NUM_BINS + 1)
    shares = {}
    for label, (values, sizes) in zip(labels, joined, strict=True):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, weights=sizes)
        shares[label] = (counts / max(counts.sum(), 1e-300)).tolist()
    return {"edges": edges.tolist(), "shares": shares}


class _Probed(MemberTensors):
    """The same entries of every member, one of them gone a little further from the base."""

    def __init__(self, piece: MemberTensors, probed: int, step: float) -> None:
        super().__init__(piece.name, piece.inputs, piece.start, piece.stop)
        self.probed = probed
        self.step = step

    def of_member(self, index: int) -> Tensor:
        """Return a member's entries, moved if it is the probed one."""
        own = super().of_member(index)
        return own + self.step * _movement(own, self) if index % len(self) == self.probed else own


def _movement(own: Tensor, piece: MemberTensors) -> Tensor:
    """Return how far a member went from the base; from zero where there is no base."""
    base = piece.inputs.base
    return own if base is None or piece.name not in base or base.shape(piece.name) != piece.shape else own - piece.base


def _works(method: ElementwiseMethod, inputs: MergeInputs, found: dict[str, Weights]) -> list[Work]:
    # What is learned of whole tensors is learned as the merge does; only the small differences need float64.
    overview = method.overview(inputs)
    wide = replace(inputs, dtype=torch.float64)

    def work(name: str) -> Work:
        def run(_: Put) -> None:
            survey = method.survey(inputs.tensors(name), overview)
            found[name] = _weights_of(method, wide.tensors(name), survey)

        return Work(inputs.layout[name].numel, run, name)

    return [work(name) for name, info in inputs.layout.items() if info.dtype.is_floating_point and info.numel]


def _weights_of(method: ElementwiseMethod, whole: MemberTensors, survey: Any) -> Weights:
    values: list[list[NDArray[np.float32]]] = [[] for _ in whole]
    for piece in _sampled(whole):
        merged = method.blend(piece, survey).clone()
        for member in range(len(whole)):
            own = piece[member]
            movement = _movement(own, piece)
            further, back = (
                (method.blend(_Probed(piece, member, step), survey) - merged) / (step * movement)
                for step in (STEP, -STEP)
            )
            # A step over a threshold is a jump, which divided by the step is huge; the step the other way is none.
            weight = torch.where(further.abs() < back.abs(), further, back)
            moved = movement.abs() > LEAST_MOVEMENT * own.abs()
            values[member].append(weight[moved].float().cpu().numpy())
    return Weights(tuple(np.concatenate(parts) for parts in values), whole.numel)


def _sampled(whole: MemberTensors) -> Iterable[MemberTensors]:
    """Return a few runs of entries, evenly spread; all of a small tensor."""
    length = min(RUN_ENTRIES, whole.numel)
    if whole.numel <= NUM_RUNS * RUN_ENTRIES:
        return whole.pieces(length)
    starts = [(whole.numel - length) * run // (NUM_RUNS - 1) for run in range(NUM_RUNS)]
    return [MemberTensors(whole.name, whole.inputs, start, start + length) for start in starts]


def _joined(weights: Iterable[Weights], member: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a member's weights over several tensors, and how many entries each stands for."""
    weights = list(weights)
    values = [one.values[member].astype(np.float64) for one in weights]
    shares = [np.full(len(own), one.share(member)) for own, one in zip(values, weights, strict=True)]
    return (np.concatenate(values), np.concatenate(shares)) if weights else (np.zeros(0), np.zeros(0))
