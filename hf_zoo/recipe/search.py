r"""The part of a merge recipe that says which of its hyper-parameters are searched, and how.

    search:
      sampler: cmaes
      num_candidates: 60
      over:
        parameters.scale: {low: 0.1, high: 1.5}
        parameters.weights: {low: 0, high: 1, each: member}      # a list with one number a member
        parameters.density.blocks: {low: 0.1, high: 1, each: 3}  # a gradient of three numbers
        rules.0.parameters.scale: [0.3, 1.0]                     # choices

A key of `over` is `method` or a dotted path below `parameters` or `rules`; a dot after a backslash belongs to a key
(`parameters.density.attention\.output`). A key that is no such path is a label: its choices are mappings
from paths to values that move together (`which: [{method: average}, {method: ties, parameters.density: 0.3}]`).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from hf_zoo.recipe.binding import Binder, overlap, shown

SEARCHABLE = ("method", "parameters", "rules")
DEFAULT_CANDIDATES = 50
MAX_CANDIDATES = 10_000
_DOT = re.compile(r"(?<!\\)\.")


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How the hyper-parameters of a merge are found, by the members' tasks' validation splits alone.

    Attributes:
        over: Dotted path of a hyper-parameter -> a list of choices, or a range.
        sampler: `grid` tries every combination; `random` draws; `tpe` draws more where it went well (Bergstra et al.
            2011); `cmaes` moves and shapes a normal distribution (Hansen 2016, arXiv:1604.00772), over ranges only.
        num_candidates: Merges to try; null is the whole grid, else 50. More of them go on with the same search.
        seed: Seed of what is drawn; null follows the recipe's.
    """

    over: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["grid", "random", "tpe", "cmaes"] = "grid"
    num_candidates: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class RangeSpec:
    """The numbers a hyper-parameter may have.

    Attributes:
        low: The smallest.
        high: The largest.
        log: Equal ratios count alike, not equal differences.
        whole: Whole numbers only.
        num: Points of a grid, ends included; only for a grid, and needed there.
        each: A list of such numbers instead of one: `member` for one a member, or how many.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    num: int | None = None
    each: int | Literal["member"] | None = None

    def points(self) -> list[float]:
        """Return the points of a grid; whole numbers that fall together stand once."""
        count = self.num or 1
        shares = [index / max(count - 1, 1) for index in range(count)]
        if self.log:
            values = [math.exp(math.log(self.low) * (1 - s) + math.log(self.high) * s) for s in shares]
        else:
            values = [self.low * (1 - share) + self.high * share for share in shares]
        values[0] = self.low
        values[-1] = self.high if count > 1 else values[-1]
        return list(dict.fromkeys(round(value) if self.whole else value for value in values))


def domain_of(value: Any) -> RangeSpec | list[Any]:
    """Return a range, or the list of choices; of an entry of `over` that `check_search` found nothing wrong with."""
    if not isinstance(value, Mapping):
        return list(value)
    bound: RangeSpec = Binder(RangeSpec).bind(value, RangeSpec, "")
    return bound


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted path -> value of a candidate, labels resolved.

    Args:
        values: Key of `over` -> its value.
    """
    settings: dict[str, Any] = {}
    for key, value in values.items():
        settings |= value if _is_label(key) else {key: value}
    return settings


def apply_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain data with values put at dotted paths.

    Args:
        content: Plain data of a recipe: `method`, `parameters`, `rules`.
        settings: Dotted path -> value.

    Raises:
        ValueError: If a path leads through what is no mapping or list, or past the end of a list; says where.
    """
    changed = copy.deepcopy(dict(content))
    for path, value in settings.items():
        *parents, last = _DOT.split(path)
        holder: Any = changed
        for place, key in enumerate(parents):
            if isinstance(holder, list):
                holder = holder[_position(holder, key, path)]
            elif isinstance(holder, dict):
                holder = holder.setdefault(key, {})
            if not isinstance(holder, dict | list):
                raise ValueError(f"{path}: {'.'.join(parents[: place + 1])} is {shown(holder)}, not a mapping")
        if isinstance(holder, list):
            holder[_position(holder, last, path)] = copy.deepcopy(value)
        else:
            holder[last] = copy.deepcopy(value)
    return changed


def check_search(recipe: Any) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a merge recipe's search: dotted path, and what to do.

    Args:
        recipe: A `MergeRecipe`.
    """
    spec: SearchSpec | None = recipe.search
    if spec is None:
        return
    if not spec.over:
        yield "search.over", "is empty: name what to search, such as parameters.scale: {low: 0.1, high: 1.5}"
    if spec.num_candidates is not None and not 1 <= spec.num_candidates <= MAX_CANDIDATES:
        yield "search.num_candidates", f"must be in [1, {MAX_CANDIDATES}], got {spec.num_candidates}"
    if spec.sampler == "grid" and spec.num_candidates is not None:
        yield "search.num_candidates", "is for samplers that draw: a grid is tried whole"
    if spec.seed is not None and spec.seed < 0:
        yield "search.seed", f"must be 0 or more, got {spec.seed}"
    mistakes = [mistake for key, value in spec.over.items() for mistake in _check_entry(recipe, spec, key, value)]
    yield from mistakes
    if mistakes:
        return
    domains = {key: domain_of(value) for key, value in spec.over.items()}
    yield from _check_overlaps(domains)
    size = math.prod(len(d.points()) if isinstance(d, RangeSpec) else len(d) for d in domains.values())
    if spec.sampler == "grid" and size > MAX_CANDIDATES:
        yield "search.over", f"makes {size} candidates, more than {MAX_CANDIDATES}: take a sampler that draws"
    if spec.sampler == "cmaes" and len(domains) == 1 and all(_is_one_number(domain) for domain in domains.values()):
        yield "search.sampler", "cmaes needs two numbers or more: take tpe or grid for one"


