"""The merge job on tiny real members: what is written loads in the stock classes, is what it says, or is not there."""

import csv
import dataclasses
import errno
import json
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_zoo.data.texts import train_tokenizer
from hf_zoo.errors import CheckpointError, MergeError, PopulationError
from hf_zoo.evaluation import evaluate_member
from hf_zoo.files import weights_digest, write_json
from hf_zoo.merge import main
from hf_zoo.merging import results_table, run_merge
from hf_zoo.population import Manifest, Member
from hf_zoo.recipe.grid import canonical, digest
from hf_zoo.recipe.schema import DataSpec, FinetuneRecipe, MergeRecipe, ObjectiveSpec, TokenizerSpec

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
CLASSES = {"sst": ("bad", "good"), "mnli": ("no", "maybe", "yes")}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with one csv file a task; the label is one of the words."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for task, names in CLASSES.items():
        for split, count in (("train", 60), ("validation", 40), ("test", 40)):
            (folder / task).mkdir(exist_ok=True)
            with (folder / task / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                for _ in range(count):
                    label = draw.choice(names)
                    writer.writerow([" ".join([draw.choice("abcdef"), label, draw.choice("abcdef")]), label])
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    words = [*"abcdef", *(name for names in CLASSES.values() for name in names)]
    return train_tokenizer([" ".join(words)] * 5, TokenizerSpec(vocab_size=60), 16)


@pytest.fixture
def population(tmp_path, texts, tokenizer):
    """A population of four members for two tasks in `runs/zoo`; returns its folder."""
    root = tmp_path / "runs" / "zoo"
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **BODY)
    parent = transformers.BertModel(config)
    names = []
    for index, (task, accuracy) in enumerate([("sst", 0.6), ("sst", 0.9), ("mnli", 0.5), ("mnli", 0.4)]):
        names.append(f"zoo-{index:03d}")
        save_member(root / names[-1], task, index, accuracy, parent, texts, tokenizer)
    write_json(root / "population.json", {"name": "zoo", "members": [{"name": name, "factors": {}} for name in names]})
    return root


def save_member(folder, task, seed, accuracy, parent, texts, tokenizer):
    names = CLASSES[task]
    config = parent.config.__class__.from_dict(parent.config.to_dict())
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    torch.manual_seed(seed + 10)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(parent.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = FinetuneRecipe(
        name="zoo",
        objective=ObjectiveSpec(name="sequence_classification"),
        parent="runs/parent",
        task=task,
        data=DataSpec(path=str(texts / task), validation_split="validation", max_length=16),
        seed=seed,
    )
    Manifest(
        name=folder.name,
        population="zoo",
        status="finished",
        objective="sequence_classification",
        task=task,
        factors={"task": task, "seed": seed % 2},
        recipe=canonical(recipe, spelled_out=True),
        digest=digest(recipe),
        metrics={"validation_accuracy": accuracy},
        auto_class="AutoModelForSequenceClassification",
        architecture="BertForSequenceClassification",
        model_type="bert",
        sha256=weights_digest(folder),
    ).write(folder)


def merge_recipe(population, **changes):
    output = str(population.parent / "merges")
    return MergeRecipe(population=str(population), tasks=("sst", "mnli"), output=output, **changes)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_two_tasks_share_a_trunk_and_keep_their_heads(population):
    before = tree(population)
    outcome = run_merge(merge_recipe(population))
    assert outcome.made
    assert outcome.folder == population.parent / "merges" / "merge-sst-mnli"
    members = {
        task: transformers.BertForSequenceClassification.from_pretrained(population / name)
        for task, name in (("sst", "zoo-001"), ("mnli", "zoo-002"))  # the best of each task
    }
    states = [member.bert.state_dict() for member in members.values()]
    trunk, info = transformers.AutoModel.from_pretrained(outcome.folder, output_loading_info=True)
    assert not any(info.values())
    assert type(trunk) is transformers.BertModel
    for name, tensor in trunk.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    for task, member in members.items():
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            outcome.folder, subfolder=task, output_loading_info=True
        )
        assert not any(info.values())
        assert tuple(model.config.id2label.values()) == CLASSES[task]
        torch.testing.assert_close(model.classifier.weight, member.classifier.weight, rtol=0, atol=0)
        torch.testing.assert_close(model.bert.state_dict(), trunk.state_dict(), rtol=0, atol=0)
        for where in ({}, {"subfolder": task}):
            loaded = transformers.AutoTokenizer.from_pretrained(outcome.folder, **where)
            assert (
                loaded("a good b").input_ids
                == transformers.AutoTokenizer.from_pretrained(population / "zoo-001")("a good b").input_ids
            )
    assert "id2label" not in json.loads((outcome.folder / "config.json").read_text())
    assert tree(population) == before
    assert [path.name for path in outcome.folder.parent.iterdir()] == ["merge-sst-mnli"]


