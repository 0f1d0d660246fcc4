"""The data of the eight tasks: class-disjoint parts of CIFAR-10 and MNIST, of one size, as 32-pixel RGB images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL.Image import Image

GROUPS = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))  # classes of the four tasks of either set
SETS = {"cifar": "cifar10", "mnist": "mnist"}
PARENT_A_CLASS = {"cifar": 450, "mnist": 150}
PARENT_VALIDATION_A_CLASS = 25
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 1500, 200, 400  # a task
SIDE = 32
SPLIT_SEED = 20


@dataclass(frozen=True)
class Pool:
    """Images of one set, classes apart and in random order: what is taken is not taken again."""

    images: datasets.Dataset
    left: dict[int, list[int]]

    @classmethod
    def open(cls, file: Path, generator: np.random.Generator) -> Pool:
        """Read a split."""
        images = datasets.load_dataset("parquet", data_files={"train": str(file)})["train"]
        labels = np.asarray(images["label"])
        return cls(
            images, {int(c): list(generator.permutation(np.flatnonzero(labels == c))) for c in sorted(set(labels))}
        )

    @property
    def names(self) -> list[str]:
        """The set's classes."""
        return self.images.features["label"].names

    def take(self, classes: Sequence[int], count: int) -> list[tuple[Image, str]]:
        """Take `count` images in all with the names of their classes, classes as even as can be."""
        shares = [count // len(classes) + (place < count % len(classes)) for place in range(len(classes))]
        taken = [(c, self.left[c].pop()) for c, share in zip(classes, shares, strict=True) for _ in range(share)]
        rows = self.images.select([int(index) for _, index in taken])
        pairs = zip(rows, taken, strict=True)
        return [(row["image"].convert("RGB").resize((SIDE, SIDE)), self.names[c]) for row, (c, _) in pairs]


def task_names() -> list[str]:
    """Return the eight tasks."""
    return [f"{kind}-{place}" for kind in SETS for place in range(1, len(GROUPS) + 1)]


def write_subsets(source: Path, folder: Path) -> dict[str, list[str]]:
    """Write `FOLDER/TASK/SPLIT.parquet` for the eight tasks, `parent` and `joint`, where they are not there yet.

    No image of the parent is among the members'; `joint` has the training and validation images of all tasks.

    Args:
        source: Holds `cifar10` and `mnist`, each with `train.parquet` and `test.parquet`.
        folder: Where to write.

    Returns:
        Task -> names of its classes.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    pools = {
        (kind, split): Pool.open(source / name / f"{split}.parquet", generator)
        for kind, name in SETS.items()
        for split in ("train", "test")
    }
    every = [name for kind in SETS for name in pools[kind, "train"].names]
    classes = {
        f"{kind}-{place}": [pools[kind, "train"].names[c] for c in group]
        for kind in SETS
        for place, group in enumerate(GROUPS, start=1)
    }
    if (folder / "joint" / "validation.parquet").is_file():  # written last
        return classes
    whole = range(len(every) // len(SETS))
    parts = {split: [] for split in ("train", "validation")}
    for kind, count in PARENT_A_CLASS.items():
        parts["train"] += pools[kind, "train"].take(whole, count * len(whole))
        parts["validation"] += pools[kind, "train"].take(whole, PARENT_VALIDATION_A_CLASS * len(whole))
    for split, part in parts.items():
        _write(folder / "parent" / f"{split}.parquet", part, every)
    joint = {split: [] for split in ("train", "validation")}
    for kind in SETS:
        for place, group in enumerate(GROUPS, start=1):
            task = f"{kind}-{place}"
            taken = {
                "train": pools[kind, "train"].take(group, NUM_TRAIN),
                "validation": pools[kind, "train"].take(group, NUM_VALIDATION),
                "test": pools[kind, "test"].take(group, NUM_TEST),
            }
            for split, part in taken.items():
                _write(folder / task / f"{split}.parquet", part, classes[task])
                if split in joint:
                    joint[split] += part
    for split, part in joint.items():
        _write(folder / "joint" / f"{split}.parquet", part, every)
    return classes


def _write(file: Path, part: Sequence[tuple[Image, str]], names: list[str]) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    content = {"image": [image for image, _ in part], "label": [names.index(label) for _, label in part]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(file))
