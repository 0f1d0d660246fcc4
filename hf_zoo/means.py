"""Means of members: of one tensor, and of whole models that are computed when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.inputs import MergeInputs, read_finite
from hf_zoo.shards import TensorInfo


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Average tensors, one in memory at a time.

    Args:
        tensors: Floating tensors of one shape.
        weights: One per tensor, their sum positive; null weighs them alike. They are normalised.

    Returns:
        The mean, (*shape), in float32 or wider.
    """
    total: Tensor | None = None
    owned = False  # the first tensor may be a member's own memory, and need not be copied to be added to
    factors: list[float] = []
    for index, tensor in enumerate(tensors):
        factor = 1.0 if weights is None else float(weights[index])
        factors.append(factor)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if total is None:
            total, owned = (wide, False) if factor == 1 else (wide * factor, True)
        elif owned:
            total.add_(wide, alpha=factor)
        else:
            total, owned = torch.add(total, wide, alpha=factor), True
    assert total is not None
    # Dividing once at the end, and not weighting by 1/K, keeps the mean of two or four equal tensors exact.
    return total.div_(sum(factors)) if owned else total / sum(factors)


def mean_of(members: Sequence[CheckpointReader], source: str, layout: Mapping[str, TensorInfo]) -> CheckpointReader:
    """Return the members' mean as a model that computes each tensor when it is asked for.

    Args:
        members: Members alike in names and shapes.
        source: What to call the mean in messages.
        layout: Names, shapes and types of the mean; integer and boolean tensors are the first member's.
    """

    def read(name: str) -> Tensor:
        dtype = layout[name].dtype
        if not dtype.is_floating_point:
            return members[0][name]
        return weighted_mean(read_finite(member, name) for member in members).to(dtype)

    return CheckpointReader(source, layout, read, {})


def completed(part: CheckpointReader, inputs: MergeInputs) -> CheckpointReader:
    """Return a whole model to be scored: tensors that another method makes are the mean of the members that have them.

    Args:
        part: The tensors a method makes, as it would make them.
        inputs: The method's inputs.
    """
    having: dict[str, list[CheckpointReader]] = {}
    for member in inputs.members:
        for name in member:
            having.setdefault(name, []).append(member)
    layout = {name: owners[0].layout[name] for name, owners in having.items()} | dict(part.layout)

    def read(name: str) -> Tensor:
        return part[name] if name in part else mean_of(having[name], part.source, layout)[name]

    return CheckpointReader(part.source, layout, read, {})
