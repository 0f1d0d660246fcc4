"""Images: decoding, normalisation, views, and draws that survive any way of making batches."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_zoo.data.images import (
    ImageCollator,
    ImageTable,
    Normalisation,
    decode_images,
    make_image_processor,
    measure_normalisation,
    read_image_processor,
)
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import AugmentationSpec

PLAIN = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CHANGED = AugmentationSpec(crop="resized", flip=0.5, color_jitter=0.5, random_erasing=0.5)


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageTable(images, torch.arange(20) % 4)


def collator(table, augmentation=CHANGED, seed=5, train=True, views=1):
    return ImageCollator(table, augmentation, PLAIN, 4, seed, train, views)


def png(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def dataset_of(cells):
    return datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)})
    ).cast_column("image", datasets.Image())


def test_evaluation_normalises_and_nothing_else(table):
    batch = collator(table, train=False)([table[3], table[7]])
    expected = (table.images[[3, 7]].double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch["pixel_values"].double(), expected, atol=1e-6, rtol=0)  # float32 rounding
    assert batch["labels"].tolist() == [3, 3]


def test_training_batches_do_not_depend_on_workers_or_order(table):
    make = collator(table)
    order = [3, 1, 4, 15, 9, 2, 6, 5, 8, 7]

    def batches(**options):
        loader = DataLoader(table, batch_size=4, sampler=order, collate_fn=make, **options)
        return [batch["pixel_values"] for batch in loader]

    here = batches()
    for options in ({"num_workers": 1}, {"num_workers": 2}):
        for one, other in zip(here, batches(**options), strict=True):
            assert torch.equal(one, other)
    for start, expected in ((8, here[2]), (0, here[0])):  # as a resumed run would, and in another order
        assert torch.equal(make([table[i] for i in order[start : start + 4]])["pixel_values"], expected)
    shuffled = make([table[i] for i in (9, 3, 8)])["pixel_values"]  # each image on its own
    assert torch.equal(shuffled[1], here[0][0])
    assert torch.equal(shuffled[0], here[1][0])


def test_epochs_and_seeds_differ(table):
    samples = [table[i] for i in range(6)]
    first = collator(table)(samples)["pixel_values"]
    assert torch.equal(first, collator(table)(samples)["pixel_values"])
    assert not torch.equal(first, collator(table, seed=6)(samples)["pixel_values"])
    table.set_epoch(1)
    assert not torch.equal(first, collator(table)([table[i] for i in range(6)])["pixel_values"])


def test_persistent_workers_see_the_epoch(table):
    loader = DataLoader(table, batch_size=20, collate_fn=collator(table), num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 0):
        table.set_epoch(epoch)
        expected = collator(table)([table[i] for i in range(20)])["pixel_values"]
        assert torch.equal(next(iter(loader))["pixel_values"], expected)


def test_soft_targets_come_with_smoothing_and_mixing_alone(table):
    samples = [table[i] for i in range(4)]
    assert collator(table)(samples)["labels"].dtype == torch.int64
    soft = collator(table, AugmentationSpec(label_smoothing=0.2))(samples)["labels"]
    torch.testing.assert_close(soft.diagonal(), torch.full((4,), 0.85))
    mixed = collator(table, AugmentationSpec(mixup=0.8, label_smoothing=0.1))(samples)["labels"]
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    assert collator(table, AugmentationSpec(mixup=0.8), train=False)(samples)["labels"].dtype == torch.int64


def test_the_two_views_of_an_image_lie_half_a_batch_apart():
    levels = torch.arange(10, 250, 30, dtype=torch.uint8)
    table = ImageTable(levels[:, None, None, None].expand(-1, 3, 8, 8).contiguous())
    spec = AugmentationSpec(crop="resized", flip=0.5, rotation=0)
    order = [5, 0, 7, 2]
    batch = collator(table, spec, views=2)([table[i] for i in order])
    assert set(batch) == {"pixel_values"}
    shown = (batch["pixel_values"] * 0.25 + 0.5) * 255
    for place, index in enumerate(order):  # constant images stay constant, so their level tells whose view it is
        for view in (shown[place], shown[place + 4]):
            torch.testing.assert_close(view, torch.full((3, 8, 8), float(levels[index])), atol=1e-3, rtol=0)


def test_views_differ_and_those_of_evaluation_never_change(table):
    train, evaluate = collator(table, views=2), collator(table, views=2, train=False)
    samples = [table[i] for i in range(6)]
    first, second = train(samples)["pixel_values"].split(6)
    assert (first != second).flatten(1).any(1).all()
    fixed = evaluate(samples)["pixel_values"]
    table.set_epoch(3)
    again = [table[i] for i in range(6)]
    assert torch.equal(evaluate(again)["pixel_values"], fixed)
    assert not torch.equal(train(again)["pixel_values"][:6], first)
    halves = [evaluate(again[:2])["pixel_values"], evaluate(again[2:])["pixel_values"]]
    torch.testing.assert_close(torch.cat([halves[0][:2], halves[1][:4]]), fixed[:6], rtol=0, atol=0)


def test_measured_normalisation_is_that_of_the_pixels(table):
    found = measure_normalisation(table, "test")
    pixels = table.images.double() / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), atol=5e-7)  # rounded to 6 digits
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3), correction=0), atol=5e-7)
    with pytest.raises(DataError, match="channel 0 has the same value"):
        measure_normalisation(ImageTable(torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), "test")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_that_ships_makes_the_pixels_of_training(tmp_path, channels):
    generator = np.random.default_rng(0)
    shape = (13, 17) if channels == 1 else (13, 17, 3)
    pictures = [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(3)]
    images = decode_images(dataset_of([png(picture) for picture in pictures]), "image", "test", image_size=8)
    table = ImageTable(images)
    normalisation = measure_normalisation(table, "test")
    make_image_processor((8, 8), normalisation).save_pretrained(tmp_path)

    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert read_image_processor(processor) == (normalisation, 8)
    found = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    ours = ImageCollator(table, AugmentationSpec(), normalisation, 0, 0, False)([table[i] for i in range(3)])
    torch.testing.assert_close(found, ours["pixel_values"], atol=1e-5, rtol=0)  # float32, another order of operations


def test_gray_stays_gray_and_mixed_modes_become_colour():
    gray, colour = np.full((4, 4), 9, np.uint8), np.full((4, 4, 3), 7, np.uint8)
    assert decode_images(dataset_of([png(gray)] * 2), "image", "test").shape == (2, 1, 4, 4)
    images = decode_images(dataset_of([png(gray), png(colour)]), "image", "test")
    assert images.shape == (2, 3, 4, 4)
    assert images[0].unique().tolist() == [9]
    assert decode_images(dataset_of([png(colour)]), "image", "test", num_channels=1).shape == (1, 1, 4, 4)


def test_bad_images_name_their_row():
    good, other = np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)
    with pytest.raises(DataError, match=r"mine: images of column 'image' differ in size.*set data\.image_size"):
        decode_images(dataset_of([png(good), png(other)]), "image", "mine")
    broken = {"bytes": b"no picture", "path": None}
    with pytest.raises(DataError, match="mine: the image in row 1 of column 'image' cannot be decoded"):
        decode_images(dataset_of([png(good), broken]), "image", "mine")
    large = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    cut = {"bytes": png(large)["bytes"][:1000], "path": None}
    with pytest.raises(DataError, match="row 1 of column 'image' cannot be decoded"):
        decode_images(dataset_of([png(large), cut]), "image", "mine")
    with pytest.raises(DataError, match="8 bits"):
        decode_images(dataset_of([png(np.zeros((4, 4), np.uint16))]), "image", "mine")


def test_channels_and_normalisation_must_agree(table):
    with pytest.raises(DataError, match=r"3 channel\(s\).*are for 1"):
        ImageCollator(table, AugmentationSpec(), Normalisation((0.5,), (0.5,)), 4, 0, True)
