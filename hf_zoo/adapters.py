"""PEFT adapters read as whole models: every tensor of the base, plus what the adapter adds to it.

Merging the factors of low-rank adapters is not merging the adapters: B1 A1 + B2 A2 is not (B1 + B2)(A1 + A2).
So a member that is an adapter takes part with its weights W + scale * B A, made tensor by tensor when they are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_zoo.checkpoint import ADAPTER_CONFIG_FILE, CheckpointReader
from hf_zoo.errors import CheckpointError, ModelError
from hf_zoo.population import MANIFEST_FILE, Manifest, Reference
from hf_zoo.shards import TensorInfo, read_header
from hf_zoo.structure import Structure, class_of, disk_name_of, find_class, skeleton

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the meaning of the factors; an adapter with any of these is refused, not read wrongly.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters",
               "trainable_token_indices", "layer_replication", "megatron_config")  # fmt: skip
FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def open_adapter(folder: Path, source: str) -> CheckpointReader:
    """Open an adapter on its base as one model, under the names that model would be saved with.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        source: Whose it is, for messages.

    Raises:
        CheckpointError: If it is no plain LoRA, or does not fit its base.
        ModelError: If its base cannot be found.
    """
    settings = _settings(folder, source)
    model_class, config = class_of_adapter(folder)
    model = skeleton(model_class, config)
    structure = Structure.of(model_class, config)
    base = CheckpointReader.open(base_folder(folder), f"{source}, its base")
    where = _names_in_base(structure, base, Structure.read(base_folder(folder)))
    tensors = _adapter_tensors(folder, source)
    inside = {own: name for name, own in disk_name_of(model).items() if own is not None}
    layout: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    for own in [*structure.trunk, *structure.head]:
        memory = inside.get(own)
        if memory in tensors:
            layout[own], files[own] = TensorInfo.of(tensors[memory]), folder / ADAPTER_FILE
        elif own in where:
            layout[own], files[own] = base.layout[where[own]], folder / ADAPTER_FILE
        else:
            raise CheckpointError(f"{source}: tensor {own!r} is neither in the adapter nor in its base")
    factors = _factors(tensors, inside, source)

    def read(own: str) -> Tensor:
        memory = inside.get(own)
        if memory in tensors:
            return tensors[memory]
        tensor = base[where[own]]
        if own not in factors:
            return tensor
        down, up = factors[own]
        update = _update(tensors[down], tensors[up], tensor, settings, down)
        return (tensor.float() + update).to(tensor.dtype)

    return CheckpointReader(source, layout, read, files)


def class_of_adapter(folder: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class and config of the model an adapter and its base make up.

    The folder's own `config.json` says it; else the manifest's architecture and labels on the base's config.

    Raises:
        ModelError: If neither says it.
    """
    if (folder / "config.json").is_file():
        return class_of(folder)
    base = base_folder(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return class_of(base)
    manifest = Manifest.read(folder)
    config = AutoConfig.from_pretrained(base)
    labels = manifest.dataset.get("labels") or ()
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    config.architectures = [manifest.architecture]
    return find_class(manifest.architecture, str(folder)), config


def load_adapter(auto_class: Any, folder: Path, labels: Sequence[str], **kwargs: Any) -> PreTrainedModel:
    """Load an adapter on its base through a stock Auto class.

    Args:
        auto_class: The Auto class.
        folder: The adapter's folder, which has no config of its own.
        labels: Its classes, of which the base's config knows nothing; none for a language model.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        CheckpointError: If the adapter does not fit the base.
    """
    if labels:
        kwargs.setdefault("id2label", dict(enumerate(labels)))
        kwargs.setdefault("label2id", {label: index for index, label in enumerate(labels)})
    # The base's head may have another width: the adapter brings its own. What does not fit of the adapter is reported.
    model, info = auto_class.from_pretrained(
        str(folder), ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
    )
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for keys in info.values() for key in keys)
    if wrong:
        named = ", ".join(wrong[:3])
        raise CheckpointError(f"{folder}: the adapter does not fit its base {base_folder(folder)}: {named}")
    return model


def base_folder(folder: Path) -> Path:
    """Return the folder of an adapter's base, fetched where it is on a Hub.

    Raises:
        ModelError: If it cannot be found.
        HubError: If a Hub does not give it.
    """
    settings = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        raise ModelError(f"{folder}: {ADAPTER_CONFIG_FILE} does not say its base (`base_model_name_or_path`)")
    for place in (Path(name), folder / name):
        if place.is_dir():
            return place
    reference = Reference(name, revision)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ModelError(f"{folder}: its base {name} is not there: move it back, or correct `base_model_name_or_path`")
    from hf_zoo.hub.client import fetch_repo

    return fetch_repo(reference.where, reference.revision)


def _settings(folder: Path, source: str) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    except ValueError as error:
        raise CheckpointError(f"{source}: {ADAPTER_CONFIG_FILE} is not JSON: {error}") from error
    odd = [key for key in UNSUPPORTED if settings.get(key)]
    if settings.get("peft_type") != "LORA" or odd:
        kind = f"{settings.get('peft_type')}" + (f" with {', '.join(odd)}" if odd else "")
        raise CheckpointError(
            f"{source}: an adapter of type {kind}; only plain LoRA is read: merge it into its base with peft's "
            "`merge_and_unload` and name the result"
        )
    return settings


def _adapter_tensors(folder: Path, source: str) -> dict[str, Tensor]:
    """Return the adapter's tensors by module names; they are small and all are kept."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{source}: no {ADAPTER_FILE}")
    read_header(path)
    with safe_open(path, framework="pt") as file:
        return {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}


def _names_in_base(structure: Structure, base: CheckpointReader, other: Structure) -> dict[str, str]:
    """Return the model's names -> those of the base, whatever head the base has."""
    by_trunk_name = {alone: own for own, alone in other.trunk.items()}
    where = {own: by_trunk_name[alone] for own, alone in structure.trunk.items() if alone in by_trunk_name}
    return where | {own: own for own in structure.head if own in base}


def _factors(tensors: Mapping[str, Tensor], inside: Mapping[str, str], source: str) -> dict[str, tuple[str, str]]:
    """Return name on disk -> the names of its two factors; every factor has to find its tensor."""
    own_of = {memory: own for own, memory in inside.items()}
    found = {}
    for down in tensors:
        for first, second in FACTORS:
            if f".{first}" not in down:
                continue
            up = down.replace(f".{first}", f".{second}")
            memory = down.partition(f".{first}")[0] + ".weight"
            if memory not in own_of or up not in tensors:
                raise CheckpointError(f"{source}: {down!r} belongs to no tensor that is stored as one in the model")
            found[own_of[memory]] = (down, up)
    return found


def _update(down: Tensor, up: Tensor, weight: Tensor, settings: Mapping[str, Any], name: str) -> Tensor:
    """Return scale * B A in float32, in the weight's shape."""
    module = name.partition(".lora_")[0]
    rank = down.shape[0]
    alpha = _of_module(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    down, up = down.float(), up.float()
    if weight.dim() == 4:
        if up.shape[2:] != (1, 1):
            raise CheckpointError(f"{name!r} adapts a convolution in a way that is not known here")
        update = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    else:
        update = up @ down
        if settings.get("fan_in_fan_out") or ".lora_embedding" in name:
            update = update.T
    if update.shape != weight.shape:
        raise CheckpointError(f"{name!r}: the update is {list(update.shape)}, the weight {list(weight.shape)}")
    return update * scale


def _of_module(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return a module's own value where a pattern names it, as peft does."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
            return value
    return default
