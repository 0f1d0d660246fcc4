"""What every merge method shares: its interface, its inputs, and the mean.

A method is a generator of `(name, tensor)`. Its hyper-parameters are the fields of a frozen dataclass, so a recipe's
`parameters` are bound to it strictly. Methods that work on one tensor at a time inherit `TensorwiseMethod` and hold
one accumulator and one member's tensor in memory, whatever the size of the model and the number of members.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, nearest
from hf_zoo.inputs import PIECE_ENTRIES, MemberTensors, MergeInputs
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.rules import method_names
from hf_zoo.shards import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Need(Enum):
    """What a method cannot do without besides the members; the value says it in words."""

    BASE = "the base model all members were trained from (`base`)"
    SCORE = "a score on held-out data (`data` and `evaluate`)"
    DATA = "data of the members' tasks (`data`)"
    FISHER = "Fisher statistics of every member"
    GRAM = "Gram matrices of every member"


CHOSEN_BY = frozenset({Need.SCORE, Need.DATA})  # not needed where the choice is recalled
NEED_FIELDS = {
    Need.BASE: "base",
    Need.SCORE: "score",
    Need.DATA: "trials",
    Need.FISHER: "fisher",
    Need.GRAM: "gram",
}
PIECES_A_WORK = 32


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


Put = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Work:
    """A part of a merge that does not depend on the others.

    Attributes:
        size: Number of entries it makes, to begin with the largest.
        run: Hands every piece it makes to a function of name, first entry and flat piece, in the layout's type.
        name: The tensor it makes or makes a part of, or the first of several.
        start: First entry it makes.
        alone: Whether it can be left out where its entries are there already: it makes no other tensor and reports
            nothing.
    """

    size: int
    run: Callable[[Put], None]
    name: str
    start: int = 0
    alone: bool = True


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

    @property
    def uses_base(self) -> bool:
        """Whether the base matters to it."""
        return Need.BASE in self.needs

    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of `inputs.layout` once, in any order, in the layout's type.

        Args:
            inputs: Members and whatever else the method needs.

        Raises:
            MergeError: If a need is not met or the number of members does not fit.
            CheckpointError: If an input tensor is not finite.
        """

    def works(self, inputs: MergeInputs) -> Iterator[Work]:
        """Cut the merge into parts that may be made at the same time.

        Yields:
            The parts; one where it cannot be cut.
        """

        def run(put: Put) -> None:
            for name, tensor in self.merge(inputs):
                put(name, 0, tensor.to("cpu").reshape(-1))

        yield Work(sum(info.numel for info in inputs.layout.values()), run, next(iter(inputs.layout)), alone=False)

    def check(self, inputs: MergeInputs) -> None:
        """Refuse inputs the method cannot work with.

        Raises:
            MergeError: If a need is not met or the number of members does not fit; says what to give.
        """
        count, (fewest, most) = len(inputs.members), self.arity
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            raise MergeError(f"{self.name()} merges {wanted} members, got {count}: {_sources(inputs.members)}")
        needs = self.needs - CHOSEN_BY if self._place(inputs) in inputs.recalled else self.needs
        for need in sorted(needs, key=lambda need: need.name):
            if getattr(inputs, NEED_FIELDS[need]) is None:
                raise MergeError(
                    f"{self.name()} needs {need.value}, and there is none: give it or choose another method"
                )

    def chosen(self, inputs: MergeInputs, choose: Callable[[], T]) -> T:
        """Return what a method chooses on data; what it chose then, where a merge is made again.

        Args:
            inputs: The merge's inputs; the choice is noted in them.
            choose: Makes the choice, in JSON's types, and reports on it. It must say all that the method makes of the
                data, for the merge to be the same without them.
        """
        place = self._place(inputs)
        value = inputs.recalled[place] if place in inputs.recalled else choose()
        inputs.choices[place] = value
        return value

    def _place(self, inputs: MergeInputs) -> str:
        """Return what a choice is noted under: several methods, or one with several values, may share a merge."""
        return f"{self.name()}: {min(inputs.layout, default='')}"

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
    """A method that makes each tensor from the members' tensors of the same name alone.

    Set `notes` where making a tensor adds to the report: then a merge that is continued makes all of them again.
    """

    notes: ClassVar[bool] = False

    def overview(self, inputs: MergeInputs) -> Any:
        """Return what must be known of the whole models before the first tensor is made; nothing for most methods."""
        return None

    @abstractmethod
    def combine(self, tensors: MemberTensors, overview: Any) -> Tensor:
        """Return the merged tensor, in float32 or wider.

        Args:
            tensors: A floating tensor of every member, read one at a time.
            overview: What `overview` returned.
        """

    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in the layout's order; integer and boolean ones are the first member's.

        Counters such as `num_batches_tracked` may differ between members and have no meaning in between.
        """
        self.check(inputs)
        overview = self.overview(inputs)
        for name, info in inputs.layout.items():
            tensor = torch.empty(info.numel, dtype=info.dtype)

            def put(_: str, start: int, piece: Tensor, tensor: Tensor = tensor) -> None:
                tensor[start : start + piece.numel()] = piece

            for work in self._works_of(name, inputs, overview):
                work.run(put)
            yield name, tensor.reshape(info.shape)

    def works(self, inputs: MergeInputs) -> Iterator[Work]:
        """Return a work for each tensor."""
        self.check(inputs)
        overview = self.overview(inputs)
        return (work for name in inputs.layout for work in self._works_of(name, inputs, overview))

    def _works_of(self, name: str, inputs: MergeInputs, overview: Any) -> Iterator[Work]:
        info = inputs.layout[name]

        def run(put: Put) -> None:
            if info.dtype.is_floating_point:
                merged = self.combine(inputs.tensors(name), overview)
            else:
                merged = inputs.members[0][name]
            put(name, 0, merged.to("cpu", info.dtype).reshape(-1))

        yield Work(info.numel, run, name, alone=not self.notes)


class ElementwiseMethod(TensorwiseMethod):
    """A method that makes each entry from the members' entries at its place, and from what was learned before.

    Tensors are never held whole: what must be known of a whole tensor is learned by `survey`, piece by piece.
    """

    surveys: ClassVar[bool] = False
    # Whether an entry of a member that is not finite makes the merge not finite at its place, as it does in every
    # linear combination: then members are checked only where the merge turns out so.
    linear: ClassVar[bool] = False

    def survey(self, tensors: MemberTensors, overview: Any) -> Any:
        """Return what must be known of a whole tensor before its first entry is made; set `surveys` to have it asked.

        Args:
            tensors: A floating tensor of every member; take its `pieces()`.
            overview: What `overview` returned.
        """
        return overview

    @abstractmethod
    def blend(self, pieces: MemberTensors, survey: Any) -> Tensor:
        """Return merged entries, flat, in float32 or wider.

        Args:
            pieces: The same entries of every member, flat.
            survey: What `survey` returned; what `overview` returned for a method that does not survey.
        """

    def combine(self, tensors: MemberTensors, overview: Any) -> Tensor:
        """Return the merged tensor."""
        survey = self.survey(tensors, overview)
        return torch.cat([self.blend(piece, survey) for piece in tensors.pieces()]).reshape(tensors.shape)

    def _works_of(self, name: str, inputs: MergeInputs, overview: Any) -> Iterator[Work]:
        info = inputs.layout[name]
        if not info.dtype.is_floating_point:
            yield from super()._works_of(name, inputs, overview)
            return

        def run(put: Put, part: MemberTensors) -> None:
            survey = self.survey(part, overview)
            for piece in part.pieces():
                merged = self.blend(piece.unchecked() if self.linear else piece, survey)
                if self.linear and not is_finite(merged):
                    self.blend(piece, survey)  # raises with the member's name, unless it is an overflow
                put(name, piece.start, merged.to("cpu", info.dtype))

        whole = inputs.tensors(name)
        # A survey needs the whole tensor; without one, a large tensor may be shared between threads.
        for part in [whole] if self.surveys else whole.pieces(PIECES_A_WORK * PIECE_ENTRIES):
            yield Work(part.numel, partial(run, part=part), name, part.start, not self.notes)


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


def make_method(
    name: str, parameters: Mapping[str, Any] | None = None, source: str = "method", path: str = "parameters"
) -> Method:
    """Make a method with hyper-parameters.

    Args:
        name: Its name.
        parameters: Hyper-parameters; those not given have the paper's values.
        source: Where they come from, for the error.
        path: Their path in it.

    Raises:
        MergeError: If there is no such method.
        RecipeError: If a hyper-parameter is unknown, of a wrong type or out of range.
    """
    return bind(dict(parameters or {}), get_method(name), source, path)


def per_member(value: float | Sequence[float], inputs: MergeInputs, what: str) -> tuple[float, ...]:
    """Return a hyper-parameter's value for every member.

    Args:
        value: One for all, or one a member.
        inputs: The merge's inputs.
        what: The method and the hyper-parameter, for the error (`"ties: density"`).

    Raises:
        MergeError: If there is not one a member.
    """
    count = len(inputs.members)
    if not isinstance(value, Sequence):
        return (float(value),) * count
    if len(value) != count:
        raise MergeError(
            f"{what} needs one value a member: got {len(value)} for {count} members: {_sources(inputs.members)}"
        )
    return tuple(float(one) for one in value)


def require_shares(weights: Sequence[float] | None) -> None:
    """Refuse weights that say no shares of a mean; null, for equal ones, is well.

    Raises:
        MergeError: If one is negative or not finite, or they have no positive sum.
    """
    if weights is not None and not (all(0 <= one < math.inf for one in weights) and sum(weights) > 0):
        raise MergeError(f"weights must be finite, none negative and their sum above 0, got {list(weights)}")


def _sources(members: Sequence[CheckpointReader]) -> str:
    return ", ".join(member.source for member in members)


def _is_method(value: Any, module: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module
