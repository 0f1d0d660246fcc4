"""Generating factors into members, and what identifies a recipe: its canonical form, its digest, its seeds."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_zoo.errors import RecipeError, nearest
from hf_zoo.recipe.binding import UNKNOWN, Binder, Mistake, hint_at, join, overlap, paths_of, section_in, shown
from hf_zoo.recipe.ranges import check_ranges
from hf_zoo.recipe.rules import MEMBER_DIGITS, check_rules
from hf_zoo.recipe.schema import MergeRecipe, TrainRecipe

MAX_MEMBERS = 10_000
MAX_SHOWN = 160

# What a whole population shares. A factor there would make members that differ in nothing a model shows.
SHARED_KEYS = ("name", "output", "description", "members", "vary", "publish", "statistics", "training.report_to")
# What neither weights nor metrics depend on.
WITHOUT_EFFECT = ("output", "members", "publish", "statistics", "training.report_to", "num_threads", "lineage")
LABELS = ("name", "description")


@dataclass(frozen=True)
class MemberPlan:
    """A member of a grid.

    Attributes:
        index: Its place in the whole grid, from 0.
        name: `NAME-000`, with three digits or more.
        factors: Every dotted path the grid moves -> this member's value.
        recipe: Its own recipe: factors applied, `vary` and `members` empty.
    """

    index: int
    name: str
    factors: dict[str, Any]
    recipe: TrainRecipe


def expand(recipe: TrainRecipe) -> tuple[MemberPlan, ...]:
    """Return every member of a recipe's grid, whichever of them `members` selects.

    The members are the cartesian product of the factors in written order, the last one moving fastest; a member whose
    recipe equals an earlier one's is left out. A factor is a dotted path with the list of its values. Where an entry
    of the list is a mapping, it sets several keys together: below the factor's own path where that is a section
    (`model.head: [{type: linear}, {type: mlp, hidden: [64]}]`), else by whole dotted paths, the factor's name being a
    label (`task: [{task: sst, data.path: docs-sentences}, ...]`). Keys an entry does not set keep the recipe's values.

    Raises:
        RecipeError: If a factor is empty, unknown, of the wrong type or moved twice, or any member breaks a rule; it
            names all of it.
    """
    plans, mistakes = examine(recipe)
    if mistakes:
        raise RecipeError(f"recipe {recipe.name!r}", [str(mistake) for mistake in mistakes])
    return plans


def examine(recipe: TrainRecipe) -> tuple[tuple[MemberPlan, ...], list[Mistake]]:
    """Return the members of a recipe's grid and everything wrong with grid and members.

    Args:
        recipe: A recipe whose types are right.
    """
    steps, mistakes = check_grid(type(recipe), recipe.vary)
    if mistakes:
        return (), mistakes + check_ranges(recipe, [mistake.path for mistake in mistakes])
    plans = _plan(recipe, steps)
    mistakes = _member_mistakes(plans)
    if recipe.members is not None and (problem := _selection_problem(recipe.members, len(plans))):
        mistakes.append(Mistake("members", problem))
    return plans, mistakes


def check_grid(recipe_class: type, vary: Mapping[str, Any]) -> tuple[list[list[dict[str, Any]]], list[Mistake]]:
    """Return the settings of each factor, as plain data by whole dotted path, and what is wrong with the factors.

    Args:
        recipe_class: The recipe's class, whose fields the paths lead to.
        vary: The recipe's `vary`.
    """
    binder = Binder(recipe_class)
    steps: list[list[dict[str, Any]]] = []
    for factor, values in vary.items():
        where = f"vary.{factor}"
        if not isinstance(values, list | tuple):
            binder.wrong(where, f"expected a list of values, got {shown(values)}")
        elif not values:
            binder.wrong(where, "is empty: give at least one value, or leave the factor out")
        else:
            steps.append([_settings(binder, factor, value, f"{where}[{i}]") for i, value in enumerate(values)])
    if not binder.mistakes:
        _check_clashes(binder, list(vary), steps)
        size = math.prod(len(step) for step in steps)
        if size > MAX_MEMBERS:
            binder.wrong("vary", f"makes {size} members, more than {MAX_MEMBERS}: split the grid into several recipes")
    return steps, list(dict.fromkeys(binder.mistakes))


def select(plans: Sequence[MemberPlan], members: str | None) -> tuple[MemberPlan, ...]:
    """Return the members a selection names, in the grid's order.

    Args:
        plans: The whole grid.
        members: `3`, `0:8` (as in Python, 8 not included), `0,4,7`, or several of these with commas; null for all.

    Raises:
        RecipeError: If it is no such selection, or names a member the grid does not have.
    """
    if members is None:
        return tuple(plans)
    if problem := _selection_problem(members, len(plans)):
        raise RecipeError("selection of members", [f"members: {problem}"])
    wanted = {index for part in members.split(",") for index in _selected(part, len(plans))}
    return tuple(plan for plan in plans if plan.index in wanted)


def canonical(recipe: TrainRecipe | MergeRecipe, spelled_out: bool = False) -> dict[str, Any]:
    """Return a recipe as plain JSON types with sorted keys, without what no result depends on.

    Left out are `output`, `members`, `publish`, `statistics` and `training.report_to`. The compact form also leaves
    out every key that has its default value, so that it stays the same when a later version adds keys; the digest is
    taken of it.
    `build_recipe` makes the recipe again out of either form.

    Args:
        recipe: Any recipe.
        spelled_out: Keep the keys that have their default value.
    """
    plain = to_plain(recipe, compact=not spelled_out)
    for path in WITHOUT_EFFECT:
        if not (path == "members" and isinstance(recipe, MergeRecipe)):
            _drop(plain, path)
    return _sorted(plain)


def portable(recipe: TrainRecipe | MergeRecipe) -> dict[str, Any]:
    """Return a recipe for a manifest: canonical, every default spelt out, of absolute paths only the last part."""
    plain = canonical(recipe, spelled_out=True)
    for path in ("parent", "population", "base", "members", "data.path", "tokenizer.path"):
        *parents, last = path.split(".")
        holder: Any = plain
        for key in parents:
            holder = holder.get(key) or {}
        if last in holder:
            holder[last] = without_root(holder[last])
    if isinstance(recipe, MergeRecipe):
        for spec in plain["data"].values():
            spec["path"] = without_root(spec["path"])
        for one in plain["slices"]:
            one["base_model"] = without_root(one["base_model"])
            for source in one["sources"]:
                source["model"] = without_root(source["model"])
        if plain["tokenizer"] is not None:
            _shorten_tokenizer(plain["tokenizer"])
    return plain


def _shorten_tokenizer(plain: dict[str, Any]) -> None:
    """Leave the last part alone of every path in a merge's tokenizer."""
    plain["source"], plain["base"] = without_root(plain["source"]), without_root(plain["base"])
    for override in plain["tokens"].values():
        source = override.get("source")
        if isinstance(source, dict) and "model" in source:
            source["model"] = without_root(source["model"])
        elif isinstance(source, str):
            override["source"] = without_root(source)


