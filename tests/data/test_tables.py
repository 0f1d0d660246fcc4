"""Tables and collators from recipes, for every objective."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_zoo.data.images import ImageTable, Normalisation, make_image_processor
from hf_zoo.data.sources import load_splits
from hf_zoo.data.tables import build_tables
from hf_zoo.data.texts import train_tokenizer
from hf_zoo.errors import DataError
from hf_zoo.recipe.grid import seeds_of
from hf_zoo.recipe.schema import (
    AugmentationSpec,
    DataSpec,
    ModelSpec,
    ObjectiveSpec,
    TokenizerSpec,
    TrainRecipe,
)

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def recipe_of(objective, path, data=None, **options):
    return TrainRecipe(
        name="x",
        objective=ObjectiveSpec(name=objective),
        data=DataSpec(path=str(path), **{"test_split": None} | (data or {})),
        tokenizer=TokenizerSpec(vocab_size=200),
        **options,
    )


def tables_of(recipe, processor=None):
    return build_tables(recipe, load_splits(recipe.data), processor)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 12)) for _ in range(60)]
    rows = {"premise": texts, "hypothesis": texts[::-1], "label": ["same", "other", "none"] * 20}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    return folder


def test_images_with_labels(image_folder):
    recipe = recipe_of(
        "image_classification", image_folder, {"image_size": 8}, augmentation=AugmentationSpec(label_smoothing=0.1)
    )
    tables = tables_of(recipe)
    assert {name: len(table) for name, table in tables.items()} == {"train": 18, "validation": 2}
    assert tables.labels == ("cat", "dog")
    assert tables.train.size == (8, 8)
    assert len(tables.normalisation.mean) == 3
    batch = tables.train_collator([tables.train[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    torch.testing.assert_close(batch["labels"].max(1).values, torch.full((4,), 0.95))
    clean = tables.eval_collators["validation"]([tables.validation[i] for i in range(2)])
    assert torch.equal(clean["labels"], tables.validation.labels)
    mean = torch.cat([tables.eval_collators["train"]([tables.train[i]])["pixel_values"] for i in range(18)]).mean()
    assert abs(mean) < 1e-5  # the training split itself is what mean and std were measured on


def test_contrastive_needs_no_labels_and_makes_two_views(image_folder):
    recipe = recipe_of(
        "contrastive", image_folder, {"image_size": 8, "label": None}, augmentation=AugmentationSpec(crop="resized")
    )
    tables = tables_of(recipe)
    assert tables.labels == ()
    assert tables.train.labels is None
    for collator, table in ((tables.train_collator, tables.train), (tables.eval_collators["train"], tables.train)):
        batch = collator([table[i] for i in range(3)])
        assert set(batch) == {"pixel_values"}
        assert batch["pixel_values"].shape == (6, 3, 8, 8)


def test_a_parent_s_processor_decides_channels_size_and_normalisation(image_folder):
    parent = make_image_processor((6, 6), Normalisation((0.25,), (0.5,)))
    tables = tables_of(recipe_of("image_classification", image_folder), parent)
    assert tables.processor is parent
    assert tables.train.images.shape[1:] == (1, 6, 6)
    assert tables.normalisation == Normalisation((0.25,), (0.5,))
    resized = tables_of(recipe_of("image_classification", image_folder, {"image_size": 4}), parent)
    assert resized.processor.size == {"height": 4, "width": 4}
    assert resized.normalisation == Normalisation((0.25,), (0.5,))


def test_the_network_s_channels_are_followed(image_folder):
    recipe = recipe_of(
        "image_classification",
        image_folder,
        {"image_size": 8},
        model=ModelSpec(type="vit", config={"num_channels": 1}),
    )
    assert tables_of(recipe).train.num_channels == 1


def test_mixed_sizes_ask_for_an_image_size(image_folder, tmp_path):
    for number, size in enumerate(((4, 4), (5, 4), (4, 4))):
        place = tmp_path / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, 100, np.uint8)).save(place / f"{number}.png")
    with pytest.raises(DataError, match=r"split train: images of column 'image' differ in size.*set data\.image_size"):
        tables_of(recipe_of("image_classification", tmp_path, {"validation_fraction": 0}))


def test_pairs_with_text_labels(text_folder):
    tables = tables_of(recipe_of("sequence_classification", text_folder, {"max_length": 32}))
    assert tables.labels == ("none", "other", "same")
    assert tables.processor.model_max_length == 32
    sample = tables.train[0]
    assert int(sample["token_type_ids"].max()) == 1
    batch = tables.train_collator([tables.train[i] for i in range(5)])
    assert batch["labels"].shape == (5,)
    assert batch["input_ids"].shape[1] <= 32


def test_documents_for_a_language_model(text_folder):
    recipe = recipe_of("masked_lm", text_folder, {"text": "premise", "max_length": 16}, seed=3)
    tables = tables_of(recipe)
    assert tables.train.labels is None
    assert tables.train_collator.seed == seeds_of(recipe)["augmentation"]
    batch = tables.train_collator([tables.train[i] for i in range(5)])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert ((batch["labels"] != -100).sum(1) >= 1).all()


def test_evaluation_does_not_depend_on_the_member_s_seeds(text_folder):
    one, two = (
        tables_of(recipe_of("masked_lm", text_folder, {"text": "premise", "max_length": 16}, seed=seed))
        for seed in (1, 2)
    )
    samples = [one.validation[i] for i in range(4)]
    first, second = (tables.eval_collators["validation"](samples)["labels"] for tables in (one, two))
    assert torch.equal(first, second)
    assert not torch.equal(one.train_collator(samples)["labels"], two.train_collator(samples)["labels"])


def test_a_tokenizer_is_loaded_from_its_path_or_named_as_missing(text_folder, tmp_path):
    tokenizer = train_tokenizer(WORDS * 4, TokenizerSpec(vocab_size=100), max_length=64)
    tokenizer.save_pretrained(tmp_path)
    recipe = recipe_of("sequence_classification", text_folder, {"max_length": 32})
    found = tables_of(replace(recipe, tokenizer=TokenizerSpec(path=str(tmp_path))))
    assert found.processor.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DataError, match=r"tokenizer\.path: no tokenizer can be loaded from .*nowhere"):
        tables_of(replace(recipe, tokenizer=TokenizerSpec(path=str(tmp_path / "nowhere"))))


def test_labels_of_a_later_split_must_be_known(text_folder, tmp_path):
    rows = {"text": ["alpha beta"] * 4, "label": ["a", "b", "a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict(rows | {"label": ["a", "c", "a", "a"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="split test: label 'c' in row 1 of column 'label' is none of the 2 classes"):
        tables_of(recipe_of("sequence_classification", tmp_path, {"test_split": "test", "validation_fraction": 0}))


def test_an_image_table_checks_what_it_is_given():
    with pytest.raises(DataError, match="uint8"):
        ImageTable(torch.zeros(2, 1, 4, 4))
    with pytest.raises(DataError, match="3 labels for 2 images"):
        ImageTable(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
