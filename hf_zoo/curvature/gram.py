"""Gram matrices of the inputs of linear layers, the statistic of RegMean (Jin et al. 2022, arXiv:2212.09849)."""

# B = examples of a batch, R = rows (tokens, patches) of an example, I = inputs of a layer

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_zoo.curvature.fisher import placed, standing_still
from hf_zoo.curvature.plan import run
from hf_zoo.errors import ModelError
from hf_zoo.shards import describe_nonfinite, is_finite


class GramMatrices:
    """Gram matrices in the making: add batches, then take the means.

    G = 1/M sum_m x_m x_m^T over the M rows (tokens, patches or whole examples) a layer reads; padding is left out
    where the batch has an `attention_mask` and the layer reads a row a token. A layer called several times, or a
    weight that several layers share, adds up the rows of all its calls.

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
        self.layers = {
            path: names[id(module.weight)]
            for path, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear) and id(module.weight) in names
        }
        if not self.layers:
            raise ModelError(f"{type(model).__name__} has no linear layer, so it has no Gram matrices")
        self.sums: dict[str, Tensor] = {}
        for path, name in self.layers.items():
            weight: Any = self.model.get_submodule(path).weight
            self.sums.setdefault(name, weight.new_zeros(weight.shape[1], weight.shape[1], requires_grad=False))
        self.rows = dict.fromkeys(self.sums, 0)
        self.num_examples = 0

    def add(self, batch: Mapping[str, Tensor], indices: Any = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: What the model takes; `labels` are not looked at.
            indices: Not looked at either; `DiagonalFisher` takes them.
        """
        device = next(iter(self.sums.values())).device
        inputs = {
            name: value.to(device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in batch.items()
            if name != "labels"
        }
        mask = inputs.get("attention_mask")
        shown = None if mask is None or mask.ndim != 2 else mask.reshape(-1) != 0

        def observe(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x_RI = args[0].detach().reshape(-1, args[0].shape[-1])
                if shown is not None and len(x_RI) == len(shown) and args[0].ndim > 2:
                    x_RI = x_RI[shown]
                self.sums[name].addmm_(x_RI.T, x_RI)
                self.rows[name] += len(x_RI)

            return hook

        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(observe(name))
            for path, name in self.layers.items()
        ]
        try:
            with standing_still(self.model), torch.no_grad():
                run(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
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