def test_the_manifest_says_what_was_made_of_what(population):
    outcome = run_merge(merge_recipe(population))
    manifest = Manifest.read(outcome.folder)
    assert manifest == outcome.manifest
    assert manifest.kind == "merge"
    assert manifest.tasks == ("sst", "mnli")
    assert [(parent.repo, parent.role, parent.task) for parent in manifest.parents] == [
        ("zoo-001", "member", "sst"),
        ("zoo-002", "member", "mnli"),
    ]
    assert [parent.sha256 for parent in manifest.parents] == [
        weights_digest(population / name) for name in ("zoo-001", "zoo-002")
    ]
    assert manifest.sha256 == weights_digest(outcome.folder)
    assert manifest.method["name"] == "average"
    assert manifest.method["url"] == "https://arxiv.org/abs/2203.05482"
    assert (manifest.auto_class, manifest.architecture) == ("AutoModel", "BertModel")
    assert manifest.num_parameters == transformers.AutoModel.from_pretrained(outcome.folder).num_parameters()
    assert str(population.parent) not in (outcome.folder / "README.md").read_text()
    assert "zoo-001" in (outcome.folder / "README.md").read_text()


def test_every_task_is_measured_for_its_member_and_the_merge(population, texts):
    outcome = run_merge(merge_recipe(population))
    records = {(record["task"], record["model"]): record for record in outcome.manifest.results}
    assert list(records) == [
        ("sst", "zoo-001"),
        ("sst", "merge-sst-mnli"),
        ("mnli", "zoo-002"),
        ("mnli", "merge-sst-mnli"),
    ]
    for task, name in (("sst", "zoo-001"), ("mnli", "zoo-002")):
        data = DataSpec(path=str(texts / task), validation_split="validation", max_length=16)
        parent = evaluate_member(population / name, data)
        merged = Member(Manifest.read(population / name), folder=outcome.folder / task)
        for model, oracle in ((name, parent), ("merge-sst-mnli", evaluate_member(merged, data))):
            for split in ("validation", "test"):
                for metric in ("loss", "accuracy"):
                    found = records[task, model][f"{split}_{metric}"]
                    assert found == pytest.approx(oracle[split][metric], abs=1e-6), (task, model, split, metric)
    merges = [record for key, record in records.items() if key[1] == "merge-sst-mnli"]
    mean = sum(record["test_accuracy"] for record in merges) / 2
    assert outcome.manifest.metrics["test_accuracy"] == pytest.approx(mean)
    rows = results_table(outcome.manifest)
    assert [row["model"] for row in rows] == ["zoo-001", "merge-sst-mnli", "zoo-002"]
    assert rows[1]["sst (test accuracy)"] == f"{merges[0]['test_accuracy']:.4f}"


def test_an_unknown_task_is_answered_with_those_there_are(population):
    recipe = MergeRecipe(population=str(population), tasks=("sst", "mnl"))
    with pytest.raises(
        MergeError, match=r"no member for task 'mnl' \(did you mean 'mnli'\?\): it has mnli \(2\), sst"
    ):
        run_merge(recipe)


