"""A card's metadata: what the Hub searches, links and shows beside the card, derived from the manifest alone."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_zoo.population import Manifest

SPLITS = ("train", "validation", "test")

_TAG_OF_OBJECTIVE = {
    "image_classification": "image-classification",
    "contrastive": "image-feature-extraction",
    "masked_lm": "fill-mask",
    "sequence_classification": "text-classification",
}
_TAG_OF_AUTO_CLASS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
}
_IMAGE_OBJECTIVES = frozenset({"image_classification", "contrastive"})
_IMAGE_TYPES = re.compile(r"vit|deit|dino|swin|resnet|convnext|beit|timm|clip_vision|mobilenet|efficientnet|regnet")

_ORDER = (
    "language",
    "license",
    "library_name",
    "pipeline_tag",
    "tags",
    "datasets",
    "base_model",
    "base_model_relation",
    "metrics",
)

# Our names of metrics -> those of https://hf.co/metrics.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews_correlation": "matthews_correlation",
    "perplexity": "perplexity",
}


def card_metadata(manifest: Manifest) -> ModelCardData:
    """Return the metadata of a member's or a merge's card, only with keys the Hub knows.

    Args:
        manifest: What is known of the model.

    Returns:
        The metadata; equal manifests give equal YAML.
    """
    results = evaluation_results(manifest)
    bases = hub_parents(manifest)
    metrics = [_HUB_METRICS[name] for name in _HUB_METRICS if any(result.metric_type == name for result in results)]
    return ModelCardData(
        language=list(manifest.language) or None,
        license=manifest.license,
        library_name=library_name(manifest),
        pipeline_tag=pipeline_tag(manifest),
        tags=tags(manifest),
        datasets=hub_datasets(manifest) or None,
        base_model=(bases[0] if len(bases) == 1 and manifest.kind != "merge" else bases) or None,
        base_model_relation=_relation(manifest) if bases else None,
        metrics=metrics or None,
        model_name=manifest.name if results else None,
        eval_results=results or None,
    )


def metadata_yaml(manifest: Manifest) -> str:
    """Return the metadata as the YAML block of a card, without its rules."""
    return card_metadata(manifest).to_yaml(original_order=list(_ORDER))


def tags(manifest: Manifest) -> list[str]:
    """Return the tags by which a population, a task or a method is found on a Hub."""
    found = ["hf_zoo", "model-zoo"]
    if manifest.kind == "merge":
        found += ["merge", str(manifest.method["name"])] if manifest.method.get("name") else ["merge"]
    if manifest.population:
        found.append(f"population:{manifest.population}")
    for task in manifest.tasks or ((manifest.task,) if manifest.task else ()):
        found.append(f"task:{task}")
    if manifest.objective:
        found.append(manifest.objective)
    if is_timm(manifest):
        found.append("timm")
    if manifest.model_type:
        found.append(manifest.model_type)
    return list(dict.fromkeys(found))


def is_image_model(manifest: Manifest) -> bool:
    """Whether it takes images rather than text."""
    if manifest.objective:
        return manifest.objective in _IMAGE_OBJECTIVES
    if manifest.auto_class and manifest.auto_class != "AutoModel":
        return "Image" in manifest.auto_class
    return bool(_IMAGE_TYPES.search(manifest.model_type or ""))


def is_timm(manifest: Manifest) -> bool:
    """Whether the network is one of timm's."""
    return manifest.library == "timm" or (manifest.model_type or "").startswith("timm")


def library_name(manifest: Manifest) -> str:
    """Return the library whose snippet the Hub shows: a timm net in its wrapper is loaded by transformers."""
    return "transformers" if is_timm(manifest) else manifest.library


def pipeline_tag(manifest: Manifest) -> str | None:
    """Return the Hub's name for what the model does."""
    if manifest.kind == "merge" and manifest.auto_class == "AutoModel":
        return "image-feature-extraction" if is_image_model(manifest) else "feature-extraction"
    if manifest.objective in _TAG_OF_OBJECTIVE:
        return _TAG_OF_OBJECTIVE[manifest.objective]
    if manifest.auto_class in _TAG_OF_AUTO_CLASS:
        return _TAG_OF_AUTO_CLASS[manifest.auto_class]
    if manifest.auto_class is None:
        return None
    return "image-feature-extraction" if is_image_model(manifest) else "feature-extraction"


def hub_parents(manifest: Manifest) -> list[str]:
    """Return the parents that are repos of a Hub, members before the base, each once."""
    ordered = sorted(manifest.parents, key=lambda parent: parent.role == "base")
    return list(dict.fromkeys(parent.repo for parent in ordered if "/" in parent.repo))


def hub_datasets(manifest: Manifest) -> list[str]:
    """Return the Hub ids of the data; embedded sets and local files have none."""
    ids = []
    for dataset in manifest.dataset.values() if manifest.kind == "merge" else [manifest.dataset]:
        path, source = (dataset.get("path"), dataset.get("source")) if isinstance(dataset, dict) else (None, None)
        is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))
        if path and is_id and (source == "hub" or (source is None and "/" in path)):
            ids.append(path)
    return list(dict.fromkeys(ids))


def evaluation_results(manifest: Manifest) -> list[EvalResult]:
    """Return what was measured on held-out splits, one entry a split and metric, for the Hub's `model-index`."""
    task_type = pipeline_tag(manifest) or "other"
    if manifest.kind == "merge" and manifest.auto_class == "AutoModel":  # the heads in the sub-folders were measured
        task_type = "image-classification" if is_image_model(manifest) else "text-classification"
    found = []
    for task, record in _own_records(manifest):
        dataset = manifest.dataset if task is None else manifest.dataset.get(task)
        path = dataset.get("path") if isinstance(dataset, dict) else None
        name = task or manifest.task or path or "unknown"
        for split in SPLITS[1:]:
            for metric in _HUB_METRICS:
                value = record.get(f"{split}_{metric}")
                if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                    continue
                found.append(
                    EvalResult(
                        task_type=task_type,
                        dataset_type=str(path or name),
                        dataset_name=str(name),
                        dataset_split=split,
                        metric_type=metric,
                        metric_name=f"{split} {metric.replace('_', ' ')}",
                        metric_value=round(float(value), 6),
                    )
                )
    return found


def _own_records(manifest: Manifest) -> list[tuple[str | None, dict[str, Any]]]:
    if manifest.kind != "merge":
        return [(None, manifest.metrics)]
    return [(r.get("task"), r) for r in manifest.results if r.get("model") in {manifest.name, "merge"}]


def _relation(manifest: Manifest) -> str:
    if manifest.kind == "merge":
        return "merge"
    return "adapter" if manifest.library == "peft" else "finetune"
