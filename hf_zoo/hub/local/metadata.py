"""What a repo's own files say about it: the card's YAML, the configuration, the headers of the weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_zoo.hub.local.disk import ObjectStore
from hf_zoo.hub.local.records import Commit

MAX_CARD_BYTES = 2 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_YAML_NODES = 50_000
MAX_CACHED_FACTS = 4096
MAX_WEIGHT_FILES = 256

RELATIONS = ("adapter", "merge", "quantized", "finetune")
PIPELINE_TAGS = frozenset(
    "any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation "
    "document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction "
    "image-segmentation image-text-to-text image-to-3d image-to-image image-to-text image-to-video "
    "keypoint-detection mask-generation multiple-choice object-detection other question-answering "
    "reinforcement-learning robotics sentence-similarity summarization table-question-answering "
    "tabular-classification tabular-regression tabular-to-text text-classification text-generation text-ranking "
    "text-retrieval text-to-3d text-to-audio text-to-image text-to-speech text-to-video time-series-forecasting "
    "token-classification translation "
    "unconditional-image-generation video-classification video-text-to-text visual-document-retrieval "
    "visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification "
    "zero-shot-object-detection".split()
)
_TASKS_BY_HEAD = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation",
}
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", re.IGNORECASE)


class CardLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as the Hub's cards use it: dates stay text, since the answers are JSON."""


CardLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Facts:
    """What one commit says about its repo."""

    card: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    library_name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict)  # dtype -> number of weights
    size: int = 0  # bytes of all files


class Catalogue:
    """Read the facts of commits, each once.

    Args:
        objects: Where the files lie.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._facts: dict[tuple[str, str], Facts] = {}

    def facts(self, kind: str, commit: Commit) -> Facts:
        """Return what a commit says, from the cache if it was asked for before."""
        key = (kind, commit.id)
        found = self._facts.get(key)
        if found is None:
            found = self._read(kind, commit)
            if len(self._facts) >= MAX_CACHED_FACTS:
                self._facts.clear()
            self._facts[key] = found
        return found

    def text(self, commit: Commit, path: str, limit: int) -> str | None:
        """Return a text file of a commit, or None if it is missing or larger than `limit` bytes."""
        entry = commit.entries.get(path)
        if entry is None or entry.size > limit:
            return None
        return self._objects.path(entry.sha256).read_bytes().decode("utf-8", "replace")

    def _read(self, kind: str, commit: Commit) -> Facts:
        """Read card, configuration and weight headers."""
        readme = self.text(commit, "README.md", MAX_CARD_BYTES) or ""
        card = front_matter(readme)[0] or {}
        size = sum(entry.size for entry in commit.entries.values())
        tags = _card_tags(card, readme)
        if kind != "model":
            return Facts(card=card, tags=tuple(dict.fromkeys([*tags, "region:us"])), size=size)
        config = self._json(commit, "config.json")
        adapter = self._json(commit, "adapter_config.json")
        library = _text(card.get("library_name")) or _library(config, adapter)
        pipeline = _text(card.get("pipeline_tag")) or _task(config)
        bases = tuple(_texts(card.get("base_model"))) or tuple(_texts(adapter.get("base_model_name_or_path")))
        bases = tuple(base for base in bases if _REPO_ID.fullmatch(base))
        tags = [*([library] if library else []), *_file_tags(commit, config), *([pipeline] if pipeline else []), *tags]
        if bases:
            relation = _relation(card, bases, library)
            tags += [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]
        return Facts(
            card=card,
            tags=tuple(dict.fromkeys([*tags, "region:us"])),
            pipeline_tag=pipeline,
            library_name=library,
            config={key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config},
            base_models=bases,
            parameters=self._parameters(commit),
            size=size,
        )

    def _json(self, commit: Commit, path: str) -> dict[str, Any]:
        """Return a JSON object of a commit; what is none counts as empty, since any file may be pushed."""
        try:
            content = json.loads(self.text(commit, path, MAX_CONFIG_BYTES) or "{}")
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _parameters(self, commit: Commit) -> dict[str, int]:
        """Count the weights in the root's safetensors files by dtype."""
        total: dict[str, int] = {}
        weights = [
            entry
            for path, entry in sorted(commit.entries.items())
            if "/" not in path and path.endswith(".safetensors") and path.startswith(("model", "adapter_model"))
        ]
        for entry in weights[:MAX_WEIGHT_FILES]:
            for dtype, count in safetensors_parameters(self._objects.path(entry.sha256)).items():
                total[dtype] = total.get(dtype, 0) + count
        return total


