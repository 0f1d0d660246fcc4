"""Random changes of training images, and mixing of images and labels, with draws that depend on the sample alone."""

# B = images, C = channels, H = W = pixels, K = classes

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from hf_zoo.data.draws import Draws
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import AugmentationSpec

ATTEMPTS = 10  # rectangles tried before a crop falls back to the centre and an erasure is given up, as in torchvision
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER_PROBABILITY = 0.8
BLUR_SIGMA = (0.1, 2.0)
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def check_augmentation(spec: AugmentationSpec) -> None:
    """Check what types cannot say.

    Raises:
        DataError: If a probability lies outside [0, 1], a strength is negative, or a blur kernel is even.
    """
    wrong = []
    for name in ("flip", "grayscale", "random_erasing"):
        if not 0 <= getattr(spec, name) <= 1:
            wrong.append(f"augmentation.{name} is a probability in [0, 1], got {getattr(spec, name)}")
    for name in ("rotation", "color_jitter", "mixup", "cutmix"):
        if getattr(spec, name) < 0:
            wrong.append(f"augmentation.{name} must not be negative, got {getattr(spec, name)}")
    if not 0 <= spec.label_smoothing < 1:
        wrong.append(f"augmentation.label_smoothing lies in [0, 1), got {spec.label_smoothing}")
    if spec.blur < 0 or (spec.blur and spec.blur % 2 == 0):
        wrong.append(f"augmentation.blur is 0 or an odd kernel size in pixels, got {spec.blur}")
    if wrong:
        raise DataError("; ".join(wrong))


def augment(images: Tensor, spec: AugmentationSpec, draws: Draws, view: int = 0) -> Tensor:
    """Flip, crop, rotate, jitter, drop colour and blur, in this order (that of SimCLR's published zoo).

    Args:
        images: Uint8, (B, C, H, W).
        spec: What to do.
        draws: The batch's draws.
        view: Views of one image differ by this number.

    Returns:
        Uint8, (B, C, H, W); `images` is not written to.
    """
    out = images
    if spec.flip:
        flipped = torch.from_numpy(draws.uniform(f"view{view}/flip", 1)[:, 0] < spec.flip)
        out = torch.where(flipped[:, None, None, None], out.flip(-1), out)
    if spec.crop == "pad":
        out = _padded_crops(out, draws.uniform(f"view{view}/crop", 2))
    elif spec.crop == "resized":
        out = _resized_crops(out, draws.uniform(f"view{view}/crop", 4 * ATTEMPTS))
    if spec.rotation:
        degrees = (2 * draws.uniform(f"view{view}/rotation", 1)[:, 0] - 1) * spec.rotation
        bilinear = v2.InterpolationMode.BILINEAR
        out = torch.stack([
            v2.functional.rotate(image, float(d), bilinear) for image, d in zip(out, degrees, strict=True)
        ])
    if spec.color_jitter:
        out = _jittered(out, spec.color_jitter, draws.uniform(f"view{view}/jitter", 9))
    if spec.grayscale and out.shape[1] == 3:
        gray = torch.from_numpy(draws.uniform(f"view{view}/grayscale", 1)[:, 0] < spec.grayscale)
        out = torch.where(gray[:, None, None, None], v2.functional.rgb_to_grayscale(out, 3), out)
    if spec.blur:
        low, high = BLUR_SIGMA
        sigmas = low + (high - low) * draws.uniform(f"view{view}/blur", 1)[:, 0]
        kernel = [spec.blur, spec.blur]
        out = torch.stack([
            v2.functional.gaussian_blur(image, kernel, [float(s)]) for image, s in zip(out, sigmas, strict=True)
        ])
    return out


def erase(images: Tensor, probability: float, draws: Draws, view: int = 0) -> Tensor:
    """Fill a random rectangle of some images with standard normal noise (Zhong et al. 2017, arXiv:1708.04896).

    Args:
        images: Normalised, (B, C, H, W).
        probability: Share of images that lose a rectangle of 2 to 33 % of their area.
        draws: The batch's draws.
        view: Views of one image differ by this number.

    Returns:
        Like `images`, which are not written to.
    """
    out = images.clone()
    height, width = images.shape[-2:]
    chosen = draws.uniform(f"view{view}/erase", 1)[:, 0] < probability
    boxes = draws.uniform(f"view{view}/erase/box", 4 * ATTEMPTS)
    for i in np.flatnonzero(chosen):
        box = _rectangle(boxes[i], height, width, ERASED_AREA, ERASED_ASPECT)
        if box is None:
            continue
        top, left, rows, columns = box
        noise = Draws(draws.seed, draws.epoch, draws.indices[i : i + 1])
        uniform = torch.from_numpy(noise.uniform(f"view{view}/erase/noise", images.shape[1] * rows * columns)[0])
        filling = torch.special.ndtri(uniform.clamp(min=2.0**-53)).to(images.dtype)
        out[i, :, top : top + rows, left : left + columns] = filling.view(images.shape[1], rows, columns)
    return out


