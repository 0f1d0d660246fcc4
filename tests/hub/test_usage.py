"""The snippets on cards run as they stand."""

import shutil

import pytest
import torch
from PIL import Image
from sample_cards import member, merge, snippets_of
from tiny_zoo import write_bert
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_zoo.hub.cards import render_card


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    write_bert(folder := tmp_path_factory.mktemp("snippets") / "bert")
    return folder


def run(snippet, folder, monkeypatch):
    """Run a snippet of a card beside a picture, and return its names."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(snippet, "card", "exec"), names)
    return names


def test_the_snippet_of_an_image_classifier_runs(tmp_path, monkeypatch, capsys):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_channels=1, id2label={0: "zero", 1: "one"}, label2id={"zero": 0, "one": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "picture.png")
    run(snippets_of(render_card(member(), str(tmp_path)))[0], tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip() in {"zero", "one"}
    run(snippets_of(render_card(member(recipe={}), str(tmp_path)))[0], tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip() in {"zero", "one"}
    names = run(snippets_of(render_card(member(objective="contrastive"), str(tmp_path)))[0], tmp_path, monkeypatch)
    assert names["features"].shape == (1, 2)


def test_the_snippet_of_a_language_model_runs(bert, tmp_path, monkeypatch, capsys):
    manifest = member(objective="masked_lm", auto_class="AutoModelForMaskedLM")
    run(snippets_of(render_card(manifest, str(bert)))[0], tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


def test_the_snippet_for_pairs_runs(bert, tmp_path, monkeypatch, capsys):
    manifest = member(
        objective="sequence_classification",
        auto_class="AutoModelForSequenceClassification",
        dataset={"path": "docs-pairs"},
    )
    snippet = snippets_of(render_card(manifest, str(bert)))[0]
    assert "And a second one." in snippet
    run(snippet, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip() in {"negative", "positive"}


def test_the_snippets_of_a_merge_run(bert, tmp_path, monkeypatch):
    for place in ("sst", "mnli", ""):
        shutil.copytree(bert, tmp_path / "merge" / place, dirs_exist_ok=True)
    trunk, tasks = snippets_of(render_card(merge(), str(tmp_path / "merge")))
    assert run(trunk, tmp_path, monkeypatch)["features"].shape[-1] == 8
    models = run(tasks, tmp_path, monkeypatch)["models"]
    assert {task: type(model).__name__ for task, model in models.items()} == dict.fromkeys(
        ("sst", "mnli"), "BertForSequenceClassification"
    )


def test_an_adapter_is_asked_for_its_own_revision():
    manifest = member(library="peft", dataset={"path": "docs-sentences", "labels": ["a", "b"]})
    named = ', adapter_kwargs={"revision": "epoch-001"}, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True)'
    assert named in snippets_of(render_card(manifest, "org/x"))[1]
    unnamed = snippets_of(render_card(member(library="peft", dataset={"path": "docs"}), "org/x"))[1]
    assert 'from_pretrained("org/x", adapter_kwargs={"revision": "epoch-001"})' in unnamed


def test_a_head_with_its_own_code_says_so():
    manifest = member(recipe={"model": {"head": {"type": "mlp", "hidden": [8]}}})
    card = render_card(manifest, "org/x")
    assert ".from_pretrained(repo, trust_remote_code=True)" in snippets_of(card)[0]
    assert 'revision="epoch-001", trust_remote_code=True' in snippets_of(card)[1]
    assert "trust_remote_code" not in render_card(member(), "org/x")
