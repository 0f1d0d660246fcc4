"""What a merge method is given: the members' tensors, whole or in pieces, read when they are asked for.

A tensor may be taken whole or in pieces of `PIECE_ENTRIES` consecutive entries of the tensor laid out flat. Pieces
stay in the processor's cache while members are combined, so an elementwise merge costs little more than reading and
writing, and a few megabytes of memory however large the tensors are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError
from hf_zoo.shards import TensorInfo, describe_nonfinite, is_finite

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

# Half a megabyte of float32: a piece of every member and the sum fit into a core's own cache. Random draws are seeded
# piece by piece, so another value makes other merges of methods that draw.
PIECE_ENTRIES = 1 << 17


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Everything a merge may use. Nothing in it is written to but `report` and `choices`.

    Attributes:
        members: The models to merge, alike in names and shapes.
        layout: The tensors to make: names in order, shapes, types.
        base: The model all members were trained from.
        score: Returns how good a model with these tensors is on held-out data, larger is better; never the test split.
        trials: The tasks' held-out data, for methods that learn from it; never the test split.
        fisher: The members' diagonal Fishers, under the members' names: means over examples of squared gradients.
        gram: The members' Gram matrices, under the names of the weights they belong to.
        num_examples: Sizes of the members' training sets.
        base_fisher: The base's diagonal Fisher.
        base_num_examples: Size of the base's training set.
        seed: Seed of methods that draw.
        device: Where to compute.
        dtype: Type to compute in: float32 or float64.
        recalled: What methods chose on data when this very merge was made before: they take it and need no data.
        report: What a method has to tell about its choices; goes into the manifest.
        choices: What methods chose on data, in JSON's types, to be recalled; goes into the manifest.
    """

    members: tuple[CheckpointReader, ...]
    layout: Mapping[str, TensorInfo]
    base: CheckpointReader | None = None
    score: Callable[[Mapping[str, Tensor]], float] | None = None
    trials: tuple[Trial, ...] | None = None
    fisher: tuple[CheckpointReader, ...] | None = None
    gram: tuple[CheckpointReader, ...] | None = None
    num_examples: tuple[float, ...] | None = None
    base_fisher: CheckpointReader | None = None
    base_num_examples: float | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    recalled: Mapping[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[CheckpointReader], dtype: torch.dtype | None = None, **others: Any) -> MergeInputs:
        """Check that members are alike and make inputs of them.

        Args:
            members: The models to merge.
            dtype: Type of floating tensors to make; null keeps the members', the widest where they differ.
            **others: Further fields; `compute_dtype` is the field `dtype`.

        Raises:
            MergeError: If there is no member, or names or shapes differ; names the first tensor and the member.
        """
        if "compute_dtype" in others:
            others["dtype"] = others.pop("compute_dtype")
        return cls(members=tuple(members), layout=common_layout(members, dtype, others.get("base")), **others)

    def only(self, names: Sequence[str]) -> MergeInputs:
        """Return the same inputs with only some of the tensors to make."""
        return replace(self, layout={name: self.layout[name] for name in names})

    def of_members(self, places: Sequence[int]) -> MergeInputs:
        """Return the same inputs with only some of the members."""

        def chosen(values: Sequence[Any] | None) -> Any:
            return None if values is None else tuple(values[place] for place in places)

        per_member = ("members", "fisher", "gram", "num_examples")
        return replace(self, **{field: chosen(getattr(self, field)) for field in per_member})

    def tensors(self, name: str) -> MemberTensors:
        """Return a tensor of every member, to be read when asked for."""
        return MemberTensors(name, self)

    def floating(self) -> Iterator[MemberTensors]:
        """Yield every floating tensor to make, in the layout's order."""
        return (self.tensors(name) for name, info in self.layout.items() if info.dtype.is_floating_point)

    def generator(self, *key: object) -> torch.Generator:
        """Return the source of chance for one use, the same in whatever order or thread it is asked for."""
        text = "\0".join(map(str, (self.seed, *key)))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