def smooth(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return soft targets: 1 - s + s/K on the label, s/K elsewhere.

    Args:
        labels: Class indices, (B,).
        num_classes: K.
        smoothing: s, the share of the target spread over all classes, in [0, 1).

    Returns:
        Float32, (B, K); rows sum to 1.
    """
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images: Tensor, targets: Tensor, spec: AugmentationSpec, draws: Draws) -> tuple[Tensor, Tensor]:
    """Blend every image with its partner in the reversed batch: mixup or CutMix, one of them a batch.

    Where both are on, each is chosen with probability 0.5. CutMix corrects the share to the pixels really kept.

    Args:
        images: Normalised, (B, C, H, W).
        targets: Soft targets, (B, K).
        spec: Its `mixup` and `cutmix` are the alphas of the Beta(alpha, alpha) the share is drawn from.
        draws: The batch's draws.

    Returns:
        Mixed images and targets, λ of the own and 1 - λ of the partner's.
    """
    if not (spec.mixup or spec.cutmix):
        return images, targets
    generator = draws.of_batch("mix")
    cut = spec.cutmix > 0 and (spec.mixup == 0 or generator.random() < 0.5)
    alpha = spec.cutmix if cut else spec.mixup
    share = float(generator.beta(alpha, alpha))
    partner = images.flip(0)
    if cut:
        height, width = images.shape[-2:]
        side = math.sqrt(1 - share)
        row, column = int(generator.integers(height)), int(generator.integers(width))
        top, bottom = _span(row, int(height * side), height)
        left, right = _span(column, int(width * side), width)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = share * images + (1 - share) * partner
    return mixed, share * targets + (1 - share) * targets.flip(0)


def _padded_crops(images: Tensor, uniform: np.ndarray) -> Tensor:
    """Pad by an eighth with zeros and cut the original size out at random places."""
    size, (height, width) = len(images), images.shape[-2:]
    pad_rows, pad_columns = max(1, height // 8), max(1, width // 8)
    padded = F.pad(images, (pad_columns, pad_columns, pad_rows, pad_rows))
    top = torch.from_numpy((uniform[:, 0] * (2 * pad_rows + 1)).astype(np.int64))
    left = torch.from_numpy((uniform[:, 1] * (2 * pad_columns + 1)).astype(np.int64))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    samples = torch.arange(size)[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[samples, channels, rows, columns]


def _resized_crops(images: Tensor, uniform: np.ndarray) -> Tensor:
    """Cut out a rectangle of random area and aspect, as torchvision's RandomResizedCrop does, and resize it back."""
    height, width = images.shape[-2:]
    crops = []
    for image, row in zip(images, uniform, strict=True):
        box = _rectangle(row, height, width, CROP_AREA, CROP_ASPECT)
        top, left, rows, columns = box or (0, 0, height, width)
        crops.append(v2.functional.resized_crop(image, top, left, rows, columns, [height, width], antialias=True))
    return torch.stack(crops)


def _jittered(images: Tensor, strength: float, uniform: np.ndarray) -> Tensor:
    """Change brightness, contrast, saturation and hue in random order, with probability 0.8."""
    changes = (
        v2.functional.adjust_brightness,
        v2.functional.adjust_contrast,
        v2.functional.adjust_saturation,
        v2.functional.adjust_hue,
    )
    hue = min(strength / 5, 0.5)
    out = []
    for image, row in zip(images, uniform, strict=True):
        if row[0] < JITTER_PROBABILITY:
            factors = [max(0.0, 1 + strength * (2 * u - 1)) for u in row[5:8]] + [hue * (2 * row[8] - 1)]
            for k in np.argsort(row[1:5]):
                image = changes[k](image, factors[k])
        out.append(image)
    return torch.stack(out)


def _rectangle(
    uniform: np.ndarray, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Return top, left, rows and columns of the first rectangle tried that fits, or nothing."""
    for u_area, u_aspect, u_top, u_left in uniform.reshape(ATTEMPTS, 4):
        pixels = height * width * (area[0] + (area[1] - area[0]) * u_area)
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u_aspect)
        rows, columns = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1)), rows, columns
    return None


def _span(centre: int, length: int, limit: int) -> tuple[int, int]:
    """Return first and end of a stretch around a centre, cut off at the borders."""
    return max(0, centre - length // 2), min(limit, centre + length // 2)
