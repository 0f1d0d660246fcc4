"""Where a recipe's samples come from: embedded sets, files and folders, or a Hub; cut into their splits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zoo.data.columns import find_label, is_label_type
from hf_zoo.data.embedded import EMBEDDED, is_embedded, load_embedded
from hf_zoo.errors import DataError, nearest
from hf_zoo.recipe.schema import DataSpec

if TYPE_CHECKING:
    import datasets

BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Splits:
    """A recipe's samples.

    Attributes:
        train: Samples to train on.
        validation: Samples for every choice; null when the recipe holds none out.
        test: Samples reported at the end; null when the recipe has none.
        description: For the manifest: `path` (of local data only its own name), `source` (`embedded`, `local` or
            `hub`), `name`, `revision`, `labels`, `num_samples` a split, and `sha256` of an embedded set.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    description: dict[str, Any]

    def items(self) -> list[tuple[str, datasets.Dataset]]:
        """Return the splits there are, by name."""
        named = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, split) for name, split in named if split is not None]


def load_splits(spec: DataSpec) -> Splits:
    """Load a recipe's data.

    An embedded name is that set; anything that exists on disk is read from there; the rest is a Hub dataset id.
    Without a validation split a share of the training split is held out, stratified by the label where there is one.
    At most `num_train` and `num_eval` samples are kept of each split. All choices follow `split_seed`.

    Raises:
        DataError: If there is no such data, or it lacks a split or samples.
    """
    _check_spec(spec)
    found, description = _load(spec)
    source = spec.path
    train = _named(found, spec.train_split, "data.train_split", source)
    validation = _named(found, spec.validation_split, "data.validation_split", source)
    test = _named(found, spec.test_split, "data.test_split", source)
    assert train is not None, "_check_spec requires a training split"
    label = find_label(train, spec)
    if validation is None and spec.validation_fraction:
        train, validation = _hold_out(train, label, spec)
    train = _choose(train, spec.num_train, spec.split_seed, "train")
    validation = validation and _choose(validation, spec.num_eval, spec.split_seed, "validation")
    test = test and _choose(test, spec.num_eval, spec.split_seed, "test")
    splits = Splits(train, validation, test, description)
    description["num_samples"] = {name: len(split) for name, split in splits.items()}
    description["labels"] = _describe_labels(train, label)
    return splits


