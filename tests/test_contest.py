"""Every method tried on tiny real members: rows are what single merges measure, and those left out say why."""

import csv
import json
import random
import shutil

import pytest
import torch
import transformers

from hf_zoo.contest import applicable_methods, run_contest
from hf_zoo.data.texts import train_tokenizer
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.files import weights_digest
from hf_zoo.merge import main
from hf_zoo.merging import run_merge
from hf_zoo.methods.base import Need, get_method, list_methods
from hf_zoo.population import Manifest
from hf_zoo.recipe.grid import canonical, digest
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import DataSpec, FinetuneRecipe, MergeRecipe, ObjectiveSpec, TokenizerSpec

BODY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
CLASSES = {"sst": ("bad", "good"), "mnli": ("no", "maybe", "yes")}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Three members for two tasks, `a` and `b` for one and `c` for the other, and their base."""
    root = tmp_path_factory.mktemp("zoo")
    draw = random.Random(0)
    words = [*"abcdef", *(name for names in CLASSES.values() for name in names)]
    tokenizer = train_tokenizer([" ".join(words)] * 5, TokenizerSpec(vocab_size=60), 16)
    for task, names in CLASSES.items():
        (root / task).mkdir()
        for split in ("train", "validation", "test"):
            with (root / task / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                labels = [draw.choice(names) for _ in range(20)]
                writer.writerows(
                    [f"{draw.choice('abcdef')} {label} {draw.choice('abcdef')}", label] for label in labels
                )
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **BODY)
    parent = transformers.BertModel(config)
    parent.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for index, (name, task) in enumerate({"a": "sst", "b": "sst", "c": "mnli"}.items()):
        save_member(root, name, task, index, parent, tokenizer)
    return root


def save_member(root, name, task, seed, parent, tokenizer):
    own = transformers.BertConfig.from_dict(parent.config.to_dict())
    own.id2label = dict(enumerate(CLASSES[task]))
    own.label2id = {label: i for i, label in enumerate(CLASSES[task])}
    torch.manual_seed(seed + 1)
    model = transformers.BertForSequenceClassification(own)
    model.bert.load_state_dict(parent.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    recipe = FinetuneRecipe(
        name="zoo",
        objective=ObjectiveSpec(name="sequence_classification"),
        parent=str(root / "base"),
        task=task,
        data=DataSpec(path=str(root / task), validation_split="validation", max_length=16),
    )
    Manifest(
        name=name,
        status="finished",
        objective="sequence_classification",
        task=task,
        recipe=canonical(recipe, spelled_out=True),
        digest=digest(recipe),
        auto_class="AutoModelForSequenceClassification",
        architecture="BertForSequenceClassification",
        sha256=weights_digest(root / name),
    ).write(root / name)


@pytest.fixture
def few(monkeypatch):
    """Only some methods, so that a test is quick; the table has nothing to do with how many there are."""
    monkeypatch.setattr(
        "hf_zoo.contest.list_methods", lambda: ["average", "fisher", "slerp", "task_arithmetic", "ties"]
    )


def recipe_of(zoo, output, members="abc", **changes):
    plain = {"members": [str(zoo / name) for name in members], "method": "all", "output": str(output)}
    return build_recipe(plain | changes, MergeRecipe, "test")


def test_rows_are_what_single_merges_measure(zoo, tmp_path, few):
    recipe = recipe_of(zoo, tmp_path / "all", parameters={"ties": {"density": 0.6}})
    outcome = run_contest(recipe)
    rows = {(row["kind"], row["name"]): row for row in outcome.rows}
    for method, parameters in (("average", {}), ("task_arithmetic", {}), ("ties", {"density": 0.6})):
        single = run_merge(
            recipe_of(zoo, tmp_path / "single", method=method, parameters=parameters, name=f"one-{method[:4]}")
        )
        records = [record for record in single.manifest.results if record["model"] == single.manifest.name]
        for record in records:
            found = rows["method", method]["results"][record["task"]]
            wanted = {key: value for key, value in record.items() if key not in ("task", "model")}
            assert found == pytest.approx(wanted, abs=1e-6)
        accuracies = [record["validation_accuracy"] for record in records]
        assert rows["method", method]["score"] == pytest.approx(sum(accuracies) / len(accuracies))
        for record in single.manifest.results:
            if record["model"] in "abc":
                found = rows["member", record["model"]]["results"][record["task"]]
                assert found["test_accuracy"] == pytest.approx(record["test_accuracy"])
    assert set(rows["member", "a"]["results"]) == {"sst"}
    assert set(rows["member", "c"]["results"]) == {"mnli"}
    assert rows["ensemble", "ensemble (mean logits)"]["results"].keys() == {"sst"}  # mnli has one member
    scores = {name: row["score"] for (kind, name), row in rows.items() if kind == "method"}
    assert scores[outcome.best] == max(scores.values())
    assert outcome.merge.manifest.method["name"] == outcome.best
    assert [row["name"] for row in outcome.rows if row["kind"] == "method"] == sorted(scores, key=lambda n: -scores[n])


def test_methods_that_cannot_be_tried_say_why(zoo, tmp_path, few):
    methods, reasons = applicable_methods(recipe_of(zoo, tmp_path))
    assert methods == ["average", "task_arithmetic", "ties"]
    assert "has no fisher statistics" in reasons["fisher"]
    assert reasons["slerp"].startswith("slerp merges 2 members, got 3")
    assert "slerp" in applicable_methods(recipe_of(zoo, tmp_path, "ab"))[0]


def test_without_a_base_methods_that_need_one_are_left_out(zoo, tmp_path, few):
    for name in "ab":
        shutil.copytree(zoo / name, tmp_path / name)
        manifest = Manifest.read(tmp_path / name)
        manifest.replace(recipe=manifest.recipe | {"parent": str(tmp_path / f"base-of-{name}")}).write(tmp_path / name)
    methods, reasons = applicable_methods(recipe_of(tmp_path, tmp_path / "out", "ab"))
    assert methods == ["average", "slerp"]
    assert "the members come from several models" in reasons["ties"]
    assert "base" in reasons["task_arithmetic"]


def test_every_method_is_tried_or_says_why(zoo, tmp_path):
    methods, reasons = applicable_methods(recipe_of(zoo, tmp_path))
    assert sorted([*methods, *reasons]) == list_methods()
    for name, reason in reasons.items():
        lacks = get_method(name).needs & {Need.FISHER, Need.GRAM}
        assert "statistics" in reason if lacks else "members, got 3" in reason, f"{name}: {reason}"


def test_joint_training_stands_in_the_table(zoo, tmp_path, few):
    joint = tmp_path / "joint"
    for task, name in (("sst", "b"), ("mnli", "c")):
        shutil.copytree(zoo / name, joint / task)
    for path in (zoo / "base").iterdir():
        shutil.copyfile(path, joint / path.name)
    outcome = run_contest(recipe_of(zoo, tmp_path / "out", joint=str(joint)))
    rows = {row["name"]: row["results"] for row in outcome.rows}
    assert rows["joint"] == {"sst": rows["b"]["sst"], "mnli": rows["c"]["mnli"]}
    assert "joint (joint training)" in [row["model"] for row in outcome.table()]
    with pytest.raises(MergeError, match=r"tells other classes apart \(bad, good\) than .*c \(no, maybe, yes\)"):
        run_contest(recipe_of(zoo, tmp_path / "other", joint=str(zoo / "a")))


def test_interrupted_it_goes_on_and_ends_the_same(zoo, tmp_path, few, monkeypatch):
    import hf_zoo.contest

    whole = run_contest(recipe_of(zoo, tmp_path / "whole"))
    measured = hf_zoo.contest._measured
    tried = []

    def until_ties(bench, recipe):
        tried.append(recipe.method)
        if recipe.method == "ties" and tried.count("ties") == 1:
            raise KeyboardInterrupt
        return measured(bench, recipe)

    monkeypatch.setattr(hf_zoo.contest, "_measured", until_ties)
    with pytest.raises(KeyboardInterrupt):
        run_contest(recipe_of(zoo, tmp_path / "parts"))
    parts = run_contest(recipe_of(zoo, tmp_path / "parts"))
    assert tried == ["average", "task_arithmetic", "ties", "ties"]
    for file in ("methods.jsonl", "contest.json", "README.md"):
        assert (parts.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    run_contest(recipe_of(zoo, tmp_path / "parts"))
    assert len(tried) == 4


def test_the_folder_holds_a_table_and_the_best_merge_beside_it(zoo, tmp_path, few):
    outcome = run_contest(recipe_of(zoo, tmp_path))
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["README.md", "contest.json", "methods.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([outcome.folder.name, outcome.merge.folder.name])
    content = json.loads((outcome.folder / "contest.json").read_text())
    assert content["best"] == outcome.best
    card = (outcome.folder / "README.md").read_text()
    assert f"| {outcome.best} \\* |" in card
    assert "slerp merges 2 members" in card
    assert "a has no fisher statistics" in card
    for file in outcome.folder.iterdir():
        assert str(zoo) not in file.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"density": 0.2}}, r"parameters\.density: with `method: all`, parameters are given a method"),
        ({"rules": [{"tensors": "blocks", "method": "ties"}]}, r"rules: name methods of their own"),
        ({"search": {"over": {"method": ["ties"]}}}, r"search: is over one method"),
        ({"evaluate": False}, r"evaluate: methods are compared by what they score"),
        ({"method": "ties", "joint": "org/joint"}, r"joint: is compared with by `method: all` alone"),
    ],
)
def test_mistakes_of_a_recipe_are_named(changes, message):
    with pytest.raises(RecipeError, match=message):
        build_recipe({"members": ["a", "b"], "method": "all"} | changes, MergeRecipe, "test")


def test_the_verb_prints_the_table(zoo, tmp_path, few, capsys):
    file = tmp_path / "merge.yaml"
    plain = {"members": [str(zoo / name) for name in "abc"], "output": str(tmp_path / "merges")}
    file.write_text(json.dumps(plain))
    assert main([str(file), "method=all", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would try 3 methods: average, task_arithmetic, ties" in shown
    assert not (tmp_path / "merges").exists()
    assert main([str(file), "method=all"]) == 0
    shown = capsys.readouterr().out
    assert "mean (validation)" in shown
    assert "best by validation: " in shown
    assert "not tried: slerp: slerp merges 2 members" in shown
