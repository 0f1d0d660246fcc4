"""A stock classifier whose last linear layer is a multi-layer perceptron.

This file travels with the repo of every model that uses it, so it imports nothing but torch and transformers. Load
such a repo with `AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)` (or
`AutoModelForSequenceClassification`), or without that flag after `import hf_zoo.models.mlp_head`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)


class MlpHeadConfig(PreTrainedConfig):
    """Describe a stock classifier and the hidden layers put before its output.

    Args:
        classifier: The stock model's config, as a mapping with its `model_type`.
        hidden: Widths of the hidden layers.
        head_dropout: Dropout probability before each layer of the head, in [0, 1).
        **kwargs: Passed to `PreTrainedConfig` (`num_labels`, `id2label`, ...).
    """

    model_type = "zoo_mlp_head"

    def __init__(
        self,
        classifier: dict[str, Any] | None = None,
        hidden: list[int] | tuple[int, ...] = (),
        head_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.classifier = dict(classifier or {})
        self.hidden = list(hidden)
        self.head_dropout = head_dropout
        super().__init__(**kwargs)

    def stock_config(self) -> PreTrainedConfig:
        """Return the stock model's config, with this one's labels."""
        values = {key: value for key, value in self.classifier.items() if key != "model_type"}
        config = AutoConfig.for_model(self.classifier["model_type"], **values)
        config.id2label, config.label2id = self.id2label, self.label2id
        return config


class _MlpHeadModel(PreTrainedModel):
    config_class = MlpHeadConfig
    base_model_prefix = "inner"
    supports_gradient_checkpointing = True
    auto_class_of_inner: Any = None

    def __init__(self, config: MlpHeadConfig) -> None:
        super().__init__(config)
        self.inner = self.auto_class_of_inner.from_config(config.stock_config())
        outputs = len(config.id2label or ())
        name, last = output_layer(self.inner, outputs)
        parent, _, child = name.rpartition(".")
        head = _perceptron([last.in_features, *config.hidden, outputs], config.head_dropout)
        setattr(self.inner.get_submodule(parent), child, head)
        self.head_name = f"inner.{name}"
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The trunk of the stock model; what lies outside is the head."""
        return self.inner.base_model

    def _init_weights(self, module: nn.Module) -> None:
        self.inner._init_weights(module)

    def forward(self, **inputs: Any) -> Any:
        """Call the stock model: same inputs, same outputs."""
        return self.inner(**inputs)


class MlpHeadForImageClassification(_MlpHeadModel):
    """An image classifier with a multi-layer perceptron for a head."""

    main_input_name = "pixel_values"
    auto_class_of_inner = AutoModelForImageClassification

    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Classify images, (N, C, H, W)."""
        return self.inner(pixel_values=pixel_values, labels=labels, **kwargs)


class MlpHeadForSequenceClassification(_MlpHeadModel):
    """A text classifier with a multi-layer perceptron for a head."""

    auto_class_of_inner = AutoModelForSequenceClassification

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Classify token sequences, (N, T)."""
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def output_layer(model: nn.Module, num_outputs: int) -> tuple[str, nn.Linear]:
    """Return the name and module of a stock classifier's last linear layer.

    Raises:
        ValueError: If no linear layer of the model has `num_outputs` outputs.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_outputs
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer with {num_outputs} outputs to replace")
    return found[-1]


def _perceptron(widths: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] * (index > 0) + [nn.Dropout(dropout)] * (dropout > 0) + [nn.Linear(width_in, width_out)]
    return nn.Sequential(*layers)


AutoConfig.register("zoo_mlp_head", MlpHeadConfig, exist_ok=True)
AutoModelForImageClassification.register(MlpHeadConfig, MlpHeadForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(MlpHeadConfig, MlpHeadForSequenceClassification, exist_ok=True)
MlpHeadConfig.register_for_auto_class()
MlpHeadForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MlpHeadForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