def _check_spec(spec: DataSpec) -> None:
    wrong = []
    if not spec.train_split:
        wrong.append("data.train_split must name a split")
    if not 0 <= spec.validation_fraction < 1:
        wrong.append(f"data.validation_fraction lies in [0, 1), got {spec.validation_fraction}")
    for name in ("num_train", "num_eval", "image_size", "max_length"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            wrong.append(f"data.{name} must be at least 1, got {value}")
    for name in ("validation_split", "test_split"):
        if getattr(spec, name) == spec.train_split:
            wrong.append(f"data.{name} is {spec.train_split!r}, the split that is trained on")
    if wrong:
        raise DataError("; ".join(wrong))


def _load(spec: DataSpec) -> tuple[Mapping[str, datasets.Dataset], dict[str, Any]]:
    """Return every split found, and the beginning of the description."""
    description: dict[str, Any] = {"path": spec.path, "name": spec.name, "revision": spec.revision}
    if is_embedded(spec.path):
        if spec.name or spec.revision:
            raise DataError(f"{spec.path} is an embedded set: it has no data.name and no data.revision")
        splits, digest = load_embedded(spec.path)
        return splits, description | {"source": "embedded", "sha256": digest}
    path = Path(spec.path).expanduser()
    if path.exists():
        return _read_local(path, spec), description | {"source": "local", "path": path.resolve().name}
    if path.suffix in BUILDERS or spec.path.startswith((".", "/", "~")) or not _HUB_ID.match(spec.path):
        raise DataError(f"{spec.path}: no such file or folder{nearest(spec.path, list(EMBEDDED))}")
    return _load_hub(spec), description | {"source": "hub"}


def _read_local(path: Path, spec: DataSpec) -> Mapping[str, datasets.Dataset]:
    import datasets

    if spec.name or spec.revision:
        raise DataError(f"{path} is on disk: local data has no data.name and no data.revision")
    if path.is_file() and path.suffix not in BUILDERS:
        raise DataError(
            f"{path}: hf_zoo reads {', '.join(BUILDERS)} files, not {path.suffix or 'files without suffix'}"
        )
    files = {spec.train_split: [path]} if path.is_file() else _split_files(path)
    if (path / "dataset_dict.json").is_file():
        return _reading(path, lambda: datasets.load_from_disk(str(path)))
    if (path / "state.json").is_file():
        return {spec.train_split: _reading(path, lambda: datasets.load_from_disk(str(path)))}
    if files:
        suffixes = sorted({file.suffix for several in files.values() for file in several})
        builders = {BUILDERS[suffix] for suffix in suffixes}
        if len(builders) > 1:
            raise DataError(f"{path}: files of one kind are needed, and it holds {', '.join(suffixes)}")
        builder = builders.pop()
        options = {"sep": "\t"} if suffixes == [".tsv"] else {}
        named = {spec.train_split, spec.validation_split, spec.test_split} - {None}
        unread = files.keys() - named if named <= files.keys() else set()  # where one is missing, say what there is
        data_files = {name: [str(file) for file in several] for name, several in files.items() if name not in unread}
        return _reading(path, lambda: datasets.load_dataset(builder, data_files=data_files, **options))
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        return _reading(path, lambda: datasets.load_dataset("imagefolder", data_dir=str(path)))
    raise DataError(
        f"{path}: nothing to read: a data folder holds SPLIT.parquet (or {', '.join(list(BUILDERS)[1:])}) files, "
        "or images in a folder a class"
    )


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return split -> files of a folder with `SPLIT.parquet` or `SPLIT-00000-of-00002.parquet`, also under `data/`."""
    files: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*")) if place.is_dir() else ():
            if file.suffix in BUILDERS and file.is_file() and not file.name.startswith((".", "dataset_info")):
                files.setdefault(_SHARD.sub("", file.stem), []).append(file)
        if files:
            break
    return files


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """Run a reader of local files and say whose fault it is when it fails."""
    import datasets
    import pyarrow as pa

    try:
        return read()
    except (
        datasets.exceptions.DatasetsError,
        pa.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read: {cause}") from error


def _load_hub(spec: DataSpec) -> Mapping[str, datasets.Dataset]:
    """Load a Hub dataset, saying at once when it cannot be had instead of retrying for half a minute."""
    import datasets
    import httpx2 as httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where = spec.path + (f"@{spec.revision}" if spec.revision else "")
    offline = constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
    try:
        if not offline:
            HfApi().dataset_info(spec.path, revision=spec.revision, timeout=_PROBE_SECONDS)
        loaded = datasets.load_dataset(spec.path, spec.name, revision=spec.revision)
    except GatedRepoError as error:
        raise DataError(f"{where}: access is granted on {constants.ENDPOINT}/datasets/{spec.path} first") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{where}: the dataset has no such revision (data.revision)") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{where}: no such file or folder, and no such dataset on {constants.ENDPOINT}"
            f"{nearest(spec.path, list(EMBEDDED))}: if it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = "the Hub is switched off (HF_HUB_OFFLINE) and it is not in the cache" if offline else str(error)
        raise DataError(
            f"{where}: no such file or folder, and it cannot be loaded from {constants.ENDPOINT}"
            f"{nearest(spec.path, list(EMBEDDED))}: {reason}. "
            f"Local files and the embedded sets ({', '.join(EMBEDDED)}) need no network"
            + ("" if offline else "; HF_HUB_OFFLINE=1 takes a copy loaded before")
        ) from error
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: {error}") from error
    return loaded


def _named(found: Mapping[str, datasets.Dataset], name: str | None, key: str, source: str) -> datasets.Dataset | None:
    if name is None:
        return None
    if name not in found:
        optional = "" if key == "data.train_split" else " or null for none"
        raise DataError(
            f"{source}: no split {name!r} ({key}){nearest(name, list(found))}: it has {', '.join(found)}; name one of "
            f"these{optional}"
        )
    if not len(found[name]):
        raise DataError(f"{source}: split {name!r} ({key}) is empty")
    return found[name]


def _hold_out(
    dataset: datasets.Dataset, label: str | None, spec: DataSpec
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold a share out, of every class alike where there is a label."""
    groups: np.ndarray = np.zeros(len(dataset), np.int64)
    if label is not None:
        values = [str(value) for value in dataset.with_format(None)[label][:]]
        groups = np.unique(values, return_inverse=True)[1]
    generator = _generator(spec.split_seed, "hold out")
    order = generator.permutation(len(dataset))
    # Taking every 1/fraction-th of the samples sorted by class gives each class its share up to one sample.
    order = order[np.argsort(groups[order], kind="stable")]
    ticks = np.floor(np.arange(1, len(order) + 1) * spec.validation_fraction + generator.random())
    held = np.diff(ticks, prepend=0) > 0
    if held.all() or not held.any():
        raise DataError(
            f"{spec.path}: data.validation_fraction={spec.validation_fraction} of {len(dataset)} samples leaves "
            "nothing to train on or to validate with: name data.validation_split or change it"
        )
    return dataset.select(np.sort(order[~held])), dataset.select(np.sort(order[held]))


def _choose(dataset: datasets.Dataset, count: int | None, seed: int, split: str) -> datasets.Dataset:
    """Keep at most `count` samples, in their order."""
    if count is None or count >= len(dataset):
        return dataset
    return dataset.select(np.sort(_generator(seed, split).permutation(len(dataset))[:count]))


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator of its own for each seed and purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


def _describe_labels(dataset: datasets.Dataset, column: str | None) -> list[str]:
    """Return the names of the classes where the set has some."""
    import datasets

    if column is None:
        return []
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if not is_label_type(feature):
        return []
    return [str(value) for value in sorted(value for value in dataset.unique(column) if value is not None)]
