"""Gram matrices of the inputs of linear layers, the statistic of RegMean (Jin et al. 2022, arXiv:2212.09849)."""

# B = examples of a batch, R = rows (tokens, patches) of an example, I = inputs of a layer

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_zoo.curvature.fisher import moved, placed, standing_still
from hf_zoo.curvature.plan import run
from hf_zoo.errors import ModelError
from hf_zoo.linear_layers import linear_layers, watching
from hf_zoo.shards import describe_nonfinite, is_finite


class GramMatrices:
    """Gram matrices in the making: add batches, then take the means.

    G = 1/M sum_m x_m x_m^T over the M rows (tokens, patches or whole examples) a layer reads; padding is left out
    where the batch has an `attention_mask` and the layer reads a row a token. A layer called several times, or a
    weight that several layers share, adds up the rows of all its calls. Layers that store their weight as (inputs,
    outputs), as GPT-2's do, are linear layers too.

    Args:
        model: Returns logits. It is not changed; where it is of another type or elsewhere, a copy is used.
        dtype: Type of computation and sum, float32 or float64.
        device: Where to compute; null stays with the model.

    Raises:
        ModelError: If the model has no linear layer.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.model = placed(model, dtype, device)
        self.dtype = dtype
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.layers: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        for path, axis in linear_layers(self.model).items():
            weight: Any = self.model.get_submodule(path).weight
            if (name := names.get(id(weight))) is not None:
                self.layers[path] = name
                size = weight.shape[axis]
                self.sums.setdefault(name, weight.new_zeros(size, size, requires_grad=False))
        if not self.layers:
            raise ModelError(f"{type(model).__name__} has no linear layer, so it has no Gram matrices")
        self.rows = dict.fromkeys(self.sums, 0)
        self.num_examples = 0

    def add(self, batch: Mapping[str, Tensor], indices: Any = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: What the model takes; `labels` are not looked at.
            indices: Not looked at either; `DiagonalFisher` takes them.
        """
        device = next(iter(self.sums.values())).device
        inputs = moved({name: value for name, value in batch.items() if name != "labels"}, self.dtype, device)

        def add_rows(path: str, x_RI: Tensor) -> None:
            name = self.layers[path]
            self.sums[name].addmm_(x_RI.T, x_RI)
            self.rows[name] += len(x_RI)

        watched = watching(self.model, self.layers, add_rows, inputs.get("attention_mask"))
        with watched, standing_still(self.model), torch.no_grad():
            run(self.model, inputs)
        self.num_examples += len(next(iter(inputs.values())))

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over the rows so far, by the weight's name in the module; layers never called are left out.

        Raises:
            ModelError: If there were no examples, or a sum is not finite.
        """
        if not self.num_examples:
            raise ModelError("there were no examples to take Gram matrices of")
        for name, total in self.sums.items():
            if not is_finite(total):
                raise ModelError(f"the Gram matrix of {name} holds {describe_nonfinite(total)}: use dtype=float64")
        return {name: total / self.rows[name] for name, total in self.sums.items() if self.rows[name]}


def gram_matrices(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the Gram matrix of every linear layer's input over some batches, and how many rows each is the mean of.

    Args:
        model: Returns logits.
        batches: What it takes.
        **options: `dtype` and `device` of `GramMatrices`.

    Returns:
        Weight's name in the module -> mean of x x^T, (I, I); and -> number of rows.
    """
    gram = GramMatrices(model, **options)
    for batch in batches:
        gram.add(batch)
    return gram.mean(), {name: count for name, count in gram.rows.items() if count}
