"""Manifests that cards are rendered from in tests, and cards taken apart as their readers do."""

import re

import yaml
from tiny_zoo import records

from hf_zoo.population import Manifest, Parent, Snapshot

# What the Hub reads of a model card's metadata; anything else would be written for nobody.
HUB_KEYS = {
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link",
    "license_name", "metrics", "model-index", "new_version", "pipeline_tag", "tags",
}  # fmt: skip
# Values that would break out of a table, a code span, a fence or the metadata where they were not escaped.
NASTY = [
    "a|b", "a\\|b", "line\nbreak", "`tick`", "``two", "`", "| --- |", "<script>alert(1)</script>", "[x](y)", "**b**",
    "{{ 7 * 7 }}", "{% raw %}", "---\ntags: [x]\n---", "```\n# out", "", " ", "\u2028", "\x00", "a\tb", "ä 漢字", "\\",
]  # fmt: skip


def member(**changes):
    results = records(2)
    return Manifest(
        name="zoo-vit-042",
        population="zoo-vit",
        status="finished",
        objective="image_classification",
        task="digits",
        description="Small vision transformers on handwritten digits.",
        factors={"seed": 2, "training.learning_rate": 1e-3, "augmentation.mixup": 0.2},
        parents=(Parent(repo="org/zoo-simclr-003", revision="a" * 40, sha256="b" * 64),),
        recipe={
            "data": {"path": "digits"},
            "model": {"config": {"num_channels": 1}, "type": "vit"},
            "name": "zoo-vit",
            "objective": {"name": "image_classification"},
        },
        digest="c" * 64,
        results=results,
        metrics={key: value for key, value in results[-1].items() if "_loss" in key or "_accuracy" in key},
        snapshots=tuple(
            Snapshot(name=f"epoch-{epoch:03d}", step=10 * epoch, epoch=epoch, sha256="d" * 64) for epoch in range(3)
        ),
        dataset={"path": "digits", "source": "embedded", "labels": list("0123456789"), "num_samples": {"train": 1200}},
        loading={"loaded": 38, "fresh": ["classifier.bias", "classifier.weight"], "dropped": []},
        auto_class="AutoModelForImageClassification",
        architecture="ViTForImageClassification",
        model_type="vit",
        num_parameters=45322,
        sha256="e" * 64,
        versions={"torch": "2.15.0", "hf_zoo": "0.1.0"},
        license="apache-2.0",
        language=("en",),
    ).replace(**changes)


def merge(**changes):
    scores = {
        ("org/a", "sst"): 0.91,
        ("org/b", "mnli"): 0.72,
        ("merge-sst-mnli", "sst"): 0.88,
        ("merge-sst-mnli", "mnli"): 0.7,
    }
    return Manifest(
        name="merge-sst-mnli",
        population="zoo-bert-tasks",
        kind="merge",
        status="finished",
        objective="sequence_classification",
        tasks=("sst", "mnli"),
        parents=(
            Parent(repo="org/a", revision="1" * 40, sha256="2" * 64, role="member", task="sst"),
            Parent(repo="org/b", revision="3" * 40, sha256="4" * 64, role="member", task="mnli"),
            Parent(repo="org/base", revision="5" * 40, sha256="6" * 64, role="base"),
        ),
        recipe={"method": "ties", "name": None, "members": ["org/a", "org/b"]},
        digest="7" * 64,
        results=tuple(
            {"task": task, "model": model, "validation_accuracy": value, "validation_loss": 1 - value}
            for (model, task), value in scores.items()
        ),
        metrics={"validation_accuracy": 0.79, "validation_loss": 0.21},
        dataset={
            "sst": {"path": "stanfordnlp/sst2", "source": "hub", "num_samples": {"validation": 872}},
            "mnli": {"path": "docs-pairs", "source": "embedded"},
        },
        loading={"heads": "one a task, in sub-folders"},
        method={
            "name": "ties", "description": "Trim, elect signs, and average what agrees.", "title": "TIES-Merging",
            "paper": "Yadav et al. (2023)", "url": "https://arxiv.org/abs/2306.01708", "parameters": {"density": 0.2},
            "report": {"accepted": ["org/a"]},
        },
        auto_class="AutoModel",
        architecture="BertModel",
        model_type="bert",
        num_parameters=4_000_000,
        sha256="8" * 64,
    ).replace(**changes)  # fmt: skip


def metadata_of(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def snippets_of(card):
    return [found[2] for found in re.finditer(r"^(`{3,})python\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)]


def rows_of(card, heading):
    """Return the cells of the first table after a heading, split as GitHub's Markdown splits them."""
    lines = card.partition(heading)[2].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def outside_fences(card):
    inside, ticks = False, ""
    for line in card.splitlines():
        marks = re.match(r"`{3,}", line)
        if marks and not inside:
            inside, ticks = True, marks[0]
        elif inside and line == ticks:
            inside = False
        elif not inside:
            yield line


def without_code(card):
    body = card.split("\n---\n", 1)[1]
    for line in outside_fences(body):
        yield re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line).replace("\\<", "")
