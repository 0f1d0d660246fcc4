"""The sentiment sets of the merging benchmark, cut to size: one folder of splits a task, under one label space.

Rotten Tomatoes is taken and SST-2 is not: they are the same sentences. Texts of any test or validation split are taken
out of every training split, whatever set they stand in.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np

LABELS = ["neg", "pos"]
SETS = {
    "imdb": ("imdb",),
    "yelp": ("yelp_sentences",),
    "rotten_tomatoes": ("rotten_tomatoes",),
    "media": ("amazon_books", "amazon_dvd"),
    "goods": ("amazon_electronics", "amazon_kitchen"),
}
NUM_TRAIN = {"imdb": 8000, "yelp": 2000, "rotten_tomatoes": 2000, "media": 2000, "goods": 2000}
NUM_VALIDATION, NUM_TEST = 400, 1000
SEED = 20261120


def prepare(source: Path, target: Path) -> None:
    """Write `TARGET/TASK/{train,validation,test}.parquet` for every task, and those of `joint`; done once.

    Args:
        source: Folder with a folder a set, each holding `train.parquet` and `test.parquet`.
        target: Folder to write.
    """
    if (target / "joint" / "validation.parquet").is_file():
        return
    generator = np.random.default_rng(SEED)
    parts = {task: _cut(source, names, generator) for task, names in SETS.items()}
    held_out = {_folded(text) for part in parts.values() for split in part[1:] for text in split["text"]}
    trains = {}
    for task, (train, validation, test) in parts.items():
        unseen = train.filter(lambda row: _folded(row["text"]) not in held_out)
        trains[task] = unseen.select(range(min(NUM_TRAIN[task], len(unseen))))
        for split, rows in (("train", trains[task]), ("validation", validation), ("test", test)):
            _write(rows, target / task / f"{split}.parquet")
    tasks = [task for task in SETS if task != "imdb"]
    _write(datasets.concatenate_datasets([trains[task] for task in tasks]), target / "joint" / "train.parquet")
    validations = datasets.concatenate_datasets([parts[task][1] for task in tasks])
    _write(validations, target / "joint" / "validation.parquet")


def _cut(
    source: Path, names: tuple[str, ...], generator: np.random.Generator
) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """Return a task's training, validation and test samples, shuffled."""
    train, test = (
        _shuffled(
            datasets.concatenate_datasets([_read(source / name / f"{split}.parquet") for name in names]), generator
        )
        for split in ("train", "test")
    )
    validation = train.select(range(NUM_VALIDATION))
    return train.select(range(NUM_VALIDATION, len(train))), validation, test.select(range(min(NUM_TEST, len(test))))


def _read(path: Path) -> datasets.Dataset:
    rows = datasets.Dataset.from_parquet(str(path)).select_columns(["text", "label"])
    assert rows.features["label"].names == LABELS, f"{path}: labels {rows.features['label']}"
    return rows


def _shuffled(rows: datasets.Dataset, generator: np.random.Generator) -> datasets.Dataset:
    return rows.select(generator.permutation(len(rows)))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _write(rows: datasets.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))
