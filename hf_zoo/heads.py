"""Trunk and head of a model in memory, under the names its modules have.

`hf_zoo.structure` answers the same question for models on disk, where names differ.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def trunk_module(model: nn.Module) -> nn.Module:
    """Return the module below the head.

    That is the library's `base_model`; where this is the whole model, its only part that `AutoModel` loads by itself.
    Where there is none, as in timm nets, which hold their classifier inside, it is the whole model or net.
    """
    stock = stock_model(model)
    if stock.base_model is not stock or auto_model_class(stock.config) in (None, type(stock)):
        return stock.base_model
    parts = [child for child in stock.children() if isinstance(child, PreTrainedModel)]
    if len(parts) == 1 and auto_model_class(parts[0].config) is type(parts[0]):
        return parts[0]
    return stock


def stock_model(model: Any) -> PreTrainedModel:
    """Return the library's own model behind an adapter or a multi-layer head."""
    if is_adapted(model):
        model = model.get_base_model()
    return getattr(model, "inner", model)


def is_adapted(model: nn.Module) -> bool:
    """Whether peft has put an adapter around a model, and names of its own among the tensors'."""
    return hasattr(model, "get_base_model")


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the state-dict entries outside the trunk."""
    trunk = set(trunk_names(model))
    return [name for name in model.state_dict() if name not in trunk]


def trunk_names(model: nn.Module, alone: PreTrainedModel | None = None) -> list[str]:
    """Return the names of the state-dict entries of the trunk.

    What a trunk alone has no place for, such as the mask token of masked image models, belongs to the head.

    Args:
        model: The model.
        alone: Its `trunk_skeleton`, where it has been built already.
    """
    prefix, alone = trunk_prefix(model), alone or trunk_skeleton(model)
    names = [name for name in model.state_dict() if name.startswith(prefix)]
    if type(alone) is type(stock_model(model)) or (
        is_adapted(model) and isinstance(trunk_module(model), PreTrainedModel)
    ):
        return names
    known = set(alone.state_dict())
    return [name for name in names if name.removeprefix(prefix) in known]


def trunk_prefix(model: nn.Module) -> str:
    """Return what a trunk tensor is called inside a model before its name in the trunk alone, `bert.` or nothing."""
    part = trunk_module(model)
    return prefix_of(model, part if isinstance(part, PreTrainedModel) else stock_model(model))


def trunk_skeleton(model: nn.Module) -> PreTrainedModel:
    """Build the trunk a model would be without its head, as `AutoModel` does; it has no storage.

    A model that has all or none of its tensors in common with what `AutoModel` loads is a trunk itself.
    """
    stock, part = stock_model(model), trunk_module(model)
    if part is not stock and isinstance(part, PreTrainedModel) and hasattr(transformers, type(part).__name__):
        return skeleton(type(part), part.config)
    own = part if isinstance(part, PreTrainedModel) else stock
    model_class = auto_model_class(own.config)
    if model_class not in (None, type(stock)):
        alone = skeleton(model_class, own.config)
        known, names = set(alone.state_dict()), set(own.state_dict())
        if own is not stock or (known & names and names - known):
            return alone
    return skeleton(type(stock), stock.config)


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without storage: names, shapes and types, and nothing else."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def auto_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class `AutoModel` loads for a config; null where it knows none."""
    mapping = AutoModel._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def prefix_of(model: nn.Module, part: nn.Module) -> str:
    """Return what the names of a part's tensors begin with inside a model, `bert.` or nothing."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""
