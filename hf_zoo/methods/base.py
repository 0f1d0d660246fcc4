"""What every merge method shares: its interface, its inputs, and the mean.

A method is a generator of `(name, tensor)`. Its hyper-parameters are the fields of a frozen dataclass, so a recipe's
`parameters` are bound to it strictly. Methods that work on one tensor at a time inherit `TensorwiseMethod` and hold
one accumulator and one member's tensor in memory, whatever the size of the model and the number of members.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError, nearest
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.rules import method_names
from hf_zoo.shards import TensorInfo, describe_nonfinite, is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Need(Enum):
    """What a method cannot do without besides the members; the value says it in words."""

    BASE = "the base model all members were trained from (`base`)"
    SCORE = "a score on held-out data (`data` and `evaluate`)"
    DATA = "data of the members' tasks (`data`)"
    FISHER = "Fisher statistics of every member"
    GRAM = "Gram matrices of every member"
    GROUPS = "the neuron groups of the network"
    LEVELS = "the levels of the network"


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        title: Title of the paper.
        authors: Its authors, shortened (`Wortsman et al.`).
        year: Year it appeared.
        url: Where to read it.
    """

    title: str
    authors: str
    year: int
    url: str


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Everything a merge may use. Nothing in it is written to but `report`.

    Attributes:
        members: The models to merge, alike in names and shapes.
        layout: The tensors to make: names in order, shapes, types.
        base: The model all members were trained from.
        score: Returns how good a model with these tensors is on held-out data, larger is better; never the test split.
        seed: Seed of methods that draw.
        report: What a method has to tell about its choices; goes into the manifest.
    """

    members: tuple[CheckpointReader, ...]
    layout: Mapping[str, TensorInfo]
    base: CheckpointReader | None = None
    score: Callable[[Mapping[str, Tensor]], float] | None = None
    seed: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[CheckpointReader], dtype: torch.dtype | None = None, **others: Any) -> MergeInputs:
        """Check that members are alike and make inputs of them.

        Args:
            members: The models to merge.
            dtype: Type of floating tensors to make; null keeps the members', the widest where they differ.
            **others: `base`, `score`, `seed`.

        Raises:
            MergeError: If there is no member, or names or shapes differ; names the first tensor and the member.
        """
        return cls(members=tuple(members), layout=common_layout(members, dtype, others.get("base")), **others)

    def generator(self, name: str) -> torch.Generator:
        """Return the source of chance for one tensor, the same whatever order or thread it is asked for in."""
        digest = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class MemberTensors(Sequence[Tensor]):
    """One tensor of every member, in member order; each is read, checked and widened when it is asked for.

    Floating tensors come in float32 or wider. They may be the file's own pages: do not write into them.

    Args:
        name: The tensor's name.
        inputs: The merge's inputs.
    """

    def __init__(self, name: str, inputs: MergeInputs) -> None:
        self.name = name
        self._inputs = inputs

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return read_finite(self._inputs.members[index], self.name)

    def __len__(self) -> int:
        return len(self._inputs.members)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def base(self) -> Tensor:
        """The base's tensor; only for methods that need a base."""
        assert self._inputs.base is not None  # `Method.check` has refused otherwise
        return read_finite(self._inputs.base, self.name)

    @property
    def generator(self) -> torch.Generator:
        """The source of chance for this tensor."""
        return self._inputs.generator(self.name)

    def stack(self) -> Tensor:
        """Return all members' tensors at once, (K, *shape); costs the memory of all of them."""
        return torch.stack(list(self))


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Turn members into one new model.

    A subclass is a frozen dataclass in a file of its own, its fields are its hyper-parameters and the first line of
    its docstring is its description.
    """

    paper: ClassVar[Paper]
    needs: ClassVar[frozenset[Need]] = frozenset()
    arity: ClassVar[tuple[int, int | None]] = (1, None)

    @classmethod
    def name(cls) -> str:
        """Return the name it has in a recipe: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def description(cls) -> str:
        """Return the first line of its docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of `inputs.layout` once, in any order, in the layout's type.

        Args:
            inputs: Members and whatever else the method needs.

        Raises:
            MergeError: If a need is not met or the number of members does not fit.
            CheckpointError: If an input tensor is not finite.
        """

    def check(self, inputs: MergeInputs) -> None:
        """Refuse inputs the method cannot work with.

        Raises:
            MergeError: If a need is not met or the number of members does not fit; says what to give.
        """
        count, (fewest, most) = len(inputs.members), self.arity
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            raise MergeError(f"{self.name()} merges {wanted} members, got {count}: {_sources(inputs.members)}")
        given = {Need.BASE: inputs.base, Need.SCORE: inputs.score}
        for need in sorted(self.needs, key=lambda need: need.name):
            if given.get(need) is None:
                raise MergeError(
                    f"{self.name()} needs {need.value}, and there is none: give it or choose another method"
                )

    def describe(self) -> dict[str, Any]:
        """Return what a manifest and a card say of the method and its hyper-parameters."""
        parameters = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        return {
            "name": self.name(),
            "description": self.description(),
            "parameters": parameters,
            "title": self.paper.title,
            "paper": f"{self.paper.authors} ({self.paper.year})",
            "url": self.paper.url,
        }

    @classmethod
    def from_pretrained(cls, members: Sequence[str], **options: Any) -> PreTrainedModel:
        """Merge members with this method and return a stock model.

        Args:
            members: Folders or `org/name`, each also with `@revision` and `#subfolder`.
            **options: As for `AutoMergedModel.from_pretrained`; hyper-parameters by their names.
        """
        from hf_zoo.auto import AutoMergedModel

        return AutoMergedModel.from_pretrained(list(members), method=cls.name(), **options)


