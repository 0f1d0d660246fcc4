"""Finding columns and labels, and saying what is wrong with them."""

import datasets
import numpy as np
import pytest

from hf_zoo.data.columns import Columns, check_texts, encode_labels, find_columns, find_label, label_names
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import DataSpec

CLASSES = datasets.ClassLabel(names=["no", "yes"])
TEXT = datasets.Value("string")


def dataset_of(**features):
    values = {
        name: [0, 1] if isinstance(kind, datasets.ClassLabel) or kind.dtype == "int64" else ["a", "b"]
        for name, kind in features.items()
        if not isinstance(kind, datasets.Image)
    }
    values |= {name: [None, None] for name, kind in features.items() if isinstance(kind, datasets.Image)}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("features", "needs", "expected"),
    [
        ({"text": TEXT, "label": CLASSES}, {"text", "label"}, Columns(text="text", label="label")),
        ({"sentence": TEXT, "idx": datasets.Value("int64")}, {"text"}, Columns(text="sentence")),
        (
            {"premise": TEXT, "hypothesis": TEXT, "label": CLASSES},
            {"text", "label"},
            Columns(text="premise", text_pair="hypothesis", label="label"),
        ),
        (
            {"question": TEXT, "sentence": TEXT, "label": CLASSES},
            {"text", "label"},
            Columns(text="question", text_pair="sentence", label="label"),
        ),
        ({"text": TEXT, "label": CLASSES, "fine_label": CLASSES}, {"label"}, Columns(label="label")),
        ({"review": TEXT, "stars": CLASSES}, {"text", "label"}, Columns(text="review", label="stars")),
        ({"picture": datasets.Image(), "label": CLASSES}, {"image", "label"}, Columns(image="picture", label="label")),
        ({"img": datasets.Image(), "mask": datasets.Image()}, {"image"}, Columns(image="img")),
    ],
)
def test_columns_are_found_by_usual_name_or_by_type(features, needs, expected):
    assert find_columns(dataset_of(**features), DataSpec(), needs) == expected


def test_columns_named_in_the_recipe_are_taken():
    dataset = dataset_of(text=TEXT, title=TEXT, label=CLASSES, fine_label=CLASSES)
    spec = DataSpec(text="title", text_pair="text", label="fine_label")
    assert find_columns(dataset, spec, {"text", "label"}) == Columns(
        text="title", text_pair="text", label="fine_label"
    )


@pytest.mark.parametrize(
    ("features", "needs", "message"),
    [
        ({"text": TEXT, "sentence": TEXT}, {"text"}, r"which column is the text: text or sentence\? Say data\.text"),
        ({"premise": TEXT, "hypothesis": TEXT}, {"text"}, "which column is the text: premise or hypothesis"),
        (
            {"premise": TEXT, "hypothesis": TEXT, "text": TEXT, "label": CLASSES},
            {"text", "label"},
            "premise/hypothesis or text.*and data.text_pair",
        ),
        ({"fine": CLASSES, "coarse": CLASSES}, {"label"}, "which column is the label: fine or coarse"),
        ({"text": TEXT}, {"text", "label"}, r"no column of labels found: it has text \(string\)"),
        ({"text": TEXT}, {"image"}, "no column of images found"),
    ],
)
def test_what_cannot_be_decided_is_listed(features, needs, message):
    with pytest.raises(DataError, match=message):
        find_columns(dataset_of(**features), DataSpec(path="mine"), needs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            DataSpec(path="mine", text="txt"),
            r"mine: no column 'txt' \(data.text\) \(did you mean 'text'\?\): it has text",
        ),
        (DataSpec(path="mine", text="label"), r"column 'label' \(data.text\) holds no text"),
        (DataSpec(path="mine", text_pair="text"), "name the first text too"),
        (DataSpec(path="mine", label="lable"), "no column 'lable'"),
    ],
)
def test_a_wrong_column_in_the_recipe_is_named(spec, message):
    with pytest.raises(DataError, match=message):
        find_columns(dataset_of(text=TEXT, label=CLASSES), spec, {"text", "label"})


def test_a_label_that_nobody_asked_for_may_be_missing():
    assert find_label(dataset_of(text=TEXT), DataSpec()) is None
    assert find_label(dataset_of(text=TEXT, label=CLASSES), DataSpec()) == "label"


@pytest.mark.parametrize(
    ("values", "names", "indices"),
    [
        (["spam", "ham", "spam"], ("ham", "spam"), [1, 0, 1]),
        ([10, 2, 10], ("2", "10"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_plain_values_become_classes_in_sorted_order(values, names, indices):
    dataset = datasets.Dataset.from_dict({"label": values})
    assert label_names(dataset, "label", "mine") == names
    np.testing.assert_array_equal(encode_labels(dataset, "label", names, "mine"), indices)


def test_class_labels_keep_their_names_and_follow_another_order_of_them():
    dataset = dataset_of(label=CLASSES)
    assert label_names(dataset, "label", "mine") == ("no", "yes")
    assert encode_labels(dataset, "label", ("yes", "no"), "mine").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0], "holds float64: a label is a class"),
        (["a", None], "without a label"),
        (["a", "a"], "nothing to learn"),
    ],
)
def test_what_is_no_label_is_named(values, message):
    with pytest.raises(DataError, match=message):
        label_names(datasets.Dataset.from_dict({"label": values}), "label", "mine")


def test_hidden_and_foreign_labels_are_refused_with_their_row():
    hidden = datasets.Dataset.from_dict({"label": [1, -1]}, features=datasets.Features({"label": CLASSES}))
    with pytest.raises(DataError, match=r"mine: row 1 has no label.*null for data\.test_split"):
        encode_labels(hidden, "label", ("no", "yes"), "mine")
    foreign = datasets.Dataset.from_dict({"label": ["no", "maybe"]})
    with pytest.raises(DataError, match=r"label 'maybe' in row 1 of column 'label' is none of the 2 classes no, yes"):
        encode_labels(foreign, "label", ("no", "yes"), "mine")


def test_a_missing_text_is_named():
    with pytest.raises(DataError, match="mine: row 1 of column 'text' is no text but None"):
        check_texts(["a", None], "text", "mine")
