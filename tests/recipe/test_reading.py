import pytest

from hf_zoo.recipe.reading import MAX_CHARACTERS, ReadingError, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        ("1E+4", 1e4),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("0", 0),
        ("-12", -12),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("''", ""),
    ],
)
def test_a_scalar_has_the_value_and_type_yaml_1_2_gives_it(text, value):
    read = read_yaml(text)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["no", "on", "yes", "0:8", "1:30", "007", "+3", "0x10", "1_000", "2024-01-01", "1e", "e5", "12:30:45"]
)
def test_what_only_yaml_1_1_converts_stays_a_text(text):
    assert read_yaml(text) == text


def test_not_a_number_is_read_as_one():
    assert read_yaml(".nan") != read_yaml(".nan")


def test_mappings_keep_their_written_order_and_text_keys():
    assert list(read_yaml("{b: 1, a: 2, 3: x}").items()) == [("b", 1), ("a", 2), ("3", "x")]


def test_a_duplicate_key_is_refused_with_both_lines():
    with pytest.raises(ReadingError) as caught:
        read_yaml("training:\n  epochs: 1\n  batch_size: 2\n  epochs: 3\n")
    assert caught.value.mistakes == ["line 4: key 'epochs' stands here a second time (first in line 2)"]


def test_all_duplicates_and_tags_are_reported_together():
    with pytest.raises(ReadingError) as caught:
        read_yaml("a: 1\na: 2\nb: !!python/object/apply:os.system [ls]\nc: !mine x\nd: !!binary aGk=\n? [x]\n: 1\n")
    assert [mistake.partition(":")[0] for mistake in caught.value.mistakes] == [f"line {n}" for n in (2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tkey: 1", "'open", "a: *nobody", "---\na: 1\n---\nb: 2", "a: \0"]
)
def test_broken_yaml_is_refused_in_one_line(text):
    with pytest.raises(ReadingError) as caught:
        read_yaml(text)
    assert len(caught.value.mistakes) == 1
    assert "\n" not in caught.value.mistakes[0]


def test_a_syntax_mistake_names_its_line():
    with pytest.raises(ReadingError, match="line 3, column 7"):
        read_yaml("name: a\ntraining:\n  a: b: c\n")


def test_anchors_and_merge_keys_work():
    text = "base: &base {epochs: 1, batch_size: 4}\nmine: {<<: *base, epochs: 2}\nboth: {<<: [{a: 1}, {a: 2, b: 3}]}"
    read = read_yaml(text)
    assert read["mine"] == {"batch_size": 4, "epochs": 2}
    assert read["both"] == {"a": 1, "b": 3}  # the first of several merged mappings wins


@pytest.mark.usefixtures("no_hang")  # expanded, it would be 9 ** 30 values
def test_aliases_that_multiply_are_refused():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ReadingError, match="expand to more than"):
        read_yaml("\n".join(levels))


def test_an_alias_inside_itself_is_refused():
    with pytest.raises(ReadingError, match="part of"):
        read_yaml("a: &a [1, *a]")


def test_deep_nesting_is_refused_before_it_exhausts_the_stack():
    with pytest.raises(ReadingError, match="levels deep"):
        read_yaml("[" * 20_000 + "]" * 20_000)


def test_a_text_too_long_is_refused():
    with pytest.raises(ReadingError, match="too long"):
        read_yaml("a" * (MAX_CHARACTERS + 1))
