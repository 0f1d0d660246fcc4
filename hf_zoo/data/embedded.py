"""Data sets that need no download: scikit-learn's digits, and the English of CPython's documentation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache, partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zoo.data.documentation_tasks import SPLITS, Task, documents, pairs, sentences, topics

if TYPE_CHECKING:
    import datasets


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


def _documentation(task: Callable[[], Task]) -> dict[str, datasets.Dataset]:
    import datasets

    made = task()
    columns = [name for name in made.rows["train"][0] if name != "label"]
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    if made.labels:
        features["label"] = datasets.ClassLabel(names=list(made.labels))
    return {
        name: datasets.Dataset.from_list(rows, features=datasets.Features(features))
        for name, rows in made.rows.items()
    }


EMBEDDED: dict[str, Callable[[], dict[str, datasets.Dataset]]] = {
    "digits": digits,
    "docs": partial(_documentation, documents),
    "docs-sentences": partial(_documentation, sentences),
    "docs-pairs": partial(_documentation, pairs),
    "docs-topics": partial(_documentation, topics),
}
