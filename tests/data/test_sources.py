"""Where samples come from, which splits they are cut into, and what is said when that fails."""

import json
import os
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_zoo.data.sources import load_splits
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import DataSpec
from tests.conftest import SHARED_DATA

ROWS = {"text": [f"sentence {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}


def dataset(rows=ROWS, classes=("no", "yes")):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(classes))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def folder(tmp_path):
    dataset().to_parquet(tmp_path / "train.parquet")
    dataset().select(range(6)).to_parquet(tmp_path / "dev.parquet")
    return tmp_path


def spec_of(path, **options):
    return DataSpec(path=str(path), **{"test_split": None} | options)


def test_a_folder_of_split_files_keeps_features_and_hides_its_place(folder):
    splits = load_splits(spec_of(folder, validation_split="dev"))
    assert splits.train.to_dict() == ROWS
    assert len(splits.validation) == 6
    assert splits.test is None
    assert splits.description == {
        "path": folder.name,
        "source": "local",
        "name": None,
        "revision": None,
        "num_samples": {"train": 40, "validation": 6},
        "labels": ["no", "yes"],
    }


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl", "tsv", "txt", "disk", "shards"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        dataset().to_parquet(path)
    elif suffix == "csv":
        dataset().to_csv(path)
    elif suffix in ("json", "jsonl"):
        dataset().to_json(path)
    elif suffix == "tsv":
        dataset().to_pandas().to_csv(path, sep="\t", index=False)
    elif suffix == "txt":
        path.write_text("\n".join(ROWS["text"]))
    elif suffix == "disk":
        datasets.DatasetDict(train=dataset()).save_to_disk(path)
    else:
        for part in range(2):
            dataset().shard(2, part, contiguous=True).to_parquet(path / "data" / f"train-0000{part}-of-00002.parquet")
    splits = load_splits(spec_of(path, validation_fraction=0))
    assert splits.train["text"][:] == ROWS["text"]
    assert splits.validation is None
    if suffix != "txt":
        assert splits.train["label"][:] == ROWS["label"]
        expected = ["no", "yes"] if suffix in ("parquet", "disk", "shards") else ["0", "1"]
        assert splits.description["labels"] == expected


def test_an_image_folder_takes_classes_from_its_folders(tmp_path):
    for split in ("train", "test"):
        for name, level in (("bright", 200), ("dark", 20)):
            for number in range(3):
                place = tmp_path / split / name
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), level + number, np.uint8)).save(place / f"{number}.png")
    splits = load_splits(DataSpec(path=str(tmp_path), validation_fraction=0))
    assert splits.description["labels"] == ["bright", "dark"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 6}
    for sample in splits.test:
        assert (np.asarray(sample["image"]).mean() > 100) == (sample["label"] == 0)


def test_validation_is_carved_off_stratified_and_by_the_split_seed(folder):
    rows = {"text": [f"s{i}" for i in range(100)], "label": [int(i < 20) for i in range(100)]}
    dataset(rows).to_parquet(folder / "train.parquet")
    one = load_splits(spec_of(folder, validation_fraction=0.2))
    assert len(one.validation) == 20
    assert Counter(one.validation["label"]) == {0: 16, 1: 4}
    assert sorted(one.train["text"][:] + one.validation["text"][:]) == sorted(rows["text"])
    assert load_splits(spec_of(folder, validation_fraction=0.2)).validation["text"][:] == one.validation["text"][:]
    other = load_splits(spec_of(folder, validation_fraction=0.2, split_seed=7))
    assert other.validation["text"][:] != one.validation["text"][:]


def test_fewer_samples_are_a_seeded_choice_in_their_order(folder):
    one = load_splits(spec_of(folder, validation_split="dev", num_train=10, num_eval=3))
    assert len(one.train) == 10
    assert len(one.validation) == 3
    numbers = [int(text.split()[1]) for text in one.train["text"]]
    assert numbers == sorted(numbers)
    assert numbers != list(range(10))
    other = load_splits(spec_of(folder, validation_split="dev", num_train=10, split_seed=1))
    assert other.train["text"][:] != one.train["text"][:]
    assert len(load_splits(spec_of(folder, num_train=1000, validation_fraction=0)).train) == 40