def without_root(value: Any) -> Any:
    """Return a value as it may leave this machine: of absolute paths, also in lists, only the last part."""
    if isinstance(value, list):
        return [without_root(item) for item in value]
    return Path(value).name if isinstance(value, str) and (Path(value).is_absolute() or value[:1] == "~") else value


def digest(recipe: TrainRecipe | MergeRecipe) -> str:
    """Return the SHA-256 of a recipe's compact canonical form and its verb, without `name` and `description`.

    Equal digests mean equal results on one machine, whatever the population is called. The order of the factors
    counts, since it numbers the members.
    """
    content = {key: value for key, value in canonical(recipe).items() if key not in LABELS}
    identity = {"verb": type(recipe).__name__, "recipe": content, "factors": list(getattr(recipe, "vary", {}))}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what changed between two canonical recipes, one line a dotted path: `training.epochs: 3 -> 5`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        pair = [
            json.dumps(side[path], ensure_ascii=False) if path in side else "(not set)" for side in (before, after)
        ]
        if pair[0] != pair[1]:
            lines.append(f"{path}: {pair[0]} -> {pair[1]}")
    return lines


def spread_seed(name: str, seed: int) -> int:
    """Return a seed of 31 bits that shares nothing with that of another name or a neighbouring seed."""
    return int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def seeds_of(recipe: TrainRecipe) -> dict[str, int]:
    """Return the spread seed of each source of chance: `init`, `head`, `order`, `augmentation`, `dropout`."""
    own = {field.name: getattr(recipe.seeds, field.name) for field in dataclasses.fields(recipe.seeds)}
    return {name: spread_seed(name, recipe.seed if seed is None else seed) for name, seed in own.items()}


def to_plain(value: Any, compact: bool = False) -> Any:
    """Return a recipe, or a part of one, as dictionaries, lists and scalars.

    Args:
        value: A dataclass of the schema, or what one holds.
        compact: Leave out the fields that have their default value.
    """
    if dataclasses.is_dataclass(value):
        plain = {}
        for field in dataclasses.fields(value):
            content = getattr(value, field.name)
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if not (compact and default is not dataclasses.MISSING and content == default):
                plain[field.name] = to_plain(content, compact)
        return plain
    if isinstance(value, Mapping):
        return {key: to_plain(content, compact) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, compact) for item in value]
    return value


def _selection_problem(members: str, count: int) -> str | None:
    if not re.fullmatch(r"\s*(?:\d+|\d*:\d*)\s*(?:,\s*(?:\d+|\d*:\d*)\s*)*", members):
        return f"expected members like 3, 0:8 or 0,4,7, got {members!r}"
    for part in members.split(","):
        chosen = _selected(part, count)
        if not chosen or chosen[-1] >= count:
            return f"{part.strip()!r} names none or too many: the grid has {count} members, 0 to {count - 1}"
    return None


def _selected(part: str, count: int) -> range:
    start, colon, stop = (text.strip() for text in part.partition(":"))
    first = int(start or 0)
    return range(first, int(stop) if stop else count) if colon else range(first, first + 1)


def _settings(binder: Binder, factor: str, value: Any, where: str) -> dict[str, Any]:
    """Return what one entry of a factor sets, by whole dotted path, and note what is wrong with it."""
    hint = hint_at(binder.root, factor)
    if not isinstance(value, Mapping):
        pairs = [("", factor, value)]
    elif hint is not UNKNOWN and _takes_mapping(hint):
        pairs = [(path, join(factor, path), content) for path, content in _leaves(value)]
        pairs = pairs or [("", factor, value)]
    else:
        pairs = [(path, path, content) for path, content in _leaves(value)]
        if not pairs:
            binder.wrong(where, "sets nothing: expected a mapping from dotted paths to values")
    settings: dict[str, Any] = {}
    for below, path, content in pairs:
        own = hint_at(binder.root, path)
        label = f"vary.{factor}" if not below else f"{where}.{below}"
        if own is UNKNOWN:
            known = [known for known in paths_of(binder.root) if not _is_shared(known)]
            last = [known_path for known_path in known if known_path.rpartition(".")[2] == path]
            binder.wrong(label, f"unknown key{f' (did you mean {last[0]!r}?)' if last else nearest(path, known)}")
        elif _is_shared(path):
            binder.wrong(label, "cannot be a factor: it belongs to the population, not to its members")
        else:
            section = section_in(own)
            shorthand = getattr(section, "SHORTHAND", None)
            if shorthand is not None and content is not None and not isinstance(content, Mapping | list | tuple):
                path = join(path, shorthand)
                own = hint_at(binder.root, path)
            binder.bind(content, own, f"{where}.{below}" if below else where)
            settings[path] = content
    return settings


