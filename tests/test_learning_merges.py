"""Methods that learn from data, through the whole job on tiny real members."""

import csv
import shutil
from dataclasses import replace

import pytest
import test_merging
import torch
import transformers
from safetensors.torch import load_file

from hf_zoo.errors import MergeError
from hf_zoo.merging import run_merge
from hf_zoo.recipe.schema import DataSpec, MergeRecipe, MergeRule

population, texts, tokenizer = test_merging.population, test_merging.texts, test_merging.tokenizer


def soup_recipe(population, **changes):
    members = tuple(str(population / name) for name in ("zoo-000", "zoo-001"))
    fields = {"method": "learned_soup", "output": str(population.parent / "merges"), "name": "soup", **changes}
    return MergeRecipe(members=members, **fields)


def of_model(manifest, model):
    return {record["task"]: record for record in manifest.results if record["model"] == model}


def test_a_learned_soup_of_whole_models_lowers_the_validation_loss(population):
    soup = run_merge(soup_recipe(population, parameters={"batch_size": 8})).manifest
    average = run_merge(soup_recipe(population, method="average", name="average")).manifest
    report, (before, after) = soup.method["report"], (of_model(m, m.name)["sst"] for m in (average, soup))
    assert report["validation loss of the average"]["sst"] == pytest.approx(before["validation_loss"], abs=1e-5)
    assert after["validation_loss"] < before["validation_loss"]
    assert report["validation loss of the soup"]["sst"] < report["validation loss of the average"]["sst"]
    assert set(report["coefficients"]) == {"zoo-000", "zoo-001"}
    weights = load_file(population.parent / "merges" / "soup" / "model.safetensors")
    parts = [load_file(population / name / "model.safetensors") for name in ("zoo-000", "zoo-001")]
    shares = zip(*report["coefficients"].values(), strict=True)
    for name, (first, second) in zip(report["tensors"], shares, strict=True):
        assert first + second == pytest.approx(1)
        torch.testing.assert_close(weights[name], first * parts[0][name] + second * parts[1][name])
    assert set(weights) == set(report["tensors"])
    card = (population.parent / "merges" / "soup" / "README.md").read_text()
    assert len(card) < 20_000  # thousands of coefficients stay in the manifest


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("learned_soup", {"num_epochs": 3, "batch_size": 8}), ("adamerging", {"num_steps": 40, "learning_rate": 0.01})],
)
def test_trunks_of_two_tasks_are_learned_with_each_tasks_head(method, parameters, population, texts):
    recipe = test_merging.merge_recipe(population, method=method, parameters=parameters)
    if method == "adamerging":
        recipe = replace(recipe, base=str(population / "zoo-000"))
    outcome = run_merge(recipe)
    report = outcome.manifest.method["report"]
    kind = "validation loss of the soup" if method == "learned_soup" else "entropy after"
    start = "validation loss of the average" if method == "learned_soup" else "entropy before"
    assert set(report[kind]) == {"sst", "mnli"}
    assert sum(report[kind].values()) < sum(report[start].values())
    trunk = transformers.AutoModel.from_pretrained(outcome.folder).state_dict()
    assert set(report["tensors"]) == {name for name, tensor in trunk.items() if tensor.is_floating_point()}
    if method == "adamerging":
        entropies = {}
        for task in ("sst", "mnli"):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(outcome.folder, subfolder=task)
            read = transformers.AutoTokenizer.from_pretrained(outcome.folder, subfolder=task)
            with (texts / task / "validation.csv").open() as file:
                lines = [row["text"] for row in csv.DictReader(file)]
            with torch.no_grad():
                logs = model(**read(lines, padding=True, return_tensors="pt")).logits.log_softmax(-1)
            entropies[task] = float(-(logs.exp() * logs).sum(-1).mean())
        assert report[kind] == pytest.approx(entropies, abs=1e-5)


def test_linear_layers_are_merged_block_by_block_on_each_tasks_samples(population):
    merges = [
        run_merge(test_merging.merge_recipe(population, method=method, parameters=parameters, name=method))
        for method, parameters in (("regmean_plus", {"batch_size": 8}), ("average", {}))
    ]
    report = merges[0].manifest.method["report"]["regression"]
    assert set(report["samples"]) == {"sst", "mnli"}
    merged, mean = (load_file(one.folder / "model.safetensors") for one in merges)
    model = transformers.AutoModel.from_pretrained(merges[0].folder)
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in path
    }
    assert linear
    assert {name for name in mean if not torch.allclose(mean[name], merged[name], atol=1e-6)} - linear <= {
        "pooler.dense.weight"
    }
    assert linear <= {name for name in mean if not torch.equal(mean[name], merged[name])}
    assert report["solved"] >= len(linear)


def test_the_same_recipe_gives_the_same_bytes(population):
    first = run_merge(soup_recipe(population, num_threads=1)).folder / "model.safetensors"
    second = run_merge(soup_recipe(population, num_threads=3, name="again")).folder / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_the_test_split_changes_nothing(population, texts, tmp_path):
    shutil.copytree(texts / "sst", tmp_path / "sst")
    with (tmp_path / "sst" / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["a bad b", "good"], ["a good b", "bad"]])
    weights = []
    for name, folder in (("one", texts), ("two", tmp_path)):
        data = {"sst": DataSpec(path=str(folder / "sst"), validation_split="validation", max_length=16)}
        outcome = run_merge(soup_recipe(population, name=name, data=data))
        weights.append((outcome.folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_rule_has_its_own_tensors_learned(population):
    rules = (MergeRule(tensors="heads", method="learned_soup", parameters={"num_epochs": 2, "batch_size": 8}),)
    outcome = run_merge(soup_recipe(population, method="average", rules=rules))
    report = outcome.manifest.method["report"]
    assert set(report["tensors"]) == {"classifier.weight", "classifier.bias"}
    average = run_merge(soup_recipe(population, method="average", name="average"))
    merged, plain = (load_file(one.folder / "model.safetensors") for one in (outcome, average))
    differing = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_without_validation_data_it_is_refused_before_anything_is_written(population, texts):
    data = {"sst": DataSpec(path=str(texts / "sst"), validation_fraction=0.0, test_split="test")}
    with pytest.raises(MergeError, match="sst: its data has no validation split to choose by"):
        run_merge(soup_recipe(population, data=data))
    assert not list((population.parent / "merges").glob("*"))


def test_ensembles_of_a_tasks_members_are_rows_of_the_results(population):
    manifest = run_merge(soup_recipe(population, method="average", ensembles=True)).manifest
    models = [record["model"] for record in manifest.results]
    kinds = ("mean logits", "mean probabilities", "majority vote")
    assert models == ["zoo-000", "zoo-001", *(f"ensemble ({kind})" for kind in kinds), "soup"]
    assert all({"validation_accuracy", "test_accuracy"} <= set(record) for record in manifest.results)
    assert "ensemble (mean logits)" in (population.parent / "merges" / "soup" / "README.md").read_text()
    apart = run_merge(test_merging.merge_recipe(population, ensembles=True)).manifest
    assert not [record for record in apart.results if "ensemble" in record["model"]]  # one member a task