def front_matter(readme: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return a card's metadata.

    Args:
        readme: The whole card.

    Returns:
        The metadata, None if the card has none or they are no mapping; and what is wrong with them, None if nothing.
    """
    match = _FRONT_MATTER.match(readme)
    if match is None or not match[1].strip():
        return None, None
    try:
        content = yaml.load(match[1], Loader=CardLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return None, f"The YAML between the '---' lines cannot be read: {error}"
    if not isinstance(content, dict):
        return None, f"The YAML between the '---' lines must be a mapping, not {type(content).__name__}."
    return _checked_json(content)


def without_front_matter(readme: str) -> str:
    """Return a card's text alone."""
    return _FRONT_MATTER.sub("", readme, count=1)


def safetensors_parameters(path: Path) -> dict[str, int]:
    """Count the weights of a safetensors file by dtype; a file that is none counts as empty."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return {}
        try:
            header = json.loads(file.read(length))
            counts: dict[str, int] = {}
            for name, tensor in header.items():
                if name != "__metadata__":
                    counts[str(tensor["dtype"])] = counts.get(str(tensor["dtype"]), 0) + math.prod(tensor["shape"])
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return {}
    return counts


def _checked_json(content: dict[Any, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """Turn YAML's values into JSON's; refuse aliases that unfold without end and numbers JSON has not."""
    budget = MAX_YAML_NODES

    def convert(value: Any, depth: int) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > 64:
            raise ValueError("the metadata are too large or too deep")
        if isinstance(value, dict):
            return {str(key): convert(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [convert(inner, depth + 1) for inner in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if value is None or isinstance(value, (str, int, float)):
            return value
        return str(value)

    try:
        return convert(content, 0), None
    except ValueError as error:
        return None, f"The YAML between the '---' lines cannot be used: {error}."


def _card_tags(card: Mapping[str, Any], readme: str) -> list[str]:
    """Derive search tags from a card as the Hub does."""
    tags = [*_texts(card.get("tags"))]
    tags += [f"dataset:{name}" for name in _texts(card.get("datasets"))]
    tags += _texts(card.get("language"))
    tags += [f"license:{name}" for name in _texts(card.get("license"))]
    if card.get("model-index"):
        tags.append("model-index")
    tags += [f"arxiv:{number}" for number in _ARXIV.findall(readme)]
    for key in ("task_categories", "size_categories"):
        tags += [f"{key}:{name}" for name in _texts(card.get(key))]
    return tags


def _file_tags(commit: Commit, config: Mapping[str, Any]) -> list[str]:
    """Derive tags from what lies in the repo."""
    tags = []
    for suffix, tag in ((".safetensors", "safetensors"), (".bin", "pytorch"), (".onnx", "onnx"), (".gguf", "gguf")):
        if any(path.endswith(suffix) and (tag != "pytorch" or "pytorch_model" in path) for path in commit.entries):
            tags.append(tag)
    if "training_args.bin" in commit.entries:
        tags.append("trainer")
    if _text(config.get("model_type")):
        tags.append(config["model_type"])
    if config.get("auto_map"):
        tags.append("custom_code")
    return tags


def _library(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str | None:
    """Name the library a repo is for when its card does not."""
    if adapter:
        return "peft"
    if "model_type" in config or "transformers_version" in config:
        return "transformers"
    return "timm" if "pretrained_cfg" in config else None


def _task(config: Mapping[str, Any]) -> str | None:
    """Name the task of a model's head when the card does not."""
    for architecture in _texts(config.get("architectures")):
        for suffix, task in _TASKS_BY_HEAD.items():
            if architecture.endswith(suffix):
                return task
    return None


def _relation(card: Mapping[str, Any], bases: tuple[str, ...], library: str | None) -> str:
    """Say how a model comes from its bases, inferring it as the Hub does."""
    stated = card.get("base_model_relation")
    if stated in RELATIONS:
        return str(stated)
    if len(bases) > 1 or "merge" in _texts(card.get("tags")):
        return "merge"
    return "adapter" if library == "peft" else "finetune"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: Any) -> list[str]:
    """Return one string or several as a list; anything else is nothing."""
    if isinstance(value, str):
        return [value] if value else []
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []
