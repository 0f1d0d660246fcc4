from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from hf_zoo.errors import RecipeError
from hf_zoo.recipe.binding import UNKNOWN, bind, hint_at, paths_of


@dataclass(frozen=True, kw_only=True)
class Inner:
    SHORTHAND: ClassVar[str] = "kind"

    kind: Literal["a", "b"] = "a"
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: float = 0.5
    count: int | None = None
    switch: bool = False
    widths: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    targets: tuple[str, ...] | str = "all"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    many: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checked:
    density: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")


def mistakes_of(content, target=Outer, path=""):
    with pytest.raises(RecipeError) as caught:
        bind(content, target, "here", path)
    return list(caught.value.mistakes)


@pytest.mark.parametrize(
    ("key", "given", "bound"),
    [
        ("rate", 1, 1.0),
        ("count", 3, 3),
        ("count", None, None),
        ("switch", True, True),
        ("widths", [1, 2], (1, 2)),
        ("widths", 8, (8,)),
        ("widths", [], ()),
        ("pair", [0, 1], (0.0, 1.0)),
        ("targets", "all", "all"),
        ("targets", ["q", "v"], ("q", "v")),
        ("inner", "b", Inner(kind="b")),
        ("inner", {"width": 3}, Inner(width=3)),
        ("maybe", None, None),
        ("maybe", {}, Inner()),
        ("many", {"x": "b", "y": {}}, {"x": Inner(kind="b"), "y": Inner()}),
        ("free", {"a": {"b": [1, None, 2.5]}}, {"a": {"b": [1, None, 2.5]}}),
        ("name", 42, "42"),
    ],
)
def test_a_value_becomes_what_its_type_says(key, given, bound):
    value = getattr(bind({"name": "n", key: given}, Outer, "here"), key)
    assert (type(value), value) == (type(bound), bound)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("rate", "1", "expected a number, got the text '1'"),
        ("rate", True, "expected a number, got true"),
        ("rate", float("nan"), "expected a finite number, got nan"),
        ("rate", None, "expected a number, got null"),
        ("count", "3", "expected a whole number or null, got the text '3'"),
        ("count", 3.0, "expected a whole number or null, got 3.0"),
        ("count", True, "expected a whole number or null, got true"),
        ("switch", 1, "expected true or false, got 1"),
        ("switch", "yes", "expected true or false, got the text 'yes'"),
        ("name", 1.5, "expected a text, got 1.5: quote it to make it a text"),
        ("name", True, "expected a text, got true: quote it to make it a text"),
        ("widths", {}, "expected a list of whole numbers, got an empty mapping"),
        ("widths", None, "expected a list of whole numbers, got null"),
        ("pair", [1], "expected a list of 2 values, got [1]"),
        ("targets", {"a": 1}, "expected a list of texts or a text, got a mapping with a"),
        ("inner", [1], "expected a mapping, got [1]"),
        ("inner", None, "expected a mapping, got null"),
        ("free", 3, "expected a mapping, got 3"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(key, given, message):
    assert mistakes_of({"name": "n", key: given}) == [f"{key}: {message}"]


def test_mistakes_inside_lists_and_mappings_carry_their_place():
    content = {"name": "n", "widths": [1, "2", 3.5], "many": {"x": {"width": "w"}}, "free": {"a": [float("inf")]}}
    assert [mistake.partition(": ")[0] for mistake in mistakes_of(content)] == [
        "widths[1]",
        "widths[2]",
        "many.x.width",
        "free.a[0]",
    ]


def test_an_unknown_choice_names_the_nearest_one():
    assert mistakes_of({"name": "n", "inner": {"kind": "bb"}}) == [
        "inner.kind: expected one of a, b, got the text 'bb' (did you mean 'b'?)"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "n", "switsh": True}, "switsh: unknown key (did you mean 'switch'?)"),
        ({"name": "n", "kind": "b"}, "kind: unknown key (did you mean 'inner.kind'?)"),  # the key of a section
        ({"name": "n", "inner": {"zzz": 1}}, "inner.zzz: unknown key: known here are kind, width"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(content, message):
    assert message in mistakes_of(content)


def test_everything_wrong_is_reported_at_once():
    content = {"rate": "x", "inner": {"kind": "c", "widht": 1}, "maybe": 3.5, "unknown_key": 0}
    paths = {mistake.partition(":")[0] for mistake in mistakes_of(content)}
    assert paths == {"name", "rate", "inner.kind", "inner.widht", "maybe.kind", "unknown_key"}


def test_a_dataclass_that_refuses_its_values_is_reported_with_the_rest_of_the_path():
    assert mistakes_of({"density": 2}, Checked, "parameters") == ["parameters: density must be in (0, 1], got 2.0"]


def test_input_is_not_written_to():
    content = {"name": "n", "widths": [1], "free": {"a": [1]}}
    bound = bind(content, Outer, "here")
    bound.free["a"].append(2)
    assert content == {"name": "n", "widths": [1], "free": {"a": [1]}}


def test_paths_and_their_hints():
    paths = list(paths_of(Outer))
    assert {"name", "inner", "inner.width", "maybe.width", "many"} <= set(paths)
    assert paths.index("free") < paths.index("inner.kind")  # outer ones first
    assert hint_at(Outer, "inner.width") is int
    assert hint_at(Outer, "maybe.width") is int
    assert hint_at(Outer, "many.anything.width") is int
    assert hint_at(Outer, "free.anything.at.all") is Any
    for unknown in ("inner.depth", "name.x", "nothing", "inner."):
        assert hint_at(Outer, unknown) is UNKNOWN
