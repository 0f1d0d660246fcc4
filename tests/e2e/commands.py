"""Recipes of a few seconds, verbs as a person runs them, and a way to see what they left on the disk."""

import hashlib
import os
import sys
from importlib import import_module
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {
    "name": "zoo-vit",
    "objective": "image_classification",
    "data": {"path": "digits", "num_train": 64, "num_eval": 16},
    "model": {"type": "vit", "config": {**SMALL, "patch_size": 4}},
    "training": {"epochs": 1, "batch_size": 16, "evaluate_train": False},
}
BERT = {
    "name": "zoo-bert",
    "objective": "masked_lm",
    "data": {"path": "docs", "num_train": 16, "num_eval": 8, "max_length": 32},
    "tokenizer": {"vocab_size": 300},
    "model": {"type": "bert", "config": SMALL},
    "training": {"epochs": 1, "batch_size": 16, "evaluate_train": False},
}
SST = {
    "name": "zoo-sst",
    "objective": "sequence_classification",
    "task": "sst",
    "parent": "runs/zoo-bert/zoo-bert-000",
    "data": {"path": "docs-sentences", "num_train": 32, "num_eval": 16, "max_length": 32},
    "training": {"epochs": 1, "batch_size": 16, "evaluate_train": False},
}
MERGE = {"population": "runs/zoo-sst", "tasks": ["sst"], "num_eval": 16}
RECIPES = {"vit": VIT, "bert": BERT, "sst": SST, "merge": MERGE}


def write_recipes(folder):
    """Write every recipe into a folder as NAME.yaml."""
    for name, content in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def verb(name, *arguments):
    """Run a verb in this process and return its exit status."""
    return import_module(f"hf_zoo.{name}").main([str(argument) for argument in arguments])


def tree(folder):
    """Return path -> hash of every file below a folder, and null for every folder."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in paths
    }


def environment(home, **more):
    """Return the environment of a process that has no account, no trackers and a cache of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "ACCELERATE_", "PYTEST", "CUDA", "MAKE", "MFLAGS"))
    }
    settings = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    return kept | settings | more