def _check_entry(recipe: Any, spec: SearchSpec, key: str, value: Any) -> Iterator[tuple[str, str]]:
    path = f"search.over.{key}"
    if isinstance(value, Mapping):
        yield from _check_range(spec, key, value, path)
        yield from _check_path(recipe, key, path)
        return
    if not isinstance(value, list | tuple):
        yield path, f"expected a list of choices, or a range {{low: ..., high: ...}}, got {shown(value)}"
    elif not value:
        yield path, "is empty: give at least one choice"
    elif spec.sampler == "cmaes":
        yield path, "cmaes moves numbers, not choices: give a range {low: ..., high: ...}, or take tpe or grid"
    elif not _is_label(key):
        yield from _check_path(recipe, key, path)
    else:
        for place, choice in enumerate(value):
            if not isinstance(choice, Mapping) or not choice:
                known = f"method, or a path below {' or '.join(SEARCHABLE[1:])}"
                yield (
                    path,
                    (
                        f"is no path that can be searched ({known}), and a label's choices are mappings from paths to "
                        f"values, got {shown(choice)}"
                    ),
                )
                return
            for inner in choice:
                yield from _check_path(recipe, inner, f"{path}[{place}].{inner}")


def _check_path(recipe: Any, key: str, path: str) -> Iterator[tuple[str, str]]:
    first, *rest = _DOT.split(key)
    if first not in SEARCHABLE:
        yield path, f"cannot be searched: only {', '.join(SEARCHABLE)} can; all candidates share members and data"
    elif first == "method" and rest:
        yield path, "method has nothing below it: hyper-parameters are below parameters"
    elif first == "rules" and not (
        len(rest) > 1
        and rest[0].isdigit()
        and int(rest[0]) < len(recipe.rules)
        and (rest[1] in ("method", "keep") or (rest[1] == "parameters" and len(rest) > 2))
    ):
        yield path, f"expected rules.N.parameters.NAME, rules.N.method or rules.N.keep, N below {len(recipe.rules)}"
    elif first == "parameters" and not rest:
        yield path, "name a hyper-parameter: parameters.NAME"


def _check_range(spec: SearchSpec, key: str, value: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    binder = Binder(RangeSpec)
    span = binder.bind(value, RangeSpec, path)
    if binder.mistakes:
        yield from ((mistake.path, mistake.message) for mistake in binder.mistakes)
        return
    if not span.low < span.high:
        yield path, f"low must be below high, got {span.low:g} and {span.high:g}"
    if span.log and span.low <= 0:
        yield path, f"a logarithmic range lies above 0, got low {span.low:g}"
    if span.whole and not (span.low.is_integer() and span.high.is_integer()):
        yield path, f"the ends of whole numbers are whole, got {span.low:g} and {span.high:g}"
    if isinstance(span.each, int) and span.each < 1:
        yield f"{path}.each", f"must be 1 or more, or member, got {span.each}"
    if spec.sampler == "grid" and (span.num is None or span.num < 2):
        yield f"{path}.num", "is missing: a grid needs a number of points, 2 or more (or give a list of choices)"
    if spec.sampler != "grid" and span.num is not None:
        yield f"{path}.num", f"is for a grid; {spec.sampler} takes any number of the range"
    if key == "method" or re.fullmatch(r"rules\.\d+\.(method|keep)", key):
        yield path, "expected a list of choices, not a range"


def _check_overlaps(domains: Mapping[str, RangeSpec | list[Any]]) -> Iterator[tuple[str, str]]:
    moved = {
        key: {path for choice in domain for path in choice} if isinstance(domain, list) and _is_label(key) else {key}
        for key, domain in domains.items()
    }
    for (first, paths), (second, others) in combinations(moved.items(), 2):
        for path in sorted(others):
            if any(overlap(path, other) for other in paths):
                yield f"search.over.{second}", f"moves {path}, which search.over.{first} moves too"


def _is_one_number(domain: RangeSpec | list[Any]) -> bool:
    return isinstance(domain, RangeSpec) and domain.each in (None, 1)


def _is_label(key: str) -> bool:
    return _DOT.split(key)[0] not in SEARCHABLE and "." not in key


def _position(holder: Sequence[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(holder):
        raise ValueError(f"{path}: {key!r} is no place in a list of {len(holder)}, the first being 0")
    return int(key)