def test_a_task_nobody_has_finished_is_named(population):
    for name in ("zoo-002", "zoo-003"):
        Manifest.read(population / name).replace(status="training").write(population / name)
    with pytest.raises(MergeError, match="no member for task 'mnli' has finished"):
        run_merge(merge_recipe(population))


def test_factors_narrow_the_choice_down(population):
    outcome = run_merge(merge_recipe(population, where={"seed": 0}, evaluate=False))
    assert [parent.repo for parent in outcome.manifest.parents] == ["zoo-000", "zoo-002"]
    assert outcome.manifest.results == ()


def test_made_again_it_is_left_alone_and_another_recipe_is_refused(population):
    first = run_merge(merge_recipe(population))
    before = tree(first.folder)
    again = run_merge(merge_recipe(population))
    assert not again.made
    assert again.manifest == first.manifest
    with pytest.raises(MergeError, match=r"holds another merge(.|\n)*num_eval: null -> 20"):
        run_merge(merge_recipe(population, num_eval=20))
    tensors = load_file(population / "zoo-001" / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, population / "zoo-001" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="member zoo-001: its weights are others than then"):
        run_merge(merge_recipe(population))
    assert tree(first.folder) == before


def test_the_same_recipe_gives_the_same_bytes(population, tmp_path):
    first = run_merge(merge_recipe(population))
    second = run_merge(MergeRecipe(**vars(merge_recipe(population)) | {"output": str(tmp_path / "again")}))
    assert tree(first.folder) == tree(second.folder)


def test_members_of_one_label_space_merge_with_their_heads(population):
    members = tuple(str(population / name) for name in ("zoo-000", "zoo-001"))
    recipe = MergeRecipe(members=members, output=str(population.parent / "merges"))
    outcome = run_merge(recipe)
    assert outcome.folder.name == "merge-zoo-000-zoo-001"
    assert outcome.manifest.auto_class == "AutoModelForSequenceClassification"
    assert outcome.manifest.task == "sst"
    merged, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        outcome.folder, output_loading_info=True
    )
    assert not any(info.values())
    states = [transformers.BertForSequenceClassification.from_pretrained(path).state_dict() for path in members]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    assert [record["model"] for record in outcome.manifest.results] == ["zoo-000", "zoo-001", outcome.folder.name]


def test_a_greedy_soup_chooses_by_validation_and_says_whom(population):
    members = tuple(str(population / name) for name in ("zoo-000", "zoo-001"))
    outcome = run_merge(
        MergeRecipe(members=members, method="greedy_soup", output=str(population.parent / "merges"), name="soup")
    )
    report = outcome.manifest.method["report"]
    validation = {record["model"]: record["validation_accuracy"] for record in outcome.manifest.results}
    assert report["scores"]["zoo-000"] == pytest.approx(validation["zoo-000"])
    assert report["score"] == pytest.approx(validation["soup"])
    assert validation["soup"] >= max(validation["zoo-000"], validation["zoo-001"])
    assert set(report["accepted"]) <= {"zoo-000", "zoo-001"}


def test_a_greedy_soup_without_validation_data_is_refused(population, texts):
    data = {"sst": DataSpec(path=str(texts / "sst"), validation_fraction=0.0, test_split="test")}
    members = tuple(str(population / name) for name in ("zoo-000", "zoo-001"))
    recipe = MergeRecipe(members=members, method="greedy_soup", data=data, output=str(population.parent / "merges"))
    with pytest.raises(MergeError, match="sst: its data has no validation split to choose by"):
        run_merge(recipe)
    assert not list((population.parent / "merges").glob("*"))


def test_heads_of_two_label_spaces_are_not_mixed(population):
    with pytest.raises(MergeError, match=r"different classes \(bad, good; no, maybe, yes\)"):
        run_merge(merge_recipe(population, heads="merge"))


