"""A card's metadata: only what the Hub knows, and only what is true."""

import pytest
from huggingface_hub import ModelCard
from sample_cards import HUB_KEYS, member, merge, metadata_of

from hf_zoo.hub.cards import render_card
from hf_zoo.hub.metadata import card_metadata
from hf_zoo.population import Manifest, Parent


@pytest.mark.parametrize(
    "manifest",
    [
        member(),
        merge(),
        Manifest(name="bare"),
        Manifest(name="bare-merge", kind="merge"),
        member(objective="masked_lm", auto_class="AutoModelForMaskedLM", parents=(), snapshots=(), factors={}),
        member(library="peft", results=(), metrics={}),
    ],
)
def test_metadata_holds_only_what_the_hub_knows(manifest):
    card = render_card(manifest, "org/x")
    found = metadata_of(card)
    assert set(found) <= HUB_KEYS
    assert all(isinstance(tag, str) for tag in found["tags"])
    assert len(set(found["tags"])) == len(found["tags"])
    # The stock client reads it back as it was written.
    assert ModelCard(card).data.to_dict() == card_metadata(manifest).to_dict() == found


def test_the_metadata_of_a_member():
    found = metadata_of(render_card(member()))
    assert found["tags"] == ["hf_zoo", "model-zoo", "population:zoo-vit", "task:digits", "image_classification", "vit"]
    assert found["base_model"] == "org/zoo-simclr-003"
    assert found["base_model_relation"] == "finetune"
    assert (found["license"], found["language"], found["metrics"]) == ("apache-2.0", ["en"], ["accuracy"])
    assert "datasets" not in found
    [index] = found["model-index"]
    measured = {r["dataset"]["split"]: r["metrics"][0]["value"] for r in index["results"]}
    assert index["name"] == "zoo-vit-042"
    assert measured == {
        "validation": pytest.approx(1 - 0.5 / 3, abs=1e-6),
        "test": pytest.approx(1 - 0.55 / 3, abs=1e-6),
    }


def test_the_metadata_of_a_merge():
    found = metadata_of(render_card(merge()))
    assert {"merge", "ties", "task:sst", "task:mnli", "population:zoo-bert-tasks"} <= set(found["tags"])
    assert found["base_model"] == ["org/a", "org/b", "org/base"]
    assert found["base_model_relation"] == "merge"
    assert found["datasets"] == ["stanfordnlp/sst2"]
    assert found["pipeline_tag"] == "feature-extraction"
    values = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in found["model-index"][0]["results"]}
    assert values == {"sst": 0.88, "mnli": 0.7}
    assert {r["task"]["type"] for r in found["model-index"][0]["results"]} == {"text-classification"}


def test_only_parents_on_a_hub_are_base_models():
    local = Parent(repo="zoo-simclr-003", sha256="b" * 64)
    assert "base_model" not in metadata_of(render_card(member(parents=(local,))))
    assert "base_model_relation" not in metadata_of(render_card(member(parents=(local,))))
    found = metadata_of(render_card(merge(parents=(*merge().parents[:1], local))))
    assert found["base_model"] == ["org/a"]
    assert metadata_of(render_card(member(library="peft")))["base_model_relation"] == "adapter"


@pytest.mark.parametrize(
    ("dataset", "ids"),
    [
        ({"path": "imdb", "source": "hub"}, ["imdb"]),
        ({"path": "nyu-mll/glue", "source": "hub"}, ["nyu-mll/glue"]),
        ({"path": "glue_sst2", "source": "local"}, None),
        ({"path": "digits", "source": "embedded"}, None),
        ({"path": "org/set"}, ["org/set"]),
        ({"path": "a folder/with spaces"}, None),
        ({}, None),
    ],
)
def test_only_hub_datasets_are_named(dataset, ids):
    assert metadata_of(render_card(member(dataset=dataset))).get("datasets") == ids


@pytest.mark.parametrize(
    ("objective", "auto_class", "kind", "tag"),
    [
        ("image_classification", "AutoModelForImageClassification", "member", "image-classification"),
        ("contrastive", "AutoModelForImageClassification", "member", "image-feature-extraction"),
        ("masked_lm", "AutoModelForMaskedLM", "member", "fill-mask"),
        ("sequence_classification", "AutoModelForSequenceClassification", "member", "text-classification"),
        (None, "AutoModelForMaskedLM", "merge", "fill-mask"),
        ("image_classification", "AutoModel", "merge", "image-feature-extraction"),
        ("sequence_classification", "AutoModel", "merge", "feature-extraction"),
        (None, None, "member", None),
    ],
)
def test_what_it_does_as_the_hub_says_it(objective, auto_class, kind, tag):
    manifest = member(objective=objective, auto_class=auto_class, kind=kind)
    assert metadata_of(render_card(manifest)).get("pipeline_tag") == tag


def test_a_timm_net_in_its_wrapper_is_loaded_by_transformers():
    found = metadata_of(render_card(member(model_type="timm_wrapper", library="timm")))
    assert found["library_name"] == "transformers"
    assert "timm" in found["tags"]
    assert metadata_of(render_card(member(library="peft")))["library_name"] == "peft"
