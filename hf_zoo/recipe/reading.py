"""YAML into plain data: scalars as in YAML 1.2, duplicate keys refused, harmless whatever the file holds.

PyYAML follows YAML 1.1, where `1e-4` is a text, `no` is false and `1:30` is ninety. Here `1e-4` is a number, only
`true` and `false` are booleans, and everything else that is not a plain decimal is a text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 40
MAX_NODES = 100_000

_TAG = "tag:yaml.org,2002:"
_MERGE_KEY = "<<"


class ReadingError(Exception):
    """Carry every mistake found in a text, one line each."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Anchors, aliases and merge keys (`<<`) work, as long as the document they expand to stays small.

    Args:
        text: The document.

    Returns:
        None, booleans, whole and decimal numbers, texts, lists and dictionaries with text keys; dictionaries keep
        the written order.

    Raises:
        ReadingError: If the text is not YAML, holds a key twice, a tag, or expands to too much.
    """
    if len(text) > MAX_CHARACTERS:
        raise ReadingError([f"is too long for a recipe: the limit is {MAX_CHARACTERS} characters"])
    try:
        _check_depth(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ReadingError([_syntax_mistake(error)]) from error
    if node is None:
        return None
    _check_size(node)
    mistakes: list[str] = []
    value = _construct(node, mistakes)
    if mistakes:
        raise ReadingError(mistakes)
    return value


class _Loader(yaml.SafeLoader):
    """A SafeLoader that resolves plain scalars as YAML 1.2's core schema does, but for octal and hexadecimal forms."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # ruff: ignore[mutable-class-default] -- PyYAML's own attribute


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# No leading zeros and no plus sign: a whole number can then be turned back into the text it was written as.
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^-?(?:0|[1-9][0-9]*)$"), list("-0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recursive sees it: the event stream is flat."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ReadingError([f"line {event.start_mark.line + 1}: nested more than {MAX_DEPTH} levels deep"])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases that hold themselves or multiply into more nodes than any recipe needs."""
    sizes: dict[int, int | None] = {}

    def size_of(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise ReadingError([f"line {node.start_mark.line + 1}: an alias refers to what it is part of"])
        if known:
            return known
        sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(size_of(child) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            size += sum(size_of(key) + size_of(value) for key, value in node.value)
        if size > MAX_NODES:
            raise ReadingError([
                f"line {node.start_mark.line + 1}: its aliases expand to more than {MAX_NODES} values"
            ])
        sizes[id(node)] = size
        return size

    size_of(root)


def _construct(node: yaml.Node, mistakes: list[str]) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return _construct_mapping(node, mistakes)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_construct(child, mistakes) for child in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _construct_scalar(node, mistakes)
    mistakes.append(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is not allowed in a recipe")
    return None


def _construct_scalar(node: yaml.ScalarNode, mistakes: list[str]) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text)
    except ValueError:
        mistakes.append(f"line {node.start_mark.line + 1}: {text[:40]!r} is no {kind}")
        return None
    mistakes.append(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is not allowed in a recipe")
    return None


def _construct_mapping(node: yaml.MappingNode, mistakes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append(f"line {line}: a key is a text, not a list or a mapping")
            continue
        key = key_node.value
        value = _construct(value_node, mistakes)
        if key in lines:
            mistakes.append(f"line {line}: key {key!r} stands here a second time (first in line {lines[key]})")
        elif key == _MERGE_KEY and key_node.style is None:
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                mistakes.append(f"line {line}: `<<` merges mappings, not other values")
                continue
            for part in reversed(parts):
                merged.update(part)
        else:
            values[key] = value
        lines.setdefault(key, line)
    return {**{key: value for key, value in merged.items() if key not in values}, **values}


def _syntax_mistake(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if mark is None:
        return f"not YAML: {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
