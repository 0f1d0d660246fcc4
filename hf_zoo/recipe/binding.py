"""Plain data into frozen dataclasses, strictly: nothing is ignored, nothing is guessed, every mistake is collected.

What a type takes: a whole number where a decimal one is asked for, and where a text is; one value where a tuple of
values is asked for, unless the field also takes that value as it is; one value where a section is asked for that
names its leading key in `SHORTHAND` (`objective: masked_lm`). Nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from hf_zoo.errors import RecipeError, ZooError, nearest

T = TypeVar("T")

INVALID: Any = object()
UNKNOWN: Any = object()


@dataclass(frozen=True)
class Mistake:
    """Something wrong with a recipe.

    Attributes:
        path: Dotted path of the key; empty for the whole.
        message: What was expected, what came, what to do.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def bind(content: Any, target: type[T], source: str, path: str = "") -> T:
    """Build a dataclass from plain data.

    Args:
        content: A mapping from field names to values, nested as the dataclass is.
        target: The dataclass; its type hints are the law.
        source: Where the content came from, for the error.
        path: Dotted path of the content in its source (`parameters`).

    Returns:
        The dataclass; lists have become tuples where the hints say so.

    Raises:
        RecipeError: If anything is unknown, missing or of a wrong type; it names all of it.
    """
    binder = Binder(target)
    value = binder.bind(content, target, path)
    if binder.mistakes:
        raise RecipeError(source, [str(mistake) for mistake in binder.mistakes])
    return value


