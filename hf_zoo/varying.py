r"""Hyper-parameters that vary over the network, and tensors with a rule of their own.

Whatever varies, the outcome is a partition: the tensors fall into parts, and each part is merged by one method with
plain values. So every method can vary in every hyper-parameter without knowing of it. A method that looks at whole
models (TIES trims over the whole task vector) looks at its part.

A value is a number; a list with one value a member; or a mapping, of which the most particular key that fits a tensor
counts, whatever their order: a regular expression, then `block 5` and `blocks 0-3`, then `heads` and `embeddings`,
then `blocks`, then `otherwise`. Two of one kind that fit a tensor with different values are refused.

    density:
      attention\.output: 0.4       # any key that is none of the others: a regular expression, searched in the name
      blocks 0-3: 0.2             # or `block 5`
      embeddings: 0.9             # what comes before the first block
      heads: 1.0
      blocks: [0.1, 0.3, 0.9]     # a gradient: from the first block to the last, linear in between
      otherwise: 0.5
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

from torch import Tensor

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import Method, Need, Work, get_method, make_method
from hf_zoo.places import Places
from hf_zoo.recipe.schema import MergeRule

_RANGE = re.compile(r"blocks? (\d+)(?:-(\d+))?")
ROLES = ("embeddings", "heads", "blocks", "otherwise")


@dataclass(frozen=True)
class Part:
    """Tensors that are merged by one method.

    Attributes:
        method: The method with plain values.
        names: The tensors.
        members: Places of the members that have them; null for all.
    """

    method: Method
    names: tuple[str, ...]
    members: tuple[int, ...] | None = None

    def inputs(self, inputs: MergeInputs) -> MergeInputs:
        """Return what its method is given."""
        own = inputs.only(self.names)
        return own if self.members is None else own.of_members(self.members)


@dataclass(frozen=True)
class Merger:
    """The methods of a merge and the tensors each of them makes.

    Attributes:
        method: The method most tensors are merged by.
        parameters: Its hyper-parameters, as written.
        parts: Who makes what.
    """

    method: type[Method]
    parameters: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def needs(self) -> frozenset[Need]:
        """What its methods need."""
        return frozenset(chain.from_iterable(part.method.needs for part in self.parts))

    @property
    def uses_base(self) -> bool:
        """Whether anything is made from the base."""
        return any(part.method.uses_base for part in self.parts)

    def check(self, inputs: MergeInputs) -> None:
        """Refuse inputs a method cannot work with.

        Raises:
            MergeError: If a need is not met or the number of members does not fit.
        """
        for part in self.parts:
            part.method.check(part.inputs(inputs))

    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Return name and tensor of all parts, one part after another."""
        return chain.from_iterable(part.method.merge(part.inputs(inputs)) for part in self.parts)

    def works(self, inputs: MergeInputs) -> Iterator[Work]:
        """Return the works of all parts."""
        return chain.from_iterable(part.method.works(part.inputs(inputs)) for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest and a card say of it."""
        main = next((part.method for part in self.parts if type(part.method) is self.method), None)
        plain = (main or self.method()).describe()
        plain["parameters"] = {**plain["parameters"], **self.parameters}
        if len(self.parts) > 1:
            plain["parts"] = [
                {
                    "method": part.method.name(),
                    "tensors": len(part.names),
                    **_departures(part.method, plain["parameters"]),
                }
                for part in self.parts
            ]
        return plain


def plan_parts(
    method: str,
    parameters: Mapping[str, Any],
    rules: Sequence[MergeRule],
    places: Places,
    names: Iterable[str],
    averaged: Iterable[str] = (),
    source: str = "merge recipe",
) -> Merger:
    """Find out which method makes which tensor, and with which values.

    Args:
        method: The method of tensors no rule is about.
        parameters: Its hyper-parameters; values may vary over the network.
        rules: Tensors with a rule of their own; the first that fits counts.
        places: Where the tensors are.
        names: Names of the tensors to make.
        averaged: Tensors that no task vector can be taken of, as the base lacks them or never trained them; methods
            that need a base leave them to the plain average.
        source: Where the recipe comes from, for the error.

    Raises:
        MergeError: If a method or member is unknown, or a rule fits no tensor.
        RecipeError: If a hyper-parameter is unknown, of a wrong type or out of range.
    """
    fitting = [_fits(rule.tensors, places, f"rules[{place}].tensors: ") for place, rule in enumerate(rules)]
    used, average = set(), frozenset(averaged)
    plain = None if any(map(_varies, parameters.values())) else make_method(method, parameters, source)
    parts: dict[Method, list[str]] = {}
    for name in names:
        place = next((i for i, fits in enumerate(fitting) if fits(name)), None)
        if place is None:
            made = plain or _at(method, parameters, name, places, source, "parameters")
        else:
            used.add(place)
            made = _of_rule(rules[place], method, parameters, name, places, source, f"rules[{place}]")
        if name in average and Need.BASE in made.needs:
            made = make_method("average")
        parts.setdefault(made, []).append(name)
    for place, rule in enumerate(rules):
        if place not in used:
            raise MergeError(f"rules[{place}].tensors: {rule.tensors!r} fits no tensor that an earlier rule left")
    return Merger(get_method(method), dict(parameters), tuple(Part(made, tuple(own)) for made, own in parts.items()))


def fixed_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters that do not vary over the network."""
    return {key: value for key, value in parameters.items() if not _varies(value)}


def idle_keys(value: Any, places: Places, names: Sequence[str], path: str) -> list[str]:
    """Return the keys of a value that fit no tensor: misspelled, or of a part these models do not have.

    Args:
        value: As written; see the module.
        places: Where the tensors are.
        names: Names of the tensors to make.
        path: Of the hyper-parameter in its recipe.

    Returns:
        Paths with keys. The roles, such as `heads`, may be without tensors in a merge of trunks.

    Raises:
        RecipeError: If a key cannot be understood.
    """
    if isinstance(value, list | tuple):
        return [key for one in value for key in idle_keys(one, places, names, path)]
    idle = []
    for key, content in value.items() if isinstance(value, Mapping) else ():
        if key not in ROLES and not any(map(_fits(str(key), places, f"{path}: "), names)):
            idle.append(f"{path}: {str(key)!r}")
        idle += idle_keys(content, places, names, f"{path}.{key}")
    return idle


def value_at(value: Any, name: str, places: Places, path: str) -> Any:
    """Return what a hyper-parameter is for one tensor.

    Args:
        value: As written; see the module.
        name: The tensor.
        places: Where the tensors are.
        path: Of the hyper-parameter in its recipe, for the error.

    Returns:
        A plain value, a list of them, or null where no key fits: then the method's default holds.

    Raises:
        RecipeError: If a key or a gradient cannot be understood, or two keys of one kind fit with different values.
    """
    if isinstance(value, list | tuple):
        return [value_at(one, name, places, path) for one in value]
    if not isinstance(value, Mapping):
        return value
    fitting: dict[int, dict[str, Any]] = {}
    for key, content in value.items():
        if key == "blocks" and isinstance(content, list | tuple):
            fitting.setdefault(_rank(key), {})[key] = _along(content, places.depth(name), f"{path}.blocks")
        elif _fits(str(key), places, f"{path}: ")(name):
            fitting.setdefault(_rank(str(key)), {})[str(key)] = value_at(content, name, places, f"{path}.{key}")
    if not fitting:
        return None
    found = fitting[min(fitting)]
    if any(other != one for one, other in pairwise(found.values())):
        raise RecipeError(
            "merge recipe",
            [f"{path}: {' and '.join(map(repr, found))} both fit {name!r}, with different values: let one fit it"],
        )
    return next(iter(found.values()))


def _rank(key: str) -> int:
    """Return how particular a key is, 0 for the most."""
    ranks = {"embeddings": 2, "heads": 2, "blocks": 3, "otherwise": 4}
    return ranks.get(key, 1 if _RANGE.fullmatch(key) else 0)


def _varies(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(_varies, value)))


