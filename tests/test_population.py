"""Manifests, references, members and populations as they lie on the disk."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers

from hf_zoo.errors import CheckpointError, PopulationError
from hf_zoo.files import write_json
from hf_zoo.hub.usage import revision_usage, usage
from hf_zoo.population import MISSING, SCHEMA, Manifest, Member, Parent, Population, Reference, Snapshot, lookup_factor

BODY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = BODY | {"vocab_size": 40, "max_position_embeddings": 24}
LABELS = ("first", "second", "third")
FULL = Manifest(
    name="zoo-t-003",
    population="zoo-t",
    status="finished",
    objective="sequence_classification",
    task="sst",
    tasks=("sst", "mnli"),
    description="A small one.",
    factors={"seed": 3, "training.learning_rate": 1e-4, "augmentation.crop": None},
    parents=(Parent(repo="org/zoo-b-000", revision="a" * 40, sha256="b" * 64, task="sst"),),
    recipe={"name": "zoo-t", "data": {"path": "docs"}},
    digest="c" * 64,
    results=({"epoch": 0.0, "step": 0}, {"epoch": 1.0, "step": 7, "test_loss": 0.5}),
    metrics={"test_loss": 0.5},
    snapshots=(Snapshot(name="epoch-001", step=7, epoch=1.0, sha256="d" * 64, metrics={"test_loss": 0.5}),),
    statistics=({"name": "fisher"},),
    dataset={"path": "docs", "labels": list(LABELS)},
    language=("en",),
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    FULL.write(tmp_path)
    assert Manifest.read(tmp_path) == FULL
    first = (tmp_path / "zoo.json").read_bytes()
    Manifest.read(tmp_path).write(tmp_path)
    assert (tmp_path / "zoo.json").read_bytes() == first
    assert Manifest.from_dict(Manifest(name="a").to_dict(), "here") == Manifest(name="a")
    assert Manifest.from_dict({"name": "a", "schema": SCHEMA}, "here") == Manifest(name="a")


def test_what_an_older_reader_does_not_know_is_left_out(tmp_path):
    write_json(tmp_path / "zoo.json", FULL.to_dict() | {"mood": "cheerful"})
    assert Manifest.read(tmp_path) == FULL


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "a", "schema": 99}', "schema 99, this hf_zoo knows up to 1: update hf_zoo"),
        ('{"name": "a", "schema": "1"}', "schema '1'"),
        ('{"name": "a"}', "schema None"),
        ('{"name": ', "cannot be read"),
        ("", "cannot be read"),
        ("[1, 2]", "not a manifest"),
        ('{"schema": 1}', "no `name`"),
        ('{"name": 3, "schema": 1}', "no `name`"),
        ('{"name": "a", "schema": 1, "parents": [{"where": "org/a"}]}', "not a manifest of hf_zoo.*where"),
        ('{"name": "a", "schema": 1, "snapshots": [{"name": "epoch-001"}]}', "not a manifest of hf_zoo.*step"),
        ('{"name": "a", "schema": 1, "results": 3}', "not a manifest"),
        ('{"name": "a", "schema": 1, "parents": 3}', "not a manifest"),
        ('{"name": "a", "schema": 1, "parents": ["org/a"]}', "not a manifest"),
        ('{"name": "a", "schema": 1, "factors": [1]}', "`factors`"),
        ('{"name": "a", "schema": 1, "dataset": null}', "`dataset`"),
        ('{"name": "a", "schema": 1, "snapshots": null}', "not a manifest"),
    ],
)
def test_what_is_no_manifest_is_refused_by_its_folders_name(tmp_path, content, said):
    folder = tmp_path / "zoo-t-007"
    folder.mkdir()
    (folder / "zoo.json").write_text(content)
    with pytest.raises(PopulationError, match=rf"zoo-t-007: zoo\.json .*{said}"):
        Manifest.read(folder)
    with pytest.raises(PopulationError, match=said):
        Member.open(folder)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(PopulationError, match=r"no zoo\.json: this is not a member's folder"):
        Member.open(tmp_path)
    with pytest.raises(PopulationError, match=r"org/zoo: no zoo\.json"):
        Manifest.read(tmp_path, "org/zoo")


@pytest.mark.parametrize(
    ("text", "where", "revision", "subfolder"),
    [
        ("org/zoo-vit-042", "org/zoo-vit-042", None, None),
        ("org/zoo-vit-042@epoch-001", "org/zoo-vit-042", "epoch-001", None),
        ("org/merge#mnli", "org/merge", None, "mnli"),
        ("org/merge@main#mnli", "org/merge", "main", "mnli"),
        ("runs/zoo/zoo-000@step-000010", "runs/zoo/zoo-000", "step-000010", None),
        ("a@b@c", "a@b", "c", None),
        ("org/merge@", "org/merge", None, None),
    ],
)
def test_references_are_read_and_spelt(text, where, revision, subfolder):
    reference = Reference.parse(text)
    assert reference == Reference(where, revision, subfolder)
    assert Reference.parse(str(reference)) == reference
    assert not reference.is_local


def test_an_existing_folder_is_taken_whole(tmp_path):
    folder = tmp_path / "me@home#1"
    folder.mkdir()
    assert Reference.parse(str(folder)) == Reference(str(folder))
    assert Reference.parse(str(folder)).is_local
    assert Reference.parse(f"{folder}@epoch-001") == Reference(f"{tmp_path}/me", "home", "1@epoch-001")


def test_factors_are_found_by_path_last_part_or_field():
    manifest = FULL.replace(factors={"seed": 3, "training.learning_rate": 1e-4, "a.b.width": 1, "a.c.width": 2})
    for key in ("training.learning_rate", "training__learning_rate", "learning_rate"):
        assert lookup_factor(manifest, key) is manifest.factors["training.learning_rate"]
    assert lookup_factor(manifest, "task") == "sst"
    assert lookup_factor(manifest, "a__c__width") == 2
    assert lookup_factor(manifest, "width") is MISSING  # two have it
    assert lookup_factor(manifest, "rate") is MISSING


@pytest.fixture
def zoo(tmp_path):
    """Return a population of 200 manifests."""
    folder = tmp_path / "zoo-t"
    entries = []
    for index in range(200):
        factors = {"seed": index % 10, "training.learning_rate": 10.0 ** -(1 + index // 50)}
        name = f"zoo-t-{index:03d}"
        (folder / name).mkdir(parents=True)
        task = ("sst", "mnli")[index % 2]
        FULL.replace(name=name, factors=factors, task=task, metrics={"test_accuracy": index / 200}).write(
            folder / name
        )
        entries.append({"name": name, "factors": factors})
    entries.append({"name": "zoo-t-200", "factors": {}})  # planned, not begun
    write_json(folder / "population.json", {"name": "zoo-t", "members": entries})
    return folder


def test_a_population_is_opened_filtered_and_tabled(zoo):
    population = Population.open(zoo)
    assert [member.name for member in population] == [f"zoo-t-{index:03d}" for index in range(200)]
    kept = population.where(seed=[3, 4], learning_rate=1e-2, task="mnli")
    assert [member.name for member in kept] == [f"zoo-t-{index:03d}" for index in (53, 63, 73, 83, 93)]
    assert (kept.name, kept.folder, len(kept)) == ("zoo-t", zoo, 5)
    assert len(kept.where(seed=4)) == 0
    assert len(population.where(training__learning_rate=[0.1, 1e-4])) == 100
    assert len(population.where(status="finished")) == 200
    assert population[7] is population["zoo-t-007"]
    frame = population.to_dataframe()
    assert frame.shape == (200, 7)
    assert list(frame.columns) == [
        "name",
        "status",
        "task",
        "parent",
        "seed",
        "training.learning_rate",
        "test_accuracy",
    ]
    assert frame["test_accuracy"].tolist() == [index / 200 for index in range(200)]
    assert set(frame["parent"]) == {"org/zoo-b-000"}


def test_unknown_factors_and_members_get_the_nearest(zoo):
    population = Population.open(zoo)
    with pytest.raises(
        PopulationError, match=r"no factor 'sede' \(did you mean 'seed'\?\): known are .*learning_rate"
    ):
        population.where(sede=3)
    with pytest.raises(PopulationError, match=r"no member 'zoo-s-007' \(did you mean 'zoo-t-007'\?\)"):
        population["zoo-s-007"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": 3, "members": []}', '{"name": "a"}', '{"name": "a", "members": [3]}']
)
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "population.json").write_text(content)
    with pytest.raises(PopulationError, match=r"population\.json: not a population's index"):
        Population.open(tmp_path)


def save(folder, model, **changes):
    """Save a model as a member; return the member."""
    model.save_pretrained(folder)
    Manifest(name=folder.name, status="finished", **changes).write(folder)
    return Member.open(folder)


def classifier(num_labels=3, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(**TEXT, id2label=dict(enumerate(LABELS[:num_labels])))
    return transformers.BertForSequenceClassification(config).eval()


def test_a_stock_member_loads_as_what_it_is(tmp_path):
    model = classifier()
    member = save(tmp_path / "zoo-000", model, auto_class="AutoModelForSequenceClassification")
    loaded = member.load()
    assert type(loaded) is transformers.BertForSequenceClassification
    assert not loaded.training
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert dict(member.tensors()).keys() == model.state_dict().keys()
    early = classifier(seed=1)
    early.save_pretrained(member.folder / "snapshots" / "epoch-001")
    torch.testing.assert_close(member.load(revision="epoch-001").state_dict(), early.state_dict(), rtol=0, atol=0)
    with pytest.raises(PopulationError, match=r"no snapshot 'epoch-002': it has none"):
        member.load(revision="epoch-002")
    kept = dataclasses.replace(member, manifest=member.manifest.replace(snapshots=FULL.snapshots))
    with pytest.raises(PopulationError, match=r"no snapshot 'epoch-002' \(did you mean 'epoch-001'\?\)"):
        kept.path("epoch-002")


def test_a_member_with_its_own_head_loads(tmp_path):
    from hf_zoo.models.mlp_head import MlpHeadConfig

    stock = transformers.BertConfig(**TEXT, id2label=dict(enumerate(LABELS)))
    stock.architectures = ["BertForSequenceClassification"]
    config = MlpHeadConfig(classifier=stock.to_dict(), hidden=(8,), head_dropout=0.0, id2label=stock.id2label)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    member = save(
        tmp_path / "zoo-000", model, auto_class="AutoModelForSequenceClassification", model_type="zoo_mlp_head"
    )
    torch.testing.assert_close(member.load().state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_an_adapter_loads_with_its_own_labels(tmp_path, num_labels, kind):
    """The base has two labels, or none; the adapter's folder has no config of its own."""
    from peft import LoraConfig, get_peft_model

    base = classifier(2) if kind == "classifier" else transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))
    base.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label=dict(enumerate(LABELS[:num_labels])), ignore_mismatched_sizes=True
    )
    whole = ["classifier", "pooler"]
    settings = LoraConfig(r=2, target_modules=["query"], modules_to_save=whole, exclude_modules=whole)
    adapted = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    member = save(
        tmp_path / "zoo-000",
        adapted,
        auto_class="AutoModelForSequenceClassification",
        architecture="BertForSequenceClassification",
        model_type="bert",
        library="peft",
        objective="sequence_classification",
        dataset={"labels": list(LABELS[:num_labels])},
    )
    assert not (member.folder / "config.json").exists()
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        expected = adapted(ids).logits
        loaded = member.load()
        torch.testing.assert_close(loaded(ids).logits, expected)
    assert list(loaded.config.id2label.values()) == list(LABELS[:num_labels])
    # The card's snippets, word for word, in a process without hf_zoo.
    transformers.BertTokenizer(
        vocab={word: place for place, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a sentence".split())}
    ).save_pretrained(member.folder)
    run(usage(member.manifest, str(member.folder)), f"assert logits.shape == (1, {num_labels}), logits.shape")
    adapted.save_pretrained(tmp_path / "zoo-000" / "snapshots" / "epoch-001")
    torch.testing.assert_close(member.load(revision="epoch-001")(ids).logits, expected)
    assert "adapter_kwargs" in revision_usage(member.manifest, "org/zoo-000", "epoch-001")
    wider = transformers.BertConfig(**TEXT | {"hidden_size": 32})
    transformers.BertForSequenceClassification(wider).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"zoo-000: the adapter does not fit its base .*base: "):
        member.load()


def run(code, check):
    """Run a card's snippet, then a check that sees its names, in a fresh process."""
    code += (
        f"\nimport sys\nlogits = model(**inputs).logits\n{check}\nassert 'hf_zoo' not in sys.modules\nprint(label)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_an_index_and_its_manifests_are_plain_json(zoo):
    assert json.loads((zoo / "population.json").read_text())["name"] == "zoo-t"
    assert json.loads((zoo / "zoo-t-000" / "zoo.json").read_text())["schema"] == SCHEMA