class TensorwiseMethod(Method):
    """A method that makes each tensor from the members' tensors of the same name alone."""

    @abstractmethod
    def combine(self, tensors: MemberTensors) -> Tensor:
        """Return the merged tensor, in float32 or wider.

        Args:
            tensors: A floating tensor of every member, read one at a time.
        """

    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in the layout's order; integer and boolean ones are the first member's.

        Counters such as `num_batches_tracked` may differ between members and have no meaning in between.
        """
        self.check(inputs)
        for name, info in inputs.layout.items():
            if info.dtype.is_floating_point:
                yield name, self.combine(MemberTensors(name, inputs)).to(info.dtype)
            else:
                yield name, inputs.members[0][name]


def list_methods() -> list[str]:
    """Return the names of all methods."""
    return method_names()


def get_method(name: str) -> type[Method]:
    """Return a method's class by its name.

    Raises:
        MergeError: If there is none; names the nearest.
    """
    known = list_methods()
    if name not in known:
        raise MergeError(f"unknown method {name!r}{nearest(name, known)}: known are {', '.join(known)}")
    module = import_module(f"hf_zoo.methods.{name}")
    own = [value for value in vars(module).values() if _is_method(value, module.__name__)]
    assert len(own) == 1, f"{module.__name__} must define exactly one method"
    return own[0]


def make_method(name: str, parameters: Mapping[str, Any] | None = None, source: str = "method") -> Method:
    """Make a method with hyper-parameters.

    Args:
        name: Its name.
        parameters: Hyper-parameters; those not given have the paper's values.
        source: Where they come from, for the error.

    Raises:
        MergeError: If there is no such method.
        RecipeError: If a hyper-parameter is unknown, of a wrong type or out of range.
    """
    return bind(dict(parameters or {}), get_method(name), source, "parameters")


def read_finite(member: CheckpointReader, name: str) -> Tensor:
    """Read a tensor in float32 or wider; integers stay as they are.

    Raises:
        CheckpointError: If it holds NaN or infinity; names member, file and tensor.
    """
    tensor = member[name]
    if not tensor.is_floating_point():
        return tensor
    if not is_finite(tensor):
        raise CheckpointError(
            f"{member.place(name)} holds {describe_nonfinite(tensor)}: leave this member out, or train it again"
        )
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Average tensors, one in memory at a time.

    Args:
        tensors: Floating tensors of one shape.
        weights: One per tensor, their sum positive; null weighs them alike. They are normalised.

    Returns:
        The mean, (*shape), in float32 or wider.
    """
    total: Tensor | None = None
    factors: list[float] = []
    for index, tensor in enumerate(tensors):
        factor = 1.0 if weights is None else float(weights[index])
        factors.append(factor)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if total is None:
            total = tensor.to(wide) * factor
        else:
            total.add_(tensor.to(wide), alpha=factor)
    assert total is not None
    # Dividing once at the end, and not weighting by 1/K, keeps the mean of two or four equal tensors exact.
    return total.div_(sum(factors))


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


def _check_alike(first: CheckpointReader, other: CheckpointReader, exact: bool) -> None:
    missing = [name for name in first.layout if name not in other.layout]
    extra = [name for name in other.layout if name not in first.layout] if exact else []
    if missing or extra:
        parts = [f"{other.source} lacks {_some(missing)}"] * bool(missing)
        parts += [f"{first.source} lacks {_some(extra)}"] * bool(extra)
        raise MergeError(f"{first.source} and {other.source} are not of one architecture: {'; '.join(parts)}")
    for name, info in first.layout.items():
        if other.shape(name) != info.shape:
            raise MergeError(
                f"{first.source} and {other.source} differ in shape: {name!r} is {list(info.shape)} in the first and "
                f"{list(other.shape(name))} in the second: merge models of one architecture and one label space"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sources(members: Sequence[CheckpointReader]) -> str:
    return ", ".join(member.source for member in members)


def _is_method(value: Any, module: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module
