"""Linear layers merged by regression on what each member's layer answers to its own inputs."""

# I = inputs of a linear layer, O = its outputs

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs, read_finite, some_names
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import Need, Paper, TensorwiseMethod, per_member
from hf_zoo.regression import Regression, require_regression


@dataclass(frozen=True, kw_only=True)
class RegMean(TensorwiseMethod):
    """Merge each linear layer into the one nearest to all members' answers to their own inputs.

    Equation 2 of Jin et al. (2023), for weights stored as (outputs, inputs): `W = (sum_i W_i G_i) (sum_i G_i)^-1`,
    with `G_i` the Gram matrix of the inputs member i's layer reads, a mean over rows, its off-diagonals shrunk. All
    that is no linear layer's weight (embeddings, biases, norms, weights without a Gram matrix) is averaged, as in the
    paper. The systems are solved in float64; inputs no member uses keep the mean.

    Layers that store their weight as (inputs, outputs), as GPT-2 does, are told by the size of their Gram matrix; a
    square weight is taken to lie as those next to it in the model do.

    Attributes:
        off_diagonal: Factor of the off-diagonals of every Gram matrix, the paper's alpha, in [0, 1]. At 1, solutions
            are exact least squares, and poor where there were fewer rows than inputs.
        weights: One per member, none negative, their sum positive: how much its answers count. Null counts all alike.
    """

    paper: ClassVar[Paper] = Paper(
        "Dataless knowledge fusion by merging weights of language models",
        "Jin et al.",
        2023,
        "https://arxiv.org/abs/2212.09849",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRAM})

    off_diagonal: float = 0.9
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_regression(self.off_diagonal, self.weights)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse Gram matrices of other models and a wrong number of weights.

        Raises:
            MergeError: If Gram matrices and members do not fit, or there is not one weight per member.
        """
        super().check(inputs)
        assert inputs.gram is not None
        if self.weights is not None:
            per_member(self.weights, inputs, "regmean: weights")
        if len(inputs.gram) != len(inputs.members):
            raise MergeError(
                f"regmean needs the Gram matrices of every member: got {len(inputs.gram)} for "
                f"{len(inputs.members)} members"
            )
        known = [name for name in inputs.members[0] if any(name in gram for gram in inputs.gram)]
        for gram in inputs.gram:
            missing = [name for name in known if name not in gram]
            if missing or not known:
                lacking = some_names(missing or list(inputs.members[0]))
                raise MergeError(
                    f"regmean: {gram.source} lacks the Gram matrices of {lacking}: estimate them for all members' "
                    "layers"
                )
            for name in known:
                if not _axes_that_fit(inputs.members[0].shape(name), gram.shape(name)):
                    raise MergeError(
                        f"regmean: {gram.source}: the Gram matrix of {name!r} is {list(gram.shape(name))} and fits no "
                        f"side of a weight of {list(inputs.members[0].shape(name))}: it belongs to another model"
                    )

    def overview(self, inputs: MergeInputs) -> dict[str, int]:
        """Return which axis of each weight with a Gram matrix runs over the inputs: 0, or 1 with all behind the first.

        The report says how many tensors are merged by regression and how many are averaged.
        """
        assert inputs.gram is not None
        axes = input_axes(inputs.members[0], inputs.gram[0])
        solved = sum(name in axes for name in inputs.layout)
        inputs.report["regression"] = {"solved": solved, "averaged": len(list(inputs.floating())) - solved}
        return axes

    def combine(self, tensors: MemberTensors, overview: Mapping[str, int]) -> Tensor:
        """Return the solution of the regression, or the mean for a tensor without a Gram matrix."""
        if tensors.name not in overview:
            return weighted_mean(tensors, self.weights)
        inputs = tensors.inputs
        assert inputs.gram is not None
        weights = per_member(self.weights or 1.0, inputs, "regmean: weights")
        first = overview[tensors.name] == 0
        regression = Regression(self.off_diagonal)
        for index, (member, weight) in enumerate(zip(tensors, weights, strict=True)):
            regression.add(_matrix(member, first), _read_gram(inputs, index, tensors.name), weight)
        merged_OI = regression.solution()
        return (merged_OI.T if first else merged_OI).reshape(tensors.shape)


def input_axes(weights: CheckpointReader, gram: CheckpointReader) -> dict[str, int]:
    """Say which axis of each weight runs over the layer's inputs, whose number is the size of its Gram matrix.

    Where both axes have that length, the weights nearest by name decide: those that share most of the parts of the
    name from its beginning, by majority; else the inputs are taken to come last, as in `torch.nn.Linear`.

    Args:
        weights: A model.
        gram: Its Gram matrices.

    Returns:
        Name -> 0 where the first axis is the inputs', 1 where all behind the first are; for weights with a Gram
        matrix.
    """
    fitting = {name: _axes_that_fit(weights.shape(name), gram.shape(name)) for name in gram if name in weights}
    certain = {name: axes[0] for name, axes in fitting.items() if len(axes) == 1}
    found = {}
    for name, axes in fitting.items():
        if len(axes) == 1 or not certain:
            found[name] = axes[-1]
            continue
        nearness = {other: _shared_parts(name, other) for other in certain}
        nearest = max(nearness.values())
        votes = Counter(axis for other, axis in certain.items() if nearness[other] == nearest)
        found[name] = 0 if votes[0] > votes[1] else 1
    return found


def _axes_that_fit(shape: tuple[int, ...], gram: tuple[int, ...]) -> list[int]:
    if len(shape) < 2 or len(gram) != 2 or gram[0] != gram[1]:
        return []
    first = [0] if len(shape) == 2 and shape[0] == gram[0] else []
    return first + ([1] if math.prod(shape[1:]) == gram[0] else [])


def _shared_parts(name: str, other: str) -> int:
    shared = 0
    for part, of_other in zip(name.split("."), other.split("."), strict=False):
        if part != of_other:
            break
        shared += 1
    return shared


def _matrix(weight: Tensor, inputs_first: bool) -> Tensor:
    return weight.T if inputs_first else weight.reshape(len(weight), -1)


def _read_gram(inputs: MergeInputs, index: int, name: str) -> Tensor:
    assert inputs.gram is not None
    gram = inputs.gram[index]
    gram_II = read_finite(gram, name).to(inputs.device, torch.float64)
    if bool((gram_II.diagonal() < 0).any()):
        raise CheckpointError(
            f"{gram.place(name)} has a negative entry on its diagonal, a mean of squares: estimate it again"
        )
    return gram_II