class MemberTensors(Sequence[Tensor]):
    """One tensor of every member, or the same piece of it, in member order; read, checked and widened when asked for.

    Floating tensors come in the inputs' computing type and on their device. They may be the member's own memory: do
    not write into them.

    Args:
        name: The tensor's name.
        inputs: The merge's inputs.
        start: First entry of the piece, the tensor laid out flat.
        stop: End of the piece; null for the whole tensor in its own shape.
    """

    def __init__(self, name: str, inputs: MergeInputs, start: int = 0, stop: int | None = None) -> None:
        self.name = name
        self.inputs = inputs
        self.start = start
        self.stop = stop
        self._checked = True

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self.of_member(i) for i in range(*index.indices(len(self)))]
        return self.of_member(index)

    def __len__(self) -> int:
        return len(self.inputs.members)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def of_member(self, index: int) -> Tensor:
        """Return a member's tensor."""
        return self._read(self.inputs.members[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.inputs.layout[self.name].shape

    @property
    def numel(self) -> int:
        """Number of entries, of the piece where it is one."""
        return (self.inputs.layout[self.name].numel if self.stop is None else self.stop) - self.start

    @property
    def base(self) -> Tensor:
        """The base's tensor; only for methods that need a base."""
        assert self.inputs.base is not None  # `Method.check` has refused otherwise
        return self._read(self.inputs.base)

    def task_vectors(self) -> Iterator[Tensor]:
        """Yield every member's difference to the base, in memory of its own; the base is read once."""
        base = self.base
        return (member - base for member in self)

    def fisher(self, index: int) -> Tensor:
        """Return a member's diagonal Fisher; only for methods that need them."""
        assert self.inputs.fisher is not None
        return self._read(self.inputs.fisher[index])

    @property
    def base_fisher(self) -> Tensor:
        """The base's diagonal Fisher; only where there is one."""
        assert self.inputs.base_fisher is not None
        return self._read(self.inputs.base_fisher)

    def generator(self, index: int = 0) -> torch.Generator:
        """Return the source of chance for this tensor or piece, and a member of it."""
        return self.inputs.generator(self.name, self.start, index)

    def pieces(self, size: int = PIECE_ENTRIES) -> Iterator[MemberTensors]:
        """Cut into pieces of consecutive entries.

        Yields:
            The pieces in order; at least one, which may be empty.
        """
        end = self.start + self.numel
        for start in range(self.start, max(end, self.start + 1), size):
            yield MemberTensors(self.name, self.inputs, start, min(start + size, end))

    def stack(self) -> Tensor:
        """Return all members' tensors at once, (K, *shape); costs the memory of all of them."""
        return torch.stack(list(self))

    def unchecked(self) -> MemberTensors:
        """Return the same entries, which are then read without a look whether they are finite."""
        same = MemberTensors(self.name, self.inputs, self.start, self.stop)
        same._checked = False
        return same

    def _read(self, reader: CheckpointReader) -> Tensor:
        tensor = reader[self.name] if self.stop is None else reader.piece(self.name, self.start, self.stop)
        wide = tensor.to(self.inputs.device, torch.promote_types(tensor.dtype, self.inputs.dtype))
        if self._checked and not is_finite(wide):  # after widening: sums of float32 are faster
            require_finite(reader, self.name)
        return wide


def read_finite(member: CheckpointReader, name: str, piece: tuple[int, int] | None = None) -> Tensor:
    """Read a tensor, or some entries of it laid out flat, in its own type.

    Raises:
        CheckpointError: If it holds NaN or infinity; names member, file and tensor.
    """
    tensor = member[name] if piece is None else member.piece(name, *piece)
    if not is_finite(tensor):
        require_finite(member, name)
    return tensor


def require_finite(member: CheckpointReader, name: str) -> None:
    """Refuse a tensor that is not finite.

    Raises:
        CheckpointError: If it holds NaN or infinity; names member, file and tensor.
    """
    tensor = member[name]
    if not is_finite(tensor):
        raise CheckpointError(
            f"{member.place(name)} holds {describe_nonfinite(tensor)}: leave this member out, or train it again"
        )


def common_layout(
    members: Sequence[CheckpointReader], dtype: torch.dtype | None = None, base: CheckpointReader | None = None
) -> dict[str, TensorInfo]:
    """Return the layout members share.

    Args:
        members: The models to merge.
        dtype: Type of floating tensors; null for the members', the widest where they differ.
        base: A model that must have every tensor of theirs, in the same shape.

    Raises:
        MergeError: If there is no member, or names or shapes differ; names the first tensors and the member.
    """
    if not members:
        raise MergeError("there is no member to merge")
    first = members[0]
    for other in members[1:]:
        _check_alike(first, other, exact=True)
    if base is not None:
        _check_alike(first, base, exact=False)
    layout = {}
    for name, info in first.layout.items():
        kept = info.dtype
        for other in members[1:]:
            kept = torch.promote_types(kept, other.dtype(name))
        layout[name] = TensorInfo(info.shape, dtype if dtype is not None and kept.is_floating_point else kept)
    return layout


def some_names(names: Sequence[str]) -> str:
    """Write out the first names of many."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_alike(first: CheckpointReader, other: CheckpointReader, exact: bool) -> None:
    missing = [name for name in first.layout if name not in other.layout]
    extra = [name for name in other.layout if name not in first.layout] if exact else []
    if missing or extra:
        parts = [f"{other.source} lacks {some_names(missing)}"] * bool(missing)
        parts += [f"{first.source} lacks {some_names(extra)}"] * bool(extra)
        raise MergeError(f"{first.source} and {other.source} are not of one architecture: {'; '.join(parts)}")
    for name, info in first.layout.items():
        if other.shape(name) != info.shape:
            raise MergeError(
                f"{first.source} and {other.source} differ in shape: {name!r} is {list(info.shape)} in the first and "
                f"{list(other.shape(name))} in the second: merge models of one architecture and one label space"
            )
