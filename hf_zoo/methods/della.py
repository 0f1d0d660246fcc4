"""DELLA: drop entries of the task vectors at random, the small ones more often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import PIECE_ENTRIES, MemberTensors, MergeInputs
from hf_zoo.methods.base import Paper, TensorwiseMethod, per_member
from hf_zoo.task_vectors import Election, TaskVectorMethod, require_fractions


@dataclass(frozen=True, kw_only=True)
class Della(TaskVectorMethod, TensorwiseMethod):
    """Drop entries of every task vector at random, small ones more often, then elect signs and average what agrees.

    Deep et al. (2024), section 3. MagPrune ranks the entries of each row, the weights into one neuron, by magnitude
    and keeps an entry with a probability that rises evenly with its rank, from density - epsilon / 2 for the smallest
    to density + epsilon / 2 for the largest; what is kept is divided by its probability. Then signs are elected as in
    TIES and the mean of the entries that agree, times `scale`, is added to the base. The paper chooses density,
    epsilon and scale on held-out data. A tensor of one dimension is one row; a convolution has a row for each output.

    mergekit calls epsilon what is epsilon / 2 here and in the paper.

    Attributes:
        density: Mean probability of an entry to be kept, one for all or one per member; 1 keeps everything.
        epsilon: How much more probable the largest entry of a row is than the smallest, one for all or one per member.
        rescale: Divide what is kept by its probability (`density`), as in the paper; `norm` instead gives each tensor
            the sum of magnitudes it had before, as mergekit does; `none` leaves the rest as it is.
        election: `total` and `count` elect signs as TIES does; `none` adds the vectors.
        weights: How much each task vector counts; null counts all once.
        normalize: Divide by the weights that took part; null does so only where signs are elected.
        scale: Multiplies the merged vector; lambda in the paper.
        tie: What becomes of an entry whose two signs weigh the same: `zero` leaves the base, `positive` elects the
            positive side, as mergekit does.
    """

    paper: ClassVar[Paper] = Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Deep et al.",
        2024,
        "https://arxiv.org/abs/2406.11617",
    )

    density: float | tuple[float, ...] = 0.3
    epsilon: float | tuple[float, ...] = 0.2
    rescale: Literal["density", "norm", "none"] = "density"
    election: Election = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions("della", density=self.density)
        require_fractions("della", zero=True, epsilon=self.epsilon)
        densities = self.density if isinstance(self.density, tuple) else (self.density,)
        epsilons = self.epsilon if isinstance(self.epsilon, tuple) else (self.epsilon,)
        longest = max(len(densities), len(epsilons))
        if len(densities) == 1:
            densities *= longest
        if len(epsilons) == 1:
            epsilons *= longest
        for density, epsilon in zip_longest(densities, epsilons, fillvalue=1.0):
            if density < 1 and not (density - epsilon / 2 > 0 and density + epsilon / 2 <= 1):
                raise MergeError(
                    f"della: density {density} +- half of epsilon {epsilon} must lie in (0, 1]: they are probabilities"
                )

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of densities, epsilons or weights.

        Raises:
            MergeError: If there is not one per member.
        """
        super().check(inputs)
        per_member(self.density, inputs, "della: density")
        per_member(self.epsilon, inputs, "della: epsilon")

    def combine(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the base plus what is left of the task vectors; some rows of one member are held at a time."""
        factors = self._norm_factors(tensors) if self.rescale == "norm" else (1.0,) * len(tensors)
        merged = None
        for rows in _row_pieces(tensors):
            base = rows.base
            kept = (vector.mul_(factor) for vector, factor in zip(self._kept(rows, base), factors, strict=True))
            part = self.added(base, kept, tensors.inputs)
            merged = part.new_empty(tensors.numel) if merged is None else merged
            merged[rows.start : rows.start + rows.numel] = part
        assert merged is not None
        return merged.reshape(tensors.shape)

    def _norm_factors(self, tensors: MemberTensors) -> tuple[float, ...]:
        """Return what gives every member's kept entries the sum of magnitudes of all of them."""
        before, after = [0.0] * len(tensors), [0.0] * len(tensors)
        for rows in _row_pieces(tensors):
            base = rows.base
            for index, member in enumerate(rows):
                before[index] += float((member - base).abs_().sum(dtype=torch.float64))
            for index, kept in enumerate(self._kept(rows, base)):
                after[index] += float(kept.abs_().sum(dtype=torch.float64))
        return tuple(old / new if new else 1.0 for old, new in zip(before, after, strict=True))

    def _kept(self, rows: MemberTensors, base: Tensor) -> Iterator[Tensor]:
        """Yield some rows of every member's task vector with entries dropped; the same ones each time."""
        densities = per_member(self.density, rows.inputs, "della: density")
        epsilons = per_member(self.epsilon, rows.inputs, "della: epsilon")
        length = _row_length(rows.shape)
        for index, member in enumerate(rows):
            vector = member - base
            if densities[index] < 1:
                chances = keep_probabilities(vector.reshape(-1, length), densities[index], epsilons[index]).reshape(-1)
                coins = torch.rand(len(vector), generator=rows.generator(index)).to(vector.device)
                kept = (coins < chances).to(vector.dtype)
                vector.mul_(kept.div_(chances) if self.rescale == "density" else kept)
            yield vector


def keep_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Return MagPrune's probability of each entry to be kept.

    With r the rank in its row from 0 for the smallest magnitude to n - 1: density + epsilon (r / (n - 1) - 1 / 2).
    The paper divides by n; with n - 1 the mean is the density exactly. Of equal magnitudes the later ranks higher.

    Args:
        rows: Task vector, (rows, n).
        density: Mean probability.
        epsilon: Difference between the probabilities of the largest and the smallest.

    Returns:
        Probabilities, (rows, n), in float32.
    """
    count = rows.shape[1]
    if count < 2:
        return torch.full(rows.shape, density, device=rows.device)
    # One integer holds magnitude and place: sorting it is an order of magnitude faster than an argsort, and unique.
    keys = rows.abs().to("cpu", torch.float32).contiguous().view(torch.int32).numpy().astype(np.int64)
    keys <<= 32
    keys |= np.arange(count)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    steps = torch.linspace(density - epsilon / 2, density + epsilon / 2, count)
    places = torch.from_numpy(keys)
    return torch.empty(rows.shape).scatter_(1, places, steps.expand(rows.shape)).to(rows.device)


def _row_pieces(tensors: MemberTensors) -> Iterator[MemberTensors]:
    length = _row_length(tensors.shape)
    return tensors.pieces(length * max(1, PIECE_ENTRIES // length))


def _row_length(shape: Sequence[int]) -> int:
    """Return how many entries a row has: all of a vector, what leads to one output of a matrix or convolution."""
    return max(1, int(np.prod(shape[1:] if len(shape) > 1 else shape)))
