"""Real but tiny populations on disk, as training leaves them: weights, tokenizer, snapshots, manifest and card."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_zoo.files import weights_digest, write_json
from hf_zoo.hub.cards import write_card
from hf_zoo.population import RESULTS_FILE, SNAPSHOT_FOLDER, Manifest, Parent, Snapshot

SPLITS = ("train_", "validation_", "test_")
LABELS = ("negative", "positive")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a sentence to classify and second one . return the of list".split(),
]


def seeded(name):
    return torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))


def write_bert(folder):
    """Write a BERT classifier of a few hundred parameters with its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, id2label=dict(enumerate(LABELS)), label2id={v: k for k, v in enumerate(LABELS)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)


def write_weights(source, target, name):
    """Write the weights of `source` with a seeded change, so that every member and moment has its own."""
    tensors = load_file(source)
    generator = seeded(name)
    changed = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(changed, target, metadata={"format": "pt"})


def records(num_epochs):
    return tuple(
        {"epoch": epoch, "step": 10 * epoch, "learning_rate": 1e-3, "train_loss": 0.7 / (epoch + 1),
         "validation_loss": 0.8 / (epoch + 1), "validation_accuracy": 1 - 0.5 / (epoch + 1),
         "test_loss": 0.9 / (epoch + 1), "test_accuracy": 1 - 0.55 / (epoch + 1)}
        for epoch in range(num_epochs + 1)
    )  # fmt: skip


def write_member(folder, base, population, index=0, num_epochs=2, parents=(), **changes):
    """Write one finished member with a snapshot an epoch, the untrained network among them."""
    name = folder.name
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    results = records(num_epochs)
    snapshots = []
    for record in results:
        place = folder / SNAPSHOT_FOLDER / f"epoch-{record['epoch']:03d}"
        write_weights(base / "model.safetensors", place / "model.safetensors", f"{name} {record['epoch']}")
        shutil.copy(base / "config.json", place)
        snapshots.append(
            Snapshot(
                name=place.name,
                step=record["step"],
                epoch=record["epoch"],
                sha256=weights_digest(place),
                metrics={
                    key: value for key, value in record.items() if key.startswith(("train_", "validation_", "test_"))
                },
            )
        )
    shutil.copy(place / "model.safetensors", folder)
    (folder / RESULTS_FILE).write_text("".join(json.dumps(record) + "\n" for record in results))
    manifest = Manifest(
        name=name, population=population, status="finished", objective="sequence_classification", task="sst",
        factors={"seed": index, "training.learning_rate": 10.0 ** -(2 + index % 3)}, parents=tuple(parents),
        recipe={"name": population, "objective": {"name": "sequence_classification"}}, digest="0" * 64,
        results=results, metrics=snapshots[-1].metrics, snapshots=tuple(snapshots), sha256=weights_digest(folder),
        dataset={"path": "docs-sentences", "source": "embedded", "labels": list(LABELS)},
        auto_class="AutoModelForSequenceClassification", architecture="BertForSequenceClassification",
        model_type="bert",
        num_parameters=sum(value.numel() for value in load_file(folder / "model.safetensors").values()),
        versions={"torch": "2"},
    ).replace(**changes)  # fmt: skip
    manifest.write(folder)
    write_card(folder)
    # What training may leave behind and nobody else should see.
    (folder / ".training").mkdir()
    (folder / ".training" / "optimizer.pt").write_bytes(b"moments")
    return manifest


def write_population(folder, base, num_members=2, **options):
    """Write a population of finished members and return their manifests."""
    names = [f"{folder.name}-{index:03d}" for index in range(num_members)]
    manifests = [write_member(folder / name, base, folder.name, index, **options) for index, name in enumerate(names)]
    members = [{"name": manifest.name, "factors": manifest.factors} for manifest in manifests]
    write_json(folder / "population.json", {"name": folder.name, "recipe": {}, "digest": "0" * 64, "members": members})
    return manifests


def parent_of(manifest, revision=None):
    """Return the entry a child's manifest has for a local parent."""
    sha256 = next((kept.sha256 for kept in manifest.snapshots if kept.name == revision), manifest.sha256)
    return Parent(repo=manifest.name, revision=revision, sha256=sha256)


def state_of(folder: Path):
    """Return path -> bytes of everything in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
