"""Values that differ between members, slices, blocks and tensors, as mergekit's YAML has them.

A value is a scalar, `{"layers": [...]}` (a gradient over the blocks of a slice), `{"filters": [[text, value], ...]}`
(the first whose text stands in the tensor's name; `*` fits all), `{"slices": [...]}` or `{"members": [...]}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def value_at(value: Any, name: str, depth: float = 0.0, *, member: int = 0, number: int = 0) -> Any:
    """Return what a value is for one tensor.

    Args:
        value: See the module.
        name: The tensor's name.
        depth: How deep it lies in its slice, from 0 to 1; 0 outside the blocks.
        member: The member's place.
        number: The slice's place.

    Returns:
        A scalar; null where no filter fits.
    """
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "members":
        return value_at(content[member], name, depth, number=number)
    if kind == "slices":
        return value_at(content[number], name, depth, member=member)
    if kind == "filters":
        chosen = next((one for text, one in content if text == "*" or text in name), None)
        return value_at(chosen, name, depth)
    position = depth * (len(content) - 1)
    left = min(int(position), len(content) - 1)
    right = min(left + 1, len(content) - 1)
    return (1 - (position - left)) * content[left] + (position - left) * content[right]


def recipe_value(value: Any, slices: Sequence[Mapping[str, Any]] | None = None) -> Any:
    """Write a value in the form a merge recipe has for values that vary over the network.

    Args:
        value: See the module.
        slices: The merge's slices with their sources; needed where the value differs between them.

    Returns:
        A scalar, a list with one value a member, or a mapping of which the most particular key counts.
    """
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "members":
        return [recipe_value(one, slices) for one in content]
    if kind == "slices":
        assert slices is not None  # a value has slices where its merge has
        return _of_slices(content, slices)
    if kind == "layers":
        return {"blocks": {"blocks": list(content)}, "otherwise": content[0]}
    return {pattern: recipe_value(one) for pattern, one in _patterns(content)}


def mapped_value(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a value with a function applied to every scalar in it.

    Args:
        value: See the module.
        function: From scalar to scalar; linear where the value has gradients.
    """
    if not isinstance(value, Mapping):
        return function(value)
    ((kind, content),) = value.items()
    if kind == "filters":
        return {kind: [[text, mapped_value(one, function)] for text, one in content]}
    return {kind: [mapped_value(one, function) for one in content]}


def value_of_slices(values: Sequence[Any]) -> Any:
    """Return one value for all slices, or one each where they differ or begin their gradients anew."""
    gradual = len(values) > 1 and "'layers'" in repr(values)
    return values[0] if not gradual and all(value == values[0] for value in values) else {"slices": list(values)}


def _of_slices(values: Sequence[Any], slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write out the value of every block; a gradient begins anew with each slice."""
    written: dict[str, Any] = {}
    number = 0
    for value, content in zip(values, slices, strict=True):
        start, stop = content["sources"][0]["layer_range"]
        for offset in range(stop - start):
            depth = offset / (stop - start - 1) if stop - start > 1 else 1.0
            written[f"block {number}"] = _at_depth(value, depth)
            number += 1
    return written | {"embeddings": _at_depth(values[0], 0.0), "otherwise": _at_depth(values[-1], 0.0)}


def _at_depth(value: Any, depth: float) -> Any:
    if isinstance(value, Mapping) and "filters" in value:
        return {pattern: _at_depth(one, depth) for pattern, one in _patterns(value["filters"])}
    return value_at(value, "", depth)


def _patterns(filters: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
    """Return filters as keys of a recipe, written so that only the first that fits a tensor does.

    `*` fits what no earlier filter does; filters behind it never count.
    """
    written: list[tuple[str, Any]] = []
    earlier: list[str] = []
    for text, value in filters:
        if text == "*":
            return [*written, ("otherwise", value)]
        excluded = "".join(f"(?!.*{one})" for one in earlier)
        pattern = re.escape(text)
        written.append((f"^{excluded}.*{pattern}" if excluded else f"(?:{pattern})", value))
        earlier.append(pattern)
    return written