class Binder:
    """Bind values and collect what is wrong with them.

    Args:
        root: The dataclass whose dotted paths are suggested for unknown keys.
        foreign: Keys of the root that belong elsewhere -> what they are.

    Attributes:
        mistakes: What has been wrong so far, in the order met.
    """

    def __init__(self, root: type, foreign: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.foreign = dict(foreign or {})
        self.mistakes: list[Mistake] = []

    def bind(self, value: Any, hint: Any, path: str) -> Any:
        """Return a value as its type hint wants it.

        A section with mistakes in it comes back with the defaults of the keys concerned (null where there is none),
        so that the rest of it can still be looked at.

        Args:
            value: Plain data.
            hint: A type: dataclass, scalar, `Literal`, `tuple`, `dict`, a union of these, or `Any`.
            path: Dotted path of the value.

        Returns:
            The bound value, or `INVALID`.
        """
        origin = typing.get_origin(hint)
        if hint is Any:
            return self._bind_any(value, path)
        if origin in {Union, types.UnionType}:
            return self._bind_union(value, hint, path)
        if dataclasses.is_dataclass(hint):
            return self._bind_section(value, typing.cast(type, hint), path)
        if origin is Literal:
            return self._bind_literal(value, hint, path)
        if origin is tuple:
            return self._bind_tuple(value, hint, path)
        if origin is dict:
            return self._bind_dict(value, hint, path)
        return self._bind_scalar(value, hint, path)

    def wrong(self, path: str, message: str) -> Any:
        """Note a mistake and return `INVALID`."""
        self.mistakes.append(Mistake(path, message))
        return INVALID

    def _bind_section(self, value: Any, target: type, path: str) -> Any:
        shorthand = getattr(target, "SHORTHAND", None)
        if shorthand is not None and value is not None and not isinstance(value, Mapping | list | tuple):
            value = {shorthand: value}
        if not isinstance(value, Mapping):
            return self.wrong(path, f"expected a mapping, got {shown(value)}")
        hints = hints_of(target)
        bound: dict[str, Any] = {}
        for key, content in value.items():
            where = join(path, str(key))
            if key not in hints:
                self.wrong(where, self._unknown_key(str(key), target, path))
            else:
                bound[key] = self.bind(content, hints[key], where)
        for field in dataclasses.fields(target):
            if field.name in hints and field.name not in value and not _has_default(field):
                self.wrong(join(path, field.name), f"is missing: expected {expected(hints[field.name])}")
                bound[field.name] = INVALID
        return self._construct(target, bound, path)

    def _construct(self, target: type, bound: dict[str, Any], path: str) -> Any:
        fields = {field.name: field for field in dataclasses.fields(target)}
        values = {
            name: value if value is not INVALID else None
            for name, value in bound.items()
            if value is not INVALID or not _has_default(fields[name])
        }
        try:
            return target(**values)
        except (ZooError, ValueError, TypeError) as error:
            if INVALID not in bound.values():
                self.wrong(path, str(error))
            return INVALID

    def _unknown_key(self, key: str, target: type, path: str) -> str:
        if target is self.root and key in self.foreign:
            return f"is {self.foreign[key]}"
        known = list(hints_of(target))
        hint = nearest(key, known) if _close(key, known) else ""
        if not hint:
            elsewhere = [known_path for known_path in paths_of(self.root) if known_path.rpartition(".")[2] == key]
            hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(key, known)
        return f"unknown key{hint}" if hint else f"unknown key: known {'here ' if path else ''}are {', '.join(known)}"

    def _bind_union(self, value: Any, hint: Any, path: str) -> Any:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        optional = len(options) < len(typing.get_args(hint))
        if value is None and optional:
            return None
        if len(options) == 1:
            before = len(self.mistakes)
            bound = self.bind(value, options[0], path)
            own = f"expected {expected(options[0])}"
            for index in range(before, len(self.mistakes)):
                mistake = self.mistakes[index]
                if mistake.path == path and mistake.message.startswith(own):
                    wider = f"{own} or null{mistake.message[len(own) :]}"
                    self.mistakes[index] = Mistake(path, wider)
            return bound
        plain = not isinstance(value, Mapping | list | tuple)
        scalars_first = sorted(options, key=lambda option: typing.get_origin(option) is tuple) if plain else options
        for option in scalars_first:
            trial = Binder(self.root)
            bound = trial.bind(value, option, path)
            if not trial.mistakes:
                return bound
        return self.wrong(path, f"expected {expected(hint)}, got {shown(value)}")

    def _bind_literal(self, value: Any, hint: Any, path: str) -> Any:
        choices = typing.get_args(hint)
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        hint_text = nearest(value, choices) if isinstance(value, str) else ""
        return self.wrong(path, f"expected {expected(hint)}, got {shown(value)}{hint_text}")

    def _bind_tuple(self, value: Any, hint: Any, path: str) -> Any:
        arguments = typing.get_args(hint)
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        if repeated and isinstance(value, bool | int | float | str) and _is_scalar_hint(arguments[0]):
            value = [value]
        if not isinstance(value, list | tuple) or (not repeated and len(value) != len(arguments)):
            return self.wrong(path, f"expected {expected(hint)}, got {shown(value)}")
        hints = [arguments[0]] * len(value) if repeated else list(arguments)
        items = [
            self.bind(item, inner, f"{path}[{i}]") for i, (item, inner) in enumerate(zip(value, hints, strict=True))
        ]
        return INVALID if any(item is INVALID for item in items) else tuple(items)

    def _bind_dict(self, value: Any, hint: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.wrong(path, f"expected a mapping, got {shown(value)}")
        inner = typing.get_args(hint)[1]
        bound = {}
        for key, content in value.items():
            if not isinstance(key, str):
                self.wrong(path, f"expected texts as keys, got {shown(key)}")
                continue
            bound[key] = self.bind(content, inner, join(path, key))
        return {key: content for key, content in bound.items() if content is not INVALID}

    def _bind_any(self, value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return self._bind_dict(value, dict[str, Any], path)
        if isinstance(value, list | tuple):
            items = [self.bind(item, Any, f"{path}[{i}]") for i, item in enumerate(value)]
            return INVALID if any(item is INVALID for item in items) else items
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return value
        return self.wrong(path, f"expected plain data with finite numbers, got {shown(value)}")

    def _bind_scalar(self, value: Any, hint: Any, path: str) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if hint is float and (whole or isinstance(value, float)):
            number = float(value)
            if math.isfinite(number):
                return number
            return self.wrong(path, f"expected a finite number, got {shown(value)}")
        if hint is int and whole:
            return int(value)
        if hint is str and (whole or isinstance(value, str)):
            return str(value)
        if hint is bool and isinstance(value, bool):
            return value
        if hint not in {float, int, str, bool}:
            raise TypeError(f"{path}: the binder knows no type {hint!r}")
        advice = ": quote it to make it a text" if hint is str and isinstance(value, float | bool) else ""
        return self.wrong(path, f"expected {expected(hint)}, got {shown(value)}{advice}")


@functools.cache
def hints_of(target: type) -> dict[str, Any]:
    """Return the type hints of a dataclass's own fields, in their order."""
    hints = typing.get_type_hints(target)
    return {field.name: hints[field.name] for field in dataclasses.fields(target) if field.init}


def hint_at(target: Any, path: str) -> Any:
    """Return the type hint at a dotted path below a dataclass, or `UNKNOWN`."""
    for key in path.split("."):
        if target is Any:
            continue
        section = section_in(target)
        if section is not None:
            target = hints_of(section).get(key, UNKNOWN)
        elif typing.get_origin(target) is dict and key:
            target = typing.get_args(target)[1]
        else:
            return UNKNOWN
        if target is UNKNOWN:
            return UNKNOWN
    return target


def section_in(hint: Any) -> type | None:
    """Return the dataclass a hint is or optionally holds, if any."""
    options = typing.get_args(hint) if typing.get_origin(hint) in {Union, types.UnionType} else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def paths_of(target: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every field below a dataclass, outer ones first."""
    inner = []
    for name, hint in hints_of(target).items():
        yield join(prefix, name)
        if (section := section_in(hint)) is not None:
            inner.append((section, join(prefix, name)))
    for section, path in inner:
        yield from paths_of(section, path)


def join(path: str, key: str) -> str:
    """Return the dotted path of a key below a path."""
    return f"{path}.{key}" if path else key


def overlap(path: str, other: str) -> bool:
    """Whether two dotted paths are the same, or one lies below the other."""
    return path == other or path.startswith((f"{other}.", f"{other}[")) or other.startswith((f"{path}.", f"{path}["))


def expected(hint: Any) -> str:
    """Say in words what a type hint takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if origin in {Union, types.UnionType}:
        return " or ".join(expected(option) for option in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            inner = words.get(arguments[0], "")
            return f"a list of {inner.removeprefix('a ')}s" if inner.startswith("a ") else "a list"
        return f"a list of {len(arguments)} values"
    return "anything" if hint is Any else "a mapping"


def shown(value: Any) -> str:
    """Say in words what came, shortened to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(str(key) for key in list(value)[:4])}" if value else "an empty mapping"
    text = repr(list(value)) if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _close(key: str, known: list[str]) -> bool:
    from difflib import get_close_matches

    return bool(get_close_matches(key, known, n=1, cutoff=0.75))


def _is_scalar_hint(hint: Any) -> bool:
    return hint in {int, float, str, bool} or typing.get_origin(hint) is Literal
