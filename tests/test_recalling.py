"""Merges that chose on data, made again from their manifests alone: what was chosen is in there."""

import json
import os
import subprocess
import sys

import pytest
import test_merging

population, texts, tokenizer = test_merging.population, test_merging.texts, test_merging.tokenizer

MADE_AGAIN = """
import json, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from hf_zoo import AutoMergedModel
from hf_zoo.errors import ZooError
from hf_zoo.hub.publish import publish_population
from hf_zoo.merging import run_merge
from hf_zoo.recipe.schema import MergeRecipe, MergeRule, PublishSpec

population, output = Path(sys.argv[1]), Path(sys.argv[2])
publish_population(population, PublishSpec(namespace="org"))
pair = {"members": ("org/zoo-000", "org/zoo-001"), "base": "org/zoo-000"}
apart = {"members": ("org/zoo-001", "org/zoo-002"), "base": "org/zoo-000"}
learned = {"num_epochs": 1, "batch_size": 8}
grid = {"start": "member", "grid": [0.3, 0.6]}
adapted = {"num_steps": 3, "batch_size": 4, "density": 0.5, "learning_rate": 0.05}
rules = (
    MergeRule(tensors="heads", method="greedy_soup"),
    MergeRule(tensors="embeddings", parameters=learned | {"granularity": "model", "learning_rate": 0.5}),
)
recipes = {
    "greedy": dict(method="greedy_soup", parameters={"start": "all"}, **pair),
    "learned": dict(method="learned_soup", parameters=learned, **apart),
    "several": dict(method="learned_soup", parameters=learned, rules=rules, **pair),
    "line": dict(method="wise_ft", parameters=grid, **pair),
    "adapted": dict(method="adamerging", parameters=adapted, **apart),
    "regression": dict(method="regmean_plus", parameters={"num_examples": 8}, **apart),
}
for name, fields in recipes.items():
    recipe = MergeRecipe(output=str(output), name=name, evaluate=False, **fields)
    outcome = run_merge(recipe)
    alone = output / "alone" / name
    alone.mkdir(parents=True)
    shutil.copyfile(outcome.folder / "zoo.json", alone / "zoo.json")
    row = {"name": name, "choices": sorted(outcome.manifest.method.get("choices", ()))}
    try:
        model = AutoMergedModel.from_pretrained(str(alone))
    except ZooError as error:
        print(json.dumps(row | {"error": str(error)}))
        continue
    model.save_pretrained(output / "again" / name)
    made, again = (load_file(folder / "model.safetensors") for folder in (outcome.folder, output / "again" / name))
    row["same"] = set(made) == set(again) and all(torch.equal(made[key], again[key]) for key in made)
    trunk = AutoMergedModel.from_pretrained(str(alone), auto_class="AutoModel").state_dict()
    row["trunk"] = all(torch.equal(trunk[key.removeprefix("bert.")], made[key]) for key in made if "classifier" not in key)
    print(json.dumps(row))
"""


@pytest.fixture
def rows(population, tmp_path):
    from hf_zoo.hub.local import FolderHub

    with FolderHub(tmp_path / "hub") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", MADE_AGAIN, str(population), str(tmp_path / "merges")],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in lines}


def test_a_manifest_alone_makes_the_same_weights_without_the_data(rows):
    assert {name for name, row in rows.items() if row.get("same")} == {
        "greedy", "learned", "several", "line", "adapted"
    }  # fmt: skip
    assert all(row["trunk"] for row in rows.values() if "same" in row)
    assert [choice.partition(":")[0] for choice in rows["several"]["choices"]] == [
        "greedy_soup", "learned_soup", "learned_soup"
    ]  # fmt: skip
    assert "only with its weights" in rows["regression"]["error"]
    assert "regmean_plus needs data" in rows["regression"]["error"]
