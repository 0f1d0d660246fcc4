"""A parent's weights into a child: every tensor of the trunk, strictly, and on request the head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zoo.checkpoint import verify_weights
from hf_zoo.errors import ModelError
from hf_zoo.heads import head_names, prefix_of, trunk_module, trunk_names
from hf_zoo.recipe.schema import TrainRecipe
from hf_zoo.structure import class_of


def load_trunk(model: PreTrainedModel, folder: Path, recipe: TrainRecipe) -> dict[str, Any]:
    """Copy a parent's trunk, and on request its head, into a model; nothing of it may be left over or missing.

    A whole sub-module that only one of the two has (BERT's pooler, which language models lack) is the one exception.
    """
    verify_weights(folder)
    parent = _open_parent(folder, recipe)
    source, target = _relative(parent), _relative(model)
    loaded, fresh, dropped = _match(source, target, str(recipe.parent))
    state = model.state_dict()
    names = dict(zip(target, trunk_names(model), strict=True))
    with torch.no_grad():
        for key in loaded:
            state[names[key]].copy_(source[key])
    head_loaded: list[str] = []
    # A language model that goes on keeps its head: it is what the next token is told by.
    if recipe.model.head.reuse or recipe.objective.mode == "continued":
        head_loaded = _reuse_head(model, parent, str(recipe.parent))
    head = [name for name in head_names(model) if name not in head_loaded]
    return {
        "loaded": len(loaded) + len(head_loaded),
        "fresh": sorted({_module_of(key) for key in fresh} | {_module_of(key) for key in head}),
        "dropped": sorted({_module_of(key) for key in dropped}),
        "head": "parent" if head_loaded else "fresh",
    }


def _open_parent(folder: Path, recipe: TrainRecipe) -> PreTrainedModel:
    model_class, _ = class_of(folder)
    loaded: Any = model_class.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ModelError(f"parent {recipe.parent}: weights and config disagree on {', '.join(wrong[:5])}")
    return model


def _relative(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trunk's tensors under names that do not depend on what is wrapped around it."""
    state, prefix = model.state_dict(), prefix_of(model, trunk_module(model))
    return {name.removeprefix(prefix): state[name] for name in trunk_names(model)}


def _match(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], parent: str
) -> tuple[list[str], list[str], list[str]]:
    """Return the trunk's common tensors, and those only the target or only the source has, as whole sub-modules."""
    loaded = [key for key in target if key in source]
    fresh, dropped = [k for k in target if k not in source], [k for k in source if k not in target]
    shapes = [
        f"{key}: parent {tuple(source[key].shape)}, model {tuple(target[key].shape)}"
        for key in loaded
        if source[key].shape != target[key].shape
    ]
    shared = {key.partition(".")[0] for key in loaded}
    torn = [key for key in (*fresh, *dropped) if key.partition(".")[0] in shared]
    if not loaded or torn or shapes:
        detail = shapes or [f"only one of the two has {key}" for key in torn] or ["no tensor in common"]
        more = f" (and {len(detail) - 3} more)" if len(detail) > 3 else ""
        raise ModelError(
            f"parent {parent} does not fit the model: {'; '.join(detail[:3])}{more}. "
            "Leave model.type and model.config out to take the parent's architecture, or choose another parent"
        )
    return loaded, fresh, dropped


def _reuse_head(model: PreTrainedModel, parent: PreTrainedModel, label: str) -> list[str]:
    state, other = model.state_dict(), parent.state_dict()
    names = head_names(model)
    unlike = [name for name in names if name not in other or other[name].shape != state[name].shape]
    if unlike:
        raise ModelError(
            f"model.head.reuse: the head of parent {label} does not fit ({', '.join(unlike[:3])}): set it to "
            "false, or give the data the parent's labels"
        )
    with torch.no_grad():
        for name in names:
            state[name].copy_(other[name])
    return names


def _module_of(key: str) -> str:
    return key.rpartition(".")[0] or key