def test_embedded_sets_carry_their_digest():
    splits = load_splits(DataSpec(path="digits", validation_split="validation"))
    assert splits.description["source"] == "embedded"
    assert splits.description["path"] == "digits"
    assert len(splits.description["sha256"]) == 64
    assert splits.description["num_samples"] == {"train": 1259, "validation": 179, "test": 359}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "test"}, r"no split 'test' \(data\.test_split\).*it has dev, train; .*or null for none"),
        ({"train_split": "trian"}, r"no split 'trian' \(data\.train_split\) \(did you mean 'train'\?\)"),
        ({"validation_split": "train"}, "the split that is trained on"),
        ({"validation_fraction": 1.0}, r"validation_fraction lies in \[0, 1\)"),
        ({"validation_fraction": 1e-6}, "leaves nothing to train on or to validate with"),
        ({"num_train": 0}, "data.num_train must be at least 1"),
        ({"name": "sst2"}, "local data has no data.name"),
        ({"label": "lable"}, "no column 'lable'"),
    ],
)
def test_what_a_folder_cannot_give_is_named(folder, options, message):
    with pytest.raises(DataError, match=message):
        load_splits(spec_of(folder, **options))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./no/such/folder", "no such file or folder"),
        ("mine.parquet", "no such file or folder"),
        ("not an id", "no such file or folder"),
    ],
)
def test_a_path_that_is_not_there_is_named_without_asking_a_hub(path, message):
    with pytest.raises(DataError, match=message):
        load_splits(DataSpec(path=path))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read"):
        load_splits(spec_of(tmp_path))
    (tmp_path / "train.parquet").rename(tmp_path / "train.xyz")
    with pytest.raises(DataError, match="nothing to read: a data folder holds SPLIT.parquet"):
        load_splits(spec_of(tmp_path))
    with pytest.raises(DataError, match=r"reads \.parquet.*not \.xyz"):
        load_splits(spec_of(tmp_path / "train.xyz"))


def test_mixed_kinds_and_empty_splits_are_refused(folder):
    (folder / "extra.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"files of one kind are needed, and it holds \.csv, \.parquet"):
        load_splits(spec_of(folder))
    (folder / "extra.csv").unlink()
    empty = dataset({"text": [], "label": []})
    datasets.DatasetDict(train=dataset(), dev=empty).save_to_disk(folder / "saved")
    with pytest.raises(DataError, match="saved: cannot be read"):
        load_splits(spec_of(folder / "saved", validation_split="dev"))
    empty.to_parquet(folder / "dev.parquet")
    with pytest.raises(DataError, match="cannot be read: .*dev.* no data"):
        load_splits(spec_of(folder, validation_split="dev"))


PROGRAM = """
import json, sys
from hf_zoo.data.sources import load_splits
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import DataSpec
answers = []
for options in json.loads(sys.argv[1]):
    try:
        splits = load_splits(DataSpec(**options))
        answers.append([splits.description, splits.train["text"][:]])
    except DataError as error:
        answers.append([str(error), None])
print(json.dumps(answers))
"""


def ask(environment, *specs):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(specs)], capture_output=True, text=True, env=kept | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_that_is_away_is_said(tmp_path):
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    ((message, _),) = ask(environment, {"path": "org/set"})
    assert message.startswith("org/set: no such file or folder, and it cannot be loaded from http://127.0.0.1:9")
    ((message, _),) = ask(environment | {"HF_HUB_OFFLINE": "1"}, {"path": "org/set"})
    assert "the Hub is switched off (HF_HUB_OFFLINE)" in message


def test_a_hub_dataset_is_read_and_what_is_missing_there_is_named(tmp_path):
    from huggingface_hub import HfApi

    from hf_zoo.hub.local import FolderHub

    with FolderHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo("org/set", repo_type="dataset")
        content = "\n".join(json.dumps({"text": text}) for text in ROWS["text"]).encode()
        api.upload_file(path_or_fileobj=content, path_in_repo="train.jsonl", repo_id="org/set", repo_type="dataset")
        found, no_repo, no_revision, no_split = ask(
            {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"},
            {"path": "org/set", "test_split": None, "validation_fraction": 0},
            {"path": "org/other"},
            {"path": "org/set", "revision": "v7"},
            {"path": "org/set"},
        )
    assert found[0] == {
        "path": "org/set",
        "source": "hub",
        "name": None,
        "revision": None,
        "num_samples": {"train": 40},
        "labels": [],
    }
    assert found[1] == ROWS["text"]
    assert "no such dataset on" in no_repo[0]
    assert "no such revision (data.revision)" in no_revision[0]
    assert "no split 'test'" in no_split[0]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not on this machine")
def test_a_real_set_is_read_as_it_is():
    splits = load_splits(DataSpec(path=str(SHARED_DATA / "glue_sst2"), validation_split="validation"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 67349, "validation": 872, "test": 1821}
    assert splits.description["labels"] == ["negative", "positive"]
    assert splits.description["path"] == "glue_sst2"