def _takes_mapping(hint: Any) -> bool:
    return hint is Any or section_in(hint) is not None or getattr(hint, "__origin__", None) is dict


def _is_shared(path: str) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in SHARED_KEYS)


def _check_clashes(binder: Binder, factors: list[str], steps: list[list[dict[str, Any]]]) -> None:
    pairs = zip(factors, steps, strict=True)
    moved = [(factor, {path for setting in step for path in setting}) for factor, step in pairs]
    for (first, paths), (second, others) in itertools.combinations(moved, 2):
        for path in sorted(others):
            if any(overlap(path, other) for other in paths):
                binder.wrong(f"vary.{second}", f"moves {path}, which vary.{first} moves too: put them into one factor")


def _plan(recipe: TrainRecipe, steps: list[list[dict[str, Any]]]) -> tuple[MemberPlan, ...]:
    base = to_plain(recipe)
    base["vary"], base["members"] = {}, None
    moved = list(dict.fromkeys(path for step in steps for setting in step for path in setting))
    plans: list[MemberPlan] = []
    seen: set[str] = set()
    for combination in itertools.product(*steps):
        content = copy.deepcopy(base)
        for setting in combination:
            for path, value in setting.items():
                _set(content, path, value)
        binder = Binder(type(recipe))
        member = binder.bind(content, type(recipe), "")
        # Single values were bound before; only two entries that tear one section apart can still fail here.
        if binder.mistakes:
            raise RecipeError(f"recipe {recipe.name!r}", [str(mistake) for mistake in binder.mistakes])
        identity = digest(member)
        if identity not in seen:
            seen.add(identity)
            factors = dict(_factors(to_plain(member), moved))
            index = len(plans)
            plans.append(MemberPlan(index, f"{recipe.name}-{index:0{MEMBER_DIGITS}d}", factors, member))
    return tuple(plans)


def _factors(plain: dict[str, Any], moved: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield every moved path with its value; a section is told by its moved keys where there are any."""
    for path in moved:
        if not any(other.startswith(f"{path}.") for other in moved):
            value: Any = plain
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            yield path, value


def _member_mistakes(plans: Sequence[MemberPlan]) -> list[Mistake]:
    """Return every member's mistakes once, with the members concerned where not all are."""
    concerned: dict[Mistake, list[MemberPlan]] = {}
    for plan in plans:
        ranges = check_ranges(plan.recipe)
        for mistake in ranges + check_rules(plan.recipe, [mistake.path for mistake in ranges]):
            concerned.setdefault(mistake, []).append(plan)
    mistakes = []
    for mistake, members in concerned.items():
        message = mistake.message
        if len(members) < len(plans):
            factors = ", ".join(f"{path}={json.dumps(value)}" for path, value in members[0].factors.items())
            first = factors if len(factors) <= MAX_SHOWN else f"{factors[: MAX_SHOWN - 3]}..."
            message += f" (in {len(members)} of {len(plans)} members, the first with {first})"
        mistakes.append(Mistake(mistake.path, message))
    return mistakes


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(content.get(key), dict):
            content[key] = {}
        content = content[key]
    # An empty mapping sets nothing of a section, but makes one where there was none.
    if value != {} or not isinstance(content.get(last), dict):
        content[last] = copy.deepcopy(value)


def _drop(content: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    holders = [content]
    for key in parents:
        if not isinstance(holders[-1].get(key), dict):
            return
        holders.append(holders[-1][key])
    holders[-1].pop(last, None)
    for holder, key in zip(reversed(holders[:-1]), reversed(parents), strict=True):
        if not holder[key]:
            del holder[key]


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _leaves(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is not a mapping, and empty mappings, with its dotted path."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{path}", leaf) for path, leaf in _leaves(value))
        else:
            yield str(key), value
