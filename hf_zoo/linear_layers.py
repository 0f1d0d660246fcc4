"""The linear layers of a network, known by what they compute, and the rows that they read."""

# R = rows (tokens, patches, whole examples), I = inputs of a layer, O = its outputs

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_PROBED_ROWS = 3
# What a module says when it is called with numbers it does not take.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)


def linear_layers(model: nn.Module) -> dict[str, int]:
    """Find the modules that multiply what they read by a matrix, and add a bias where they have one.

    Besides `torch.nn.Linear` these are modules without modules of their own whose `weight` is a matrix and whose
    answer to random rows is their product with a random matrix put in its place, such as the layers of GPT-2, whose
    weights are stored as (inputs, outputs).

    Args:
        model: A network.

    Returns:
        Path of the module -> which axis of its weight runs over the inputs; a module under several paths has each.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found[path] = 1
        elif (axis := _input_axis(module)) is not None:
            found[path] = axis
    return found


@contextmanager
def watching(
    model: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None], mask: Tensor | None = None
) -> Generator[None, None, None]:
    """Have every row shown that some layers read while the network runs.

    Args:
        model: The network.
        paths: Its layers.
        see: Is given a layer's path and rows, (R, I), at each of its calls.
        mask: The batch's attention mask, (examples, tokens): the rows of padding are left out where a layer reads a
            row a token.
    """
    shown = None if mask is None or mask.ndim != 2 else mask.reshape(-1) != 0

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            x_RI = x.detach().reshape(-1, x.shape[-1])
            if shown is not None and len(x_RI) == len(shown) and x.ndim > 2:
                x_RI = x_RI[shown]
            see(path, x_RI)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_axis(module: nn.Module) -> int | None:
    """Return the axis of a module's weight that runs over its inputs; null for a module that is no linear layer."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or any(True for _ in module.children()):
        return None
    bias = module._parameters.get("bias")
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(weight)

    values = {"weight": drawn(*weight.shape)} | ({} if bias is None else {"bias": drawn(*bias.shape)})
    training, module.training = module.training, False
    try:
        for axis in (0, 1):
            x_RI = drawn(_PROBED_ROWS, weight.shape[axis])
            try:
                with torch.no_grad():
                    answer = functional_call(module, values, (x_RI,))
                    wanted = x_RI @ (values["weight"] if axis == 0 else values["weight"].T) + values.get("bias", 0)
            except _REFUSALS:
                continue
            # A sum of I products, in the module's own type.
            near = 0.1 if weight.dtype.itemsize < 4 else 1e-3
            if not isinstance(answer, Tensor) or answer.shape != wanted.shape or answer.dtype != wanted.dtype:
                continue
            if torch.allclose(answer, wanted, near, near):
                return axis
        return None
    finally:
        module.training = training