def test_a_shared_head_is_measured_on_every_tasks_own_data(population, texts, tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    for split in ("train", "validation", "test"):  # the same sentences, nearly all called good
        rows = (texts / "sst" / f"{split}.csv").read_text().splitlines()
        turned = [f"{row.rpartition(',')[0]},{'bad' if place < 4 else 'good'}" for place, row in enumerate(rows[1:])]
        (films / f"{split}.csv").write_text("\n".join([rows[0], *turned]) + "\n")
    manifest = Manifest.read(population / "zoo-001")
    own = {**manifest.recipe, "task": "films", "data": {**manifest.recipe["data"], "path": str(films)}}
    dataclasses.replace(manifest, task="films", recipe=own).write(population / "zoo-001")
    members = tuple(str(population / name) for name in ("zoo-000", "zoo-001"))
    outcome = run_merge(MergeRecipe(members=members, heads="merge", output=str(tmp_path / "merges")))
    records = {record["task"]: record for record in outcome.manifest.results if record["model"] == outcome.folder.name}
    merged = Member(Manifest.read(population / "zoo-001"), folder=outcome.folder)
    for task, path in (("sst", texts / "sst"), ("films", films)):
        data = DataSpec(path=str(path), validation_split="validation", max_length=16)
        oracle = evaluate_member(merged, data)["test"]
        assert records[task]["test_accuracy"] == pytest.approx(oracle["accuracy"], abs=1e-6)
    assert records["films"]["test_accuracy"] != records["sst"]["test_accuracy"]


def test_the_type_of_the_weights_can_be_chosen(population):
    outcome = run_merge(merge_recipe(population, dtype="bfloat16", evaluate=False))
    assert transformers.AutoModel.from_pretrained(outcome.folder).dtype == torch.bfloat16
    model = transformers.AutoModelForSequenceClassification.from_pretrained(outcome.folder, subfolder="sst")
    assert model.dtype == torch.bfloat16


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(tensors):
    tensors["bert.pooler.dense.bias"][2] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (with_nan, CheckpointError, r"zoo-002: tensor 'pooler\.dense\.bias' .*holds 1 NaN of 16 values"),
        (
            lambda tensors: tensors | {"bert.pooler.dense.bias": torch.zeros(3)},
            MergeError,
            r"'pooler\.dense\.bias' is \[16\] in the first and \[3\] in the second",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if "pooler" not in name},
            CheckpointError,
            r"zoo-002: no tensor 'bert\.pooler\.dense\.",
        ),
    ],
)
def test_a_member_that_does_not_fit_leaves_nothing_behind(population, change, error, message):
    spoil(population / "zoo-002", change)
    with pytest.raises(error, match=message):
        run_merge(merge_recipe(population))
    assert not list((population.parent / "merges").glob("*"))


def test_a_disk_that_fills_up_leaves_nothing_behind(population, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="merge-sst-mnli: the disk is full"):
        run_merge(merge_recipe(population))
    assert not list((population.parent / "merges").glob("*"))


def test_a_folder_that_is_no_merge_is_not_touched(population):
    folder = population.parent / "merges" / "merge-sst-mnli"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="exists and is no merge"):
        run_merge(merge_recipe(population))
    assert (folder / "mine.txt").read_text() == "mine"


def make_vit(num_labels):
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=num_labels, **BODY)
    return transformers.ViTForImageClassification(config), "vit.", "classifier.weight"


def make_vit_with_perceptron(num_labels):
    from hf_zoo.models import mlp_head

    classifier = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, **BODY}
    config = mlp_head.MlpHeadConfig(classifier=classifier, hidden=[6], num_labels=num_labels)
    return mlp_head.MlpHeadForImageClassification(config), "inner.vit.", "inner.classifier.2.weight"


def make_timm(num_labels):
    config = transformers.TimmWrapperConfig(architecture="resnet10t", num_labels=num_labels)
    return transformers.TimmWrapperForImageClassification(config), "", "timm_model.fc.weight"


@pytest.mark.parametrize(
    ("make", "trunk_class", "absent"),
    [
        # On disk ViT's tensors have other names than in memory, and its classifiers have no pooler.
        (make_vit, "ViTModel", {"pooler.dense.weight", "pooler.dense.bias"}),
        (make_vit_with_perceptron, "ViTModel", {"pooler.dense.weight", "pooler.dense.bias"}),
        (make_timm, "TimmWrapperModel", set()),
    ],
)
def test_vision_members_share_a_trunk_and_keep_their_heads(tmp_path, make, trunk_class, absent):
    members, folders = [], []
    for index, task in enumerate(("upper", "lower")):
        torch.manual_seed(index)
        model, prefix, head = make(index + 2)
        model.save_pretrained(tmp_path / task)
        members.append(model)
        folders.append(tmp_path / task)
        Manifest(name=task, status="finished", objective="image_classification", task=task).write(folders[-1])
    recipe = MergeRecipe(
        members=tuple(str(folder) for folder in folders), output=str(tmp_path / "merges"), evaluate=False
    )
    outcome = run_merge(recipe)
    trunk, info = transformers.AutoModel.from_pretrained(outcome.folder, output_loading_info=True)
    assert type(trunk).__name__ == trunk_class
    assert set(info["missing_keys"]) == absent
    assert not info["unexpected_keys"]
    assert set(outcome.manifest.loading.get("absent from the trunk, as the members have none", [])) == absent
    states = [member.state_dict() for member in members]
    for name, tensor in trunk.state_dict().items():
        if name not in absent and tensor.is_floating_point():
            torch.testing.assert_close(tensor, (states[0][prefix + name] + states[1][prefix + name]) / 2)
    for state, task in zip(states, ("upper", "lower"), strict=True):
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            outcome.folder, subfolder=task, output_loading_info=True
        )
        assert not any(info.values())
        merged = model.state_dict()
        torch.testing.assert_close(merged[head], state[head], rtol=0, atol=0)
        for name, tensor in trunk.state_dict().items():
            if name not in absent:
                torch.testing.assert_close(merged[prefix + name], tensor, rtol=0, atol=0)


def write_recipe(path, population, **changes):
    content = {"population": str(population), "tasks": ["sst", "mnli"], "output": str(population.parent / "merges")}
    path.write_text(json.dumps(content | changes))  # JSON is YAML
    return str(path)


def test_the_verb_prints_the_table_and_the_folder(population, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "merge.yaml", population)
    assert main([recipe]) == 0
    shown = capsys.readouterr().out
    manifest = Manifest.read(population.parent / "merges" / "merge-sst-mnli")
    accuracy = next(r["test_accuracy"] for r in manifest.results if r["model"] == "zoo-001")
    assert f"zoo-001         {accuracy:.4f}" in shown
    assert "mnli (test accuracy)" in shown
    assert shown.endswith("merge-sst-mnli\n")
    assert main([recipe]) == 0
    assert "already made from the same members and recipe" in capsys.readouterr().out


def test_the_verb_refuses_in_one_message(population, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "merge.yaml", population)
    assert main([recipe, "tasks=[sst,qqp]"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: zoo: no member for task 'qqp': it has mnli (2), sst (2)")
    assert "Traceback" not in captured.err
    assert main([recipe, "parameters.weights=[1,2,3]"]) == 2
    assert "average: weights needs one value a member: got 3 for 2 members" in capsys.readouterr().err
    assert main([recipe, "method=averge"]) == 2
    assert "did you mean 'average'?" in capsys.readouterr().err
    assert not list((population.parent / "merges").glob("*"))


def test_a_dry_run_writes_nothing(population, tmp_path, capsys):
    assert main([write_recipe(tmp_path / "merge.yaml", population), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "zoo-001" in shown
    assert "heads one a task (sst, mnli); nothing was done" in shown
    assert not (population.parent / "merges").exists()


def test_a_missing_member_is_named(population, tmp_path, capsys):
    recipe = MergeRecipe(members=(str(population / "zoo-000"), str(population / "zoo-009")))
    with pytest.raises(PopulationError, match=r"zoo-009: no such folder"):
        run_merge(recipe)


ON_A_HUB = """
import json, sys
from pathlib import Path
import torch, transformers
from huggingface_hub import CommitOperationDelete, HfApi
from hf_zoo import AutoMergedModel
from hf_zoo.hub.publish import publish_population
from hf_zoo.merging import run_merge
from hf_zoo.recipe.schema import MergeRecipe, PublishSpec

population, output = Path(sys.argv[1]), sys.argv[2]
spec = PublishSpec(namespace="org")
publish_population(population, spec)
recipe = MergeRecipe(population="org/zoo", tasks=("sst", "mnli"), output=output, publish=spec)
first = run_merge(recipe)
again = run_merge(recipe)
api = HfApi()
files = api.list_repo_files("org/merge-sst-mnli")
trunk = transformers.AutoModel.from_pretrained("org/merge-sst-mnli").state_dict()
task = transformers.AutoModelForSequenceClassification.from_pretrained("org/merge-sst-mnli", subfolder="mnli")
task = {name: tensor.clone() for name, tensor in task.state_dict().items()}
weights = [CommitOperationDelete(path) for path in files if path.endswith(".safetensors")]
api.create_commit("org/merge-sst-mnli", weights, commit_message="Keep the recipe alone")
remade = AutoMergedModel.from_pretrained("org/merge-sst-mnli")
head = AutoMergedModel.from_pretrained("org/merge-sst-mnli", subfolder="mnli")
on_the_fly = AutoMergedModel.from_pretrained(["org/zoo-001", "org/zoo-002"], auto_class="AutoModel")

def same(state, wanted):
    return set(state) == set(wanted) and all(torch.equal(state[name], wanted[name]) for name in wanted)

print(json.dumps({
    "made": [first.made, again.made],
    "parents": [[parent.repo, len(parent.revision)] for parent in first.manifest.parents],
    "files": files,
    "remade": same(remade.state_dict(), trunk),
    "head": same(head.state_dict(), task),
    "on_the_fly": same(on_the_fly.state_dict(), trunk),
    "classes": [type(remade).__name__, type(head).__name__],
    "url": first.url,
}))
"""


def test_a_merge_of_members_on_a_hub_is_published_and_can_be_made_again_from_its_recipe(population, tmp_path):
    from hf_zoo.hub.local import FolderHub

    with FolderHub(tmp_path / "hub") as hub:
        url = hub.url
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", ON_A_HUB, str(population), str(tmp_path / "merges")],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["made"] == [True, False]
    assert found["parents"] == [["org/zoo-001", 40], ["org/zoo-002", 40]]
    assert {
        "config.json",
        "README.md",
        "zoo.json",
        "model.safetensors",
        "sst/model.safetensors",
        "mnli/config.json",
    } <= {*found["files"]}
    assert found["remade"]
    assert found["head"]
    assert found["on_the_fly"]
    assert found["classes"] == ["BertModel", "BertForSequenceClassification"]
    assert found["url"] == f"{url}/org/merge-sst-mnli"


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from hf_zoo.checkpoint import CheckpointReader, write_checkpoint
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method

def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

folders = [Path(name) for name in sys.argv[2:]]
inputs = MergeInputs.of([CheckpointReader.open(folder) for folder in folders])
write_checkpoint(folders[0].parent / "warm", make_method("average").merge(inputs), inputs.layout)
before = anonymous()
peak = 0

def watched(stream):
    global peak
    for item in stream:
        peak = max(peak, anonymous())
        yield item

write_checkpoint(Path(sys.argv[1]), watched(make_method("average").merge(inputs)), inputs.layout)
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_averaging_holds_one_tensor_whatever_the_number_of_members(tmp_path):
    """8 members of 16 MB in tensors of 2 MB: all at once would be 128 MB."""
    for index in range(8):
        draw = torch.Generator().manual_seed(index)
        tensors = {f"layer.{i}.weight": torch.randn(512, 1024, generator=draw) for i in range(8)}
        (tmp_path / str(index)).mkdir()
        save_file(tensors, tmp_path / str(index) / "model.safetensors")
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "merge"), *(str(tmp_path / str(i)) for i in range(8))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12_000  # kB: the accumulator, the result, and the allocator's slack
