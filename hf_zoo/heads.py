"""Trunk and head of a model in memory, under the names its modules have.

`hf_zoo.structure` answers the same question for models on disk, where names differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel


def trunk_module(model: nn.Module) -> nn.Module:
    """Return the module below the head; for timm nets, which hold their classifier inside, the whole net."""
    return stock_model(model).base_model


def stock_model(model: Any) -> PreTrainedModel:
    """Return the library's own model behind an adapter or a multi-layer head."""
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    return getattr(model, "inner", model)


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the state-dict entries outside the trunk."""
    trunk = set(trunk_names(model))
    return [name for name in model.state_dict() if name not in trunk]


def trunk_names(model: nn.Module) -> list[str]:
    """Return the names of the state-dict entries of the trunk."""
    stock = stock_model(model)
    base = stock.base_model
    if isinstance(base, PreTrainedModel):
        prefix = prefix_of(model, base)
        return [name for name in model.state_dict() if name.startswith(prefix)]
    with torch.device("meta"):
        alone = set(AutoModel.from_config(stock.config).state_dict())
    prefix = prefix_of(model, stock)
    return [name for name in model.state_dict() if name.removeprefix(prefix) in alone]


def prefix_of(model: nn.Module, part: nn.Module) -> str:
    """Return what the names of a part's tensors begin with inside a model, `bert.` or nothing."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""
