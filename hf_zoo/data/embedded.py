"""Data sets that need no download: scikit-learn's digits, and the English of CPython's documentation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zoo.data.documentation import read_documentation

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # of the text, for each of validation and test
LARGEST_HELD_OUT = 0.02  # of the text; larger packages are always trained on, or they would be a whole split


def is_embedded(path: str) -> bool:
    """Return whether a data path names an embedded set."""
    return path in EMBEDDED


def load_embedded(path: str) -> tuple[dict[str, datasets.Dataset], str]:
    """Return an embedded set's splits `train`, `validation` and `test`, and the SHA-256 of all their samples.

    Args:
        path: Name of the set, a key of `EMBEDDED`.

    Raises:
        DataError: If what it is made from is not there.
    """
    splits, digest = _load(path)
    return dict(splits), digest


@lru_cache(maxsize=4)
def _load(path: str) -> tuple[dict[str, datasets.Dataset], str]:
    splits = EMBEDDED[path]()
    digest = hashlib.sha256()
    for name in SPLITS:
        for batch in splits[name].with_format(None).data.to_batches():
            digest.update(json.dumps([name, batch.to_pydict()], sort_keys=True, default=bytes.hex).encode())
    return splits, digest.hexdigest()


def digits() -> dict[str, datasets.Dataset]:
    """Make `digits`: 1,797 handwritten digits of 8 by 8 gray pixels, 10 classes, from scikit-learn.

    Alpaydin & Kaynak (1998), UCI Optical Recognition of Handwritten Digits. The 17 levels of ink are spread over 0 to
    255. Of every class a tenth is `validation` and a fifth is `test`, chosen once and for all.
    """
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    generator = np.random.Generator(np.random.Philox(key=0))
    place = np.empty(len(labels), np.int64)
    for label in range(10):
        rows = generator.permutation(np.flatnonzero(labels == label))
        num_test, num_validation = round(len(rows) * 0.2), round(len(rows) * 0.1)
        place[rows] = 0
        place[rows[:num_test]] = 2
        place[rows[num_test : num_test + num_validation]] = 1
    features = datasets.Features({
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
    })
    splits = {}
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(place == number)
        images = []
        for row in rows:
            buffer = BytesIO()
            Image.fromarray(pixels[row]).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        splits[name] = datasets.Dataset.from_dict({"image": images, "label": labels[rows]}, features=features)
    return splits


def docs() -> dict[str, datasets.Dataset]:
    """Make `docs`: about 1 MB of English prose, for masked language modelling.

    A sample is one document, a module's docstrings or a topic of the language reference, in column `text`; `source`
    names it. Splits share no package and no sentence.
    """
    documents: dict[str, list[str]] = {}
    for passage in read_documentation():
        text = "\n".join(" ".join(paragraph) for paragraph in passage.paragraphs)
        documents.setdefault(passage.document, []).append(text)
    rows = [{"text": "\n".join(texts), "source": document} for document, texts in documents.items()]
    return _split(rows)


def _split(rows: Iterable[dict[str, Any]], names: tuple[str, ...] = ()) -> dict[str, datasets.Dataset]:
    """Deal rows to splits by the package of their `source`; `names` are those of their integer `label`s."""
    import datasets

    split_of = _split_packages()
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in rows:
        parts[split_of["/".join(row["source"].split("/")[:2])]].append(row)
    columns = [name for name in parts["train"][0] if name != "label"]
    features = {name: datasets.Value("string") for name in columns}
    if names:
        features["label"] = datasets.ClassLabel(names=list(names))
    return {
        name: datasets.Dataset.from_list(part, features=datasets.Features(features)) for name, part in parts.items()
    }


@lru_cache(maxsize=1)
def _split_packages() -> dict[str, str]:
    """Return the split of every package and topic: small ones in the order of a hash, until a split has its share."""
    sizes: dict[str, int] = {}
    for passage in read_documentation():
        sizes[passage.package] = sizes.get(passage.package, 0) + sum(map(len, passage.sentences))
    total = sum(sizes.values())
    split_of = {}
    share = dict.fromkeys(("test", "validation"), 0.0)
    for package in sorted(sizes, key=lambda package: hashlib.sha256(package.encode()).digest()):
        part = sizes[package] / total
        split = next((name for name in share if share[name] < HELD_OUT), "train")
        if part > LARGEST_HELD_OUT:
            split = "train"
        if split in share:
            share[split] += part
        split_of[package] = split
    return split_of


EMBEDDED: dict[str, Callable[[], dict[str, datasets.Dataset]]] = {"digits": digits, "docs": docs}
