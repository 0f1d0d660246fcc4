"""Images: decoded once into one array, changed at random and normalised batch by batch."""

# N = images of a table, B = images of a batch, C = channels, H = W = pixels, K = classes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from hf_zoo.data.augmentation import augment, check_augmentation, erase, mix, smooth
from hf_zoo.data.draws import Draws
from hf_zoo.data.table import EpochTable
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import AugmentationSpec

if TYPE_CHECKING:
    import datasets
    from transformers import BaseImageProcessor

_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B")


class ImageTable(EpochTable):
    """Decoded images in memory.

    Attributes:
        images: Uint8, (N, C, H, W).
        labels: Class indices, int64 (N,); null for images without labels.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"images are uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{len(labels)} labels for {len(images)} images")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "epoch": self.epoch}

    @property
    def num_channels(self) -> int:
        """Channels of every image."""
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image in pixels."""
        return self.images.shape[2], self.images.shape[3]


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from and divided into pixels in [0, 1], one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageCollator:
    """Make a batch of a table's images.

    Every draw depends on the seed, the epoch and the image alone, those of mixup and CutMix on all images of the
    batch. Outside training images are normalised and nothing else; contrastive views are drawn there as well, as if
    it were always epoch 0.
    """

    def __init__(
        self,
        table: ImageTable,
        augmentation: AugmentationSpec,
        normalisation: Normalisation,
        num_classes: int,
        seed: int,
        train: bool,
        views: int = 1,
    ) -> None:
        """Keep what a batch needs.

        Args:
            table: The images the samples refer to.
            augmentation: Random changes; without effect outside training, except on contrastive views.
            normalisation: What pixels are normalised with.
            num_classes: K, for soft targets.
            seed: Seed of every draw.
            train: Whether the batches are trained on.
            views: 1, or 2 differently changed copies of every image for contrastive learning.

        Raises:
            DataError: If the augmentation is impossible or the normalisation has another number of channels.
        """
        check_augmentation(augmentation)
        if len(normalisation.mean) != table.num_channels or len(normalisation.std) != table.num_channels:
            raise DataError(
                f"the images have {table.num_channels} channel(s), but mean {normalisation.mean} and "
                f"std {normalisation.std} are for {len(normalisation.mean)}"
            )
        if views not in (1, 2):
            raise DataError(f"an image has 1 or 2 views, got {views}")
        self.table = table
        self.augmentation = augmentation
        self.num_classes = num_classes
        self.seed = seed
        self.train = train
        self.views = views
        self._mean = torch.tensor(normalisation.mean)[:, None, None]
        self._std = torch.tensor(normalisation.std)[:, None, None]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch.

        Args:
            samples: What the table returned for each image.

        Returns:
            `pixel_values`, float32 (B, C, H, W), with `labels`, int64 (B,) or soft targets (B, K) under mixup, CutMix
            or label smoothing. With two views `pixel_values` is (2B, C, H, W), the first views before the second, and
            there are no labels.
        """
        indices = np.fromiter((sample["index"] for sample in samples), np.int64, len(samples))
        draws = Draws(self.seed, samples[0]["epoch"] if self.train else 0, indices)
        images = self.table.images[torch.from_numpy(indices)]
        if self.views == 2:
            return {"pixel_values": torch.cat([self._view(images, draws, view) for view in range(2)])}
        if not self.train:
            batch = {"pixel_values": self._normalise(images)}
            return batch if self.table.labels is None else batch | {"labels": self.table.labels[indices]}
        pixels = self._view(images, draws, 0)
        if self.table.labels is None:
            return {"pixel_values": pixels}
        labels = self.table.labels[indices]
        spec = self.augmentation
        if spec.mixup or spec.cutmix or spec.label_smoothing:
            pixels, labels = mix(pixels, smooth(labels, self.num_classes, spec.label_smoothing), spec, draws)
        return {"pixel_values": pixels, "labels": labels}

    def _view(self, images: Tensor, draws: Draws, view: int) -> Tensor:
        pixels = self._normalise(augment(images, self.augmentation, draws, view))
        probability = self.augmentation.random_erasing
        return erase(pixels, probability, draws, view) if probability else pixels

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self._mean).div_(self._std)


def decode_images(
    dataset: datasets.Dataset, column: str, source: str, image_size: int | None = None, num_channels: int | None = None
) -> Tensor:
    """Decode a column of images into one array.

    Args:
        dataset: The samples, at least one.
        column: Column of `datasets.Image`.
        source: Whose they are, for errors.
        image_size: Height and width in pixels to bring them to (bilinear, antialiased); null keeps theirs.
        num_channels: 1 or 3; null takes 1 if every image is gray, else 3.

    Returns:
        Uint8, (N, C, H, W).

    Raises:
        DataError: If an image cannot be decoded, or sizes differ and there is no `image_size`.
    """
    if num_channels is None:
        gray = all(image.mode in _GRAY_MODES for image in _opened(dataset, column, source, load=False))
        num_channels = 1 if gray else 3
    images: Tensor | None = None
    for row, image in enumerate(_opened(dataset, column, source, load=True)):
        array = _pixels(image, num_channels, f"{source}: row {row} of column {column!r}")
        if image_size is not None and array.shape[-2:] != (image_size, image_size):
            array = v2.functional.resize(array, [image_size, image_size], antialias=True)
        if images is None:
            images = torch.empty((len(dataset), *array.shape), dtype=torch.uint8)
        if array.shape != images.shape[1:]:
            raise DataError(
                f"{source}: images of column {column!r} differ in size: row 0 is {_spell(images[0])} pixels, "
                f"row {row} is {_spell(array)}: set data.image_size to bring them to one size"
            )
        images[row] = array
    assert images is not None, "load_splits refuses empty splits"
    return images


def measure_normalisation(table: ImageTable, source: str) -> Normalisation:
    """Measure mean and standard deviation of each channel over all pixels of a table, rounded to 6 digits.

    Counted from a histogram, so the sums are exact whatever the size of the table.

    Args:
        table: The training images.
        source: Whose they are, for the error.

    Raises:
        DataError: If a channel is constant, so that nothing can be divided by its deviation.
    """
    values = np.arange(256, dtype=np.float64) / 255
    mean, std = [], []
    for channel in range(table.num_channels):
        counts = np.zeros(256, np.int64)
        for chunk in table.images[:, channel].split(4096):
            counts += np.bincount(chunk.numpy().ravel(), minlength=256)
        share = counts / counts.sum()
        centre = float(share @ values)
        deviation = float(np.sqrt(share @ (values - centre) ** 2))
        if deviation == 0:
            raise DataError(f"{source}: channel {channel} has the same value in every pixel of every training image")
        mean.append(round(centre, 6))
        std.append(round(deviation, 6))
    return Normalisation(tuple(mean), tuple(std))


def make_image_processor(size: tuple[int, int], normalisation: Normalisation) -> BaseImageProcessor:
    """Make the processor that ships with a member: it turns a picture into what the member was trained on.

    Args:
        size: Height and width in pixels.
        normalisation: What pixels are normalised with.
    """
    from transformers import ViTImageProcessor

    return ViTImageProcessor(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=2,  # bilinear, as in `decode_images`
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(normalisation.mean),
        image_std=list(normalisation.std),
        do_convert_rgb=True if len(normalisation.mean) == 3 else None,
    )


def read_image_processor(processor: BaseImageProcessor) -> tuple[Normalisation, int]:
    """Return what a processor normalises with, and the size it brings images to.

    Raises:
        DataError: If it does not say, or brings images to a size that is not square.
    """
    name = type(processor).__name__
    if (timm := getattr(processor, "data_config", None)) is not None:
        mean, std, (height, width) = timm["mean"], timm["std"], timm["input_size"][-2:]
    else:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
        height = size.get("height") or size.get("shortest_edge")
        width = size.get("width") or size.get("shortest_edge")
    if not mean or not std or not height or height != width:
        raise DataError(
            f"{name} brings images to {height} by {width} with mean {mean} and std {std}: hf_zoo needs a "
            "square size, a mean and a std: set data.image_size and use a model without this processor"
        )
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std))), int(height)


def _opened(dataset: datasets.Dataset, column: str, source: str, load: bool) -> Iterator[Any]:
    """Yield every image, its header read or its pixels too, naming the row that cannot be."""
    import datasets
    from PIL import Image, UnidentifiedImageError

    stored = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for row, sample in enumerate(stored):
        cell = sample[column]
        try:
            if cell is None:
                raise ValueError("it is empty")
            with Image.open(BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]) as image:
                if load:
                    image.load()
                yield image
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            name = f" ({cell['path']})" if cell and cell.get("path") else ""
            raise DataError(
                f"{source}: the image in row {row} of column {column!r}{name} cannot be decoded: {error}"
            ) from error


def _pixels(image: Any, num_channels: int, source: str) -> Tensor:
    """Return an opened image as uint8 (C, H, W)."""
    if image.mode in ("I", "F", "I;16", "I;16B"):
        raise DataError(f"{source} has mode {image.mode}: hf_zoo reads images of 8 bits a channel")
    converted = image.convert("L" if num_channels == 1 else "RGB")
    array = torch.from_numpy(np.array(converted, dtype=np.uint8))
    return array[None] if num_channels == 1 else array.permute(2, 0, 1)


def _spell(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