def _at(method: str, parameters: Mapping[str, Any], name: str, places: Places, source: str, path: str) -> Method:
    plain = {}
    for key, value in parameters.items():
        own = value_at(value, name, places, f"{path}.{key}")
        if own is not None or not isinstance(value, Mapping):  # where no key fits, the default holds
            plain[key] = own
    return make_method(method, plain, source, path)


def _of_rule(
    rule: MergeRule, method: str, parameters: Mapping[str, Any], name: str, places: Places, source: str, path: str
) -> Method:
    if rule.keep is not None:
        return make_method("passthrough", {"keep": rule.keep}, source, path)
    if rule.method is not None:
        return _at(rule.method, rule.parameters, name, places, source, f"{path}.parameters")
    return _at(method, {**parameters, **rule.parameters}, name, places, source, f"{path}.parameters")


def _fits(key: str, places: Places, path: str) -> Callable[[str], bool]:
    """Return whether a key fits a tensor, as a function of the tensor's name."""
    if key == "otherwise":
        return lambda name: True
    if key == "embeddings":
        return lambda name: name in places.embeddings
    if key == "heads":
        return lambda name: name in places.heads
    if key == "blocks":
        return lambda name: name in places.blocks
    if span := _RANGE.fullmatch(key):
        first, last = int(span[1]), int(span[2] or span[1])
        return lambda name: name in places.blocks and first <= places.blocks[name].index <= last
    try:
        pattern = re.compile(key)
    except re.error as error:
        mistake = f"{path}{key!r} is neither one of {', '.join(ROLES)}, `block 3`, nor a regular expression: {error}"
        raise RecipeError("merge recipe", [mistake]) from error
    return lambda name: pattern.search(name) is not None


def _along(values: Sequence[Any], depth: float, path: str) -> float:
    """Return the value at a depth, linear between the values given for equal distances."""
    if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        mistake = f"{path}: a gradient is a list of numbers from the first block to the last, got {values!r}"
        raise RecipeError("merge recipe", [mistake])
    position = depth * (len(values) - 1)
    left = min(int(position), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return float(values[left] + (values[right] - values[left]) * (position - left))


def _departures(method: Method, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of hyper-parameters that are written otherwise."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    shown = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"parameters": own} if (own := {k: v for k, v in shown.items() if written.get(k, v) != v}) else {}


def with_extras(merger: Merger, owners: Mapping[str, tuple[int, ...]]) -> Merger:
    """Have tensors that only some members have averaged over those that have them.

    Args:
        merger: Who makes the others.
        owners: Name -> places of the members that have it.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, members in owners.items():
        groups.setdefault(members, []).append(name)
    average = make_method("average")
    added = [Part(average, tuple(names), members) for members, names in groups.items()]
    return replace(merger, parts=(*merger.parts, *added))
