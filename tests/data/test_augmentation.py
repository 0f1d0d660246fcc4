"""Augmentation against hand-computed images and torchvision's own operations."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from hf_zoo.data.augmentation import augment, check_augmentation, erase, mix, smooth
from hf_zoo.data.draws import Draws
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import AugmentationSpec

EVERYTHING = AugmentationSpec(
    crop="resized", flip=0.5, rotation=10, color_jitter=0.5, grayscale=0.2, blur=3, random_erasing=0.5
)


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def draws(indices, seed=3, epoch=1):
    return Draws(seed, epoch, np.asarray(indices))


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_an_image_changes_the_same_way_in_any_batch(images, crop):
    spec = AugmentationSpec(
        crop=crop, flip=0.5, rotation=10, color_jitter=0.5, grayscale=0.2, blur=3, random_erasing=0.5
    )
    whole = augment(images, spec, draws(range(12)))
    part = augment(images[[7, 2]], spec, draws([7, 2]))
    assert torch.equal(part, whole[[7, 2]])
    erased = erase(images.float(), 0.5, draws(range(12)))
    assert torch.equal(erase(images[[7, 2]].float(), 0.5, draws([7, 2])), erased[[7, 2]])


def test_seed_epoch_and_view_change_every_image(images):
    first = augment(images, EVERYTHING, draws(range(12)))
    others = [
        augment(images, EVERYTHING, draws(range(12), seed=4)),
        augment(images, EVERYTHING, draws(range(12), epoch=2)),
        augment(images, EVERYTHING, draws(range(12)), view=1),
    ]
    for other in others:
        assert (first != other).flatten(1).any(1).all()


def test_flips_turn_the_expected_share_around(images):
    many = images[:1].expand(2000, -1, -1, -1)
    out = augment(many, AugmentationSpec(flip=0.3), draws(range(2000)))
    flipped = (out == images[0].flip(-1)).flatten(1).all(1)
    kept = (out == images[0]).flatten(1).all(1)
    assert (flipped | kept).all()
    assert abs(flipped.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)  # five standard errors


def test_padded_crops_are_windows_of_the_padded_image_and_reach_every_place(images):
    many = images[:1].expand(500, -1, -1, -1)
    out = augment(many, AugmentationSpec(crop="pad"), draws(range(500)))
    padded = torch.nn.functional.pad(images[0], (2, 2, 2, 2))
    windows = padded.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    matches = (out[:, None] == windows[None]).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).all()  # all 25 places; the chance to miss one is 25 * (24/25)^500 < 4e-8


def test_resized_crops_keep_a_constant_image_and_are_spread_like_torchvisions():
    constant = torch.full((50, 3, 32, 32), 77, dtype=torch.uint8)
    spec = AugmentationSpec(crop="resized")
    assert torch.equal(augment(constant, spec, draws(range(50))), constant)

    def spans(images):  # how much of a ramp from 0 to 31 is left in view
        return (images[..., -1].float() - images[..., 0].float()).mean((1, 2)) / 31

    ramp = torch.arange(32, dtype=torch.uint8).expand(800, 1, 32, 32)
    ours = spans(augment(ramp, spec, draws(range(800))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(32)
        theirs = spans(torch.stack([crop(image) for image in ramp]))
    assert ours.min() < 0.35  # an area of 8 % is 0.28 wide
    assert ours.max() == 1
    error = math.sqrt((ours.var() + theirs.var()) / 800)
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    assert abs(ours.std() - theirs.std()) < 5 * error


def test_a_rotation_is_torchvisions(images):
    spec = AugmentationSpec(rotation=20)
    out = augment(images[:1], spec, draws([5]))
    degrees = (2 * draws([5]).uniform("view0/rotation", 1)[0, 0] - 1) * 20
    expected = v2.functional.rotate(images[0], float(degrees), v2.InterpolationMode.BILINEAR)
    assert torch.equal(out[0], expected)


def test_jitter_leaves_a_fifth_alone_and_gray_makes_channels_equal(images):
    many = images[:1].expand(400, -1, -1, -1)
    out = augment(many, AugmentationSpec(color_jitter=0.5), draws(range(400)))
    kept = (out == images[0]).flatten(1).all(1).float().mean()
    assert abs(kept - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 400)
    gray = augment(images, AugmentationSpec(grayscale=1.0), draws(range(12)))
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray, v2.functional.rgb_to_grayscale(images, 3))


def test_everything_works_on_gray_images():
    gray = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    out = augment(gray, EVERYTHING, draws(range(6)))
    assert out.shape == gray.shape
    assert out.dtype == torch.uint8


def test_augmentation_does_not_write_to_its_input(images):
    before = images.clone()
    augment(images, EVERYTHING, draws(range(12)))
    mix(images.float(), torch.ones(12, 2) / 2, AugmentationSpec(cutmix=1.0), draws(range(12)))
    normalised = images.float()
    erase(normalised, 1.0, draws(range(12)))
    assert torch.equal(images, before)
    assert torch.equal(normalised, before.float())


def test_erasing_fills_one_rectangle_of_the_stated_size_with_standard_noise():
    blank = torch.full((300, 3, 32, 32), 9.0)
    out = erase(blank, 0.5, draws(range(300)))
    changed = out.ne(9.0).all(1)
    share = changed.flatten(1).any(1).float().mean()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 300)
    for image in changed[changed.flatten(1).any(1)]:
        rows, columns = image.any(1), image.any(0)
        assert image.sum() == rows.sum() * columns.sum()  # a full rectangle
        assert 0.01 < float(image.sum()) / 1024 < 0.36  # 2 to 33 %, up to the rounding of its sides
    noise = out[out.ne(9.0)].double()
    assert abs(noise.mean()) < 5 / math.sqrt(len(noise))
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / len(noise))


def test_smoothed_targets_by_hand():
    targets = smooth(torch.tensor([1, 0]), 4, 0.2)
    # 1 - 0.2 + 0.2 / 4 = 0.85 on the label, 0.2 / 4 = 0.05 elsewhere
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))


def test_mixup_blends_images_and_targets_by_one_share():
    images = torch.tensor([0.0, 10.0, 20.0])[:, None, None, None].expand(3, 1, 2, 2)
    targets = torch.eye(3)
    spec = AugmentationSpec(mixup=0.8)
    share = float(draws([4, 5, 6]).of_batch("mix").beta(0.8, 0.8))
    mixed, soft = mix(images, targets, spec, draws([4, 5, 6]))
    expected = torch.tensor([20 * (1 - share), 10.0, 20 * share])[:, None, None, None].expand(3, 1, 2, 2)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(soft, torch.tensor([[share, 0, 1 - share], [0, 1, 0], [1 - share, 0, share]]))


@pytest.mark.parametrize("batch", range(8))
def test_cutmix_targets_are_the_shares_of_pixels(batch):
    images = torch.stack([torch.zeros(1, 12, 10), torch.ones(1, 12, 10)])
    mixed, soft = mix(images, torch.eye(2), AugmentationSpec(cutmix=1.0), draws([batch, 9]))
    kept = [(mixed[0] == 0).double().mean(), (mixed[1] == 1).double().mean()]
    assert set(mixed.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(soft.diagonal().double(), torch.stack(kept))  # float32 rounding
    torch.testing.assert_close(soft.sum(1), torch.ones(2))


def test_mixup_and_cutmix_take_turns_when_both_are_on():
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    spec = AugmentationSpec(mixup=1.0, cutmix=1.0)
    blended = sum(
        bool(((mixed > 0) & (mixed < 1)).any())
        for mixed, _ in (mix(images, torch.eye(2), spec, draws([batch, batch + 1])) for batch in range(400))
    )
    assert abs(blended / 400 - 0.5) < 5 * math.sqrt(0.25 / 400)


def test_without_mixing_nothing_is_touched():
    images, targets = torch.ones(2, 1, 2, 2), torch.eye(2)
    mixed, soft = mix(images, targets, AugmentationSpec(), draws([0, 1]))
    assert mixed is images
    assert soft is targets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, "flip is a probability"),
        ({"blur": 4}, "odd kernel"),
        ({"mixup": -1.0}, "mixup must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing lies in"),
    ],
)
def test_impossible_augmentation_is_named(change, message):
    with pytest.raises(DataError, match=message):
        check_augmentation(AugmentationSpec(**change))
