"""Members' diagonal Fisher information, as the methods that weigh by it take it: checked once, then trusted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError
from hf_zoo.inputs import PIECE_ENTRIES, MemberTensors, MergeInputs, read_finite, some_names

_moments: dict[tuple[int, int], tuple[weakref.ref[CheckpointReader] | None, float]] = {}


def check_fishers(inputs: MergeInputs, method: str) -> None:
    """Refuse Fishers that do not belong to the tensors to make.

    A tensor no model has a Fisher of is allowed: buffers have none.

    Args:
        inputs: The merge's inputs, with Fishers.
        method: The method's name, for messages.

    Raises:
        MergeError: If there is not one a member, some models have a tensor's Fisher and others do not, or a shape
            differs from the tensor's.
    """
    assert inputs.fisher is not None
    if len(inputs.fisher) != len(inputs.members):
        raise MergeError(
            f"{method} needs the Fisher of every member: got {len(inputs.fisher)} for {len(inputs.members)} members"
        )
    _check_tensors(inputs, [*inputs.fisher, *([inputs.base_fisher] if inputs.base_fisher is not None else [])], method)


def has_fisher(tensors: MemberTensors) -> bool:
    """Return whether there are Fishers of a tensor; all models have one, or none does."""
    assert tensors.inputs.fisher is not None
    return tensors.name in tensors.inputs.fisher[0]


def fisher_of(pieces: MemberTensors, index: int | None) -> Tensor:
    """Return a Fisher's entries, in the computing type; they may be the file's own memory.

    Args:
        pieces: Entries of a tensor that `has_fisher`.
        index: The member's place; null for the base.

    Raises:
        CheckpointError: If an entry is negative, infinite or NaN; names the tensor and whose it is.
    """
    fisher = pieces.base_fisher if index is None else pieces.fisher(index)
    if fisher.numel() and bool(fisher.min() < 0):
        readers = pieces.inputs.fisher or ()
        reader = pieces.inputs.base_fisher if index is None else readers[index]
        assert reader is not None
        raise CheckpointError(
            f"{reader.place(pieces.name)} holds {float(fisher.min()):.3g}: a diagonal Fisher is a mean of squares and "
            "never negative: estimate it again"
        )
    return fisher


def moment_of(fisher: CheckpointReader, order: int) -> tuple[float, int]:
    """Sum a power of all entries of a whole model's Fisher, in float64; computed once while the reader lives.

    Args:
        fisher: The Fisher.
        order: The power, 1 or more.

    Returns:
        The sum, and how many entries there are.
    """
    key = (id(fisher), order)
    reader, moment = _moments.get(key, (None, 0.0))
    # A recipe whose parameters vary from layer to layer asks once a layer.
    if reader is None or reader() is not fisher:
        moment = sum(float(piece.double().pow_(order).sum()) for piece in _pieces(fisher))
        _moments[key] = (weakref.ref(fisher, lambda _: _moments.pop(key, None)), moment)
    return moment, sum(info.numel for info in fisher.layout.values())


def _pieces(fisher: CheckpointReader) -> Iterator[Tensor]:
    for name, info in fisher.layout.items():
        for start in range(0, info.numel, PIECE_ENTRIES):
            yield read_finite(fisher, name, (start, min(start + PIECE_ENTRIES, info.numel)))


def _check_tensors(inputs: MergeInputs, readers: Sequence[CheckpointReader], method: str) -> None:
    floating = [name for name, info in inputs.layout.items() if info.dtype.is_floating_point]
    known = [name for name in floating if any(name in reader for reader in readers)]
    for reader in readers:
        missing = [name for name in known if name not in reader]
        if missing:
            raise MergeError(
                f"{method}: {reader.source} lacks the Fisher of {some_names(missing)}, which others have: estimate "
                "it for the same tensors"
            )
        for name in known:
            if reader.shape(name) != inputs.layout[name].shape:
                raise MergeError(
                    f"{method}: {reader.source}: the Fisher of {name!r} is {list(reader.shape(name))}, the tensor "
                    f"{list(inputs.layout[name].shape)}: it belongs to another model"
                )
    # The layout may be a few buffers of a larger model; the members know the whole of it.
    whole = inputs.members[0]
    if not any(name in reader for reader in readers for name in whole):
        raise MergeError(f"{method}: {readers[0].source} has the Fisher of none of {some_names(list(whole))}")
