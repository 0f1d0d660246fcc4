"""What the modules of a network did in one forward pass, and each example's gradient of their parameters from it.

A module whose input has the examples in its first dimension tells every example's gradient apart after one backward
pass over the whole batch: by a rule for the common layers, else by replaying the module alone under `vmap`.
"""

# B = examples of a batch, N = examples of a chunk, R = rows (tokens, patches) of an example, O = outputs, I = inputs,
# V = entries of a table, D = width

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

# Per-example gradients are squared while they lie in a core's cache; a device has bandwidth and dislikes small work.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
REPLAY_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
MAX_REPLAYED = 32  # examples whose activations a replay under vmap holds at once


class UnseparableError(Exception):
    """Tell that a module's calls do not tell the examples apart; its parameters are looked for further up."""


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: The module's name.
        module: The module.
        num_examples: Examples of the batch.
        leaves: Its arguments, flattened; tensors are detached.
        keys: A name for each of them.
        structure: How they belong together.
        edges: Where the gradient of each of its outputs arrives.
        outputs: The places of these outputs among all it returned.
        shapes: Their shapes.
        batched: Which arguments have the examples in their first dimension; set once the plan is made.
    """

    path: str
    module: nn.Module
    num_examples: int
    leaves: list[Any]
    keys: list[str]
    structure: Any
    edges: list[GradientEdge]
    outputs: list[int]
    shapes: list[torch.Size]
    batched: list[bool] = field(default_factory=list)

    def rows(self, value: Tensor) -> Tensor:
        """Return an input or output gradient as (B, R, width), the last dimension kept.

        Raises:
            UnseparableError: If the first dimension does not hold the examples.
        """
        if value.shape[0] % self.num_examples:
            raise UnseparableError(f"{self.path}: {tuple(value.shape)} for {self.num_examples} examples")
        return value.reshape(self.num_examples, -1, value.shape[-1])

    @property
    def input(self) -> Tensor:
        """Its first argument.

        Raises:
            UnseparableError: If that is no tensor with the examples in its first dimension.
        """
        if not (self.leaves and isinstance(self.leaves[0], Tensor) and self.batched[0]):
            raise UnseparableError(f"{self.path}: its input does not hold the examples")
        return self.leaves[0]


@contextmanager
def recording(
    modules: Mapping[str, nn.Module], num_examples: int, expanded: AbstractSet[str] = frozenset()
) -> Generator[list[Call], None, None]:
    """Record every call of some modules while the block runs.

    Args:
        modules: Name -> module.
        num_examples: Examples of the batch that is put through the network.
        expanded: Tables looked up once for the whole batch: their one row is handed on once for every example, so that
            its gradient arrives apart.

    Yields:
        The calls, in order; filled while the block runs.
    """
    calls: list[Call] = []

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if path in expanded and isinstance(output, Tensor) and output.shape[0] == 1:
                output = output.expand(num_examples, *output.shape[1:])
                args = tuple(arg.expand(num_examples, *arg.shape[1:]) for arg in args)
            calls.append(_call(path, module, num_examples, args, kwargs, output))
            return output

        return hook

    handles = [module.register_forward_hook(hook_of(path), with_kwargs=True) for path, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _call(path: str, module: nn.Module, num_examples: int, args: Any, kwargs: Any, output: Any) -> Call:
    inputs, structure = pytree.tree_flatten_with_path((args, kwargs))
    returned = pytree.tree_leaves(output)
    carrying = [i for i, leaf in enumerate(returned) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return Call(
        path=path,
        module=module,
        num_examples=num_examples,
        leaves=[leaf.detach() if isinstance(leaf, Tensor) else leaf for _, leaf in inputs],
        keys=[pytree.keystr(key) for key, _ in inputs],
        structure=structure,
        # An edge, not the tensor: activations work in place, and what is meant is the value before them.
        edges=[get_gradient_edge(returned[i]) for i in carrying],
        outputs=carrying,
        shapes=[returned[i].shape for i in carrying],
    )


def example_gradients(call: Call, gradients: Sequence[Tensor], names: Sequence[str], span: slice) -> dict[str, Tensor]:
    """Return some examples' gradients of a module's parameters, from one call of it.

    Args:
        call: The call.
        gradients: The gradient of each of its outputs.
        names: The parameters, by their names inside the module.
        span: The examples.

    Returns:
        Name -> (N, *shape).

    Raises:
        UnseparableError: If the call does not tell the examples apart.
    """
    rule = _RULES.get(type(call.module))
    if rule is None or any("." in name for name in names) or len(gradients) != 1:
        return _replayed(call, gradients, names, span)
    return rule(call, gradients[0], names, span)


def add_squares(call: Call, gradients: Sequence[Tensor], name: str, into: Tensor) -> bool:
    """Add the examples' squared gradients of a parameter where that needs no gradient of any example.

    Args:
        call: The parameter's only call.
        gradients: The gradient of each of its outputs.
        name: The parameter's name inside the module.
        into: What is added to, of the parameter's shape.

    Returns:
        Whether it was done; else it has to be done example by example.

    Raises:
        UnseparableError: If the call does not tell the examples apart.
    """
    if len(gradients) != 1:
        return False
    if type(call.module) is nn.Embedding and name == "weight":
        _add_embedding_squares(call, gradients[0], into)
        return True
    if type(call.module) is not nn.Linear:
        return False
    g_BRO = call.rows(gradients[0])
    if name == "bias":
        into += g_BRO.sum(1).square_().sum(0)
        return True
    return _add_linear_squares(g_BRO, call.rows(call.input), into)


def _add_linear_squares(g_BRO: Tensor, x_BRI: Tensor, into: Tensor) -> bool:
    if not g_BRO[0].any(-1).all():  # the last layer of a classifier gets its gradient at one token
        reached_R = g_BRO.any(-1).any(0)
        g_BRO, x_BRI = g_BRO[:, reached_R], x_BRI[:, reached_R]
    if g_BRO.shape[1] == 1:  # one row an example: (g x^T)^2 = g^2 (x^2)^T, and these add up in one product
        into.addmm_(g_BRO[:, 0].square().T, x_BRI[:, 0].square())
        return True
    if into.device.type != "cpu":
        return False
    tall = into.shape[0] >= into.shape[1]  # a product of few rows is twice as fast where it comes out tall
    left, right = (g_BRO, x_BRI) if tall else (x_BRI, g_BRO)
    total = torch.zeros_like(into if tall else into.T, memory_format=torch.contiguous_format)
    buffer = torch.empty_like(total)
    for left_R, right_R in zip(left, right, strict=True):
        torch.mm(left_R.T, right_R, out=buffer)
        total.addcmul_(buffer, buffer)  # while it is in the cache: half the time of squaring a batch of them
    into += total if tall else total.T
    return True


def _add_embedding_squares(call: Call, gradient: Tensor, into: Tensor) -> None:
    """Add up each example's rows of a table token by token: an example touches few of the table's rows."""
    ids_BR, g_BRD = _looked_up(call, gradient)
    size: Any = call.module.num_embeddings
    place_BR = torch.arange(len(ids_BR), device=ids_BR.device)[:, None] * size + ids_BR
    known, where = place_BR.reshape(-1).unique(return_inverse=True)
    rows = into.new_zeros(len(known), into.shape[-1]).index_add_(0, where, g_BRD.reshape(-1, into.shape[-1]))
    into.index_add_(0, known % size, rows.square_())


def _looked_up(call: Call, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return which row of its table each place looked up, and the gradients there, zero at padding."""
    g_BRD = call.rows(gradient)
    ids_BR = call.input.reshape(call.num_examples, -1)
    padding: Any = call.module.padding_idx
    if padding is not None:
        g_BRD = g_BRD * (ids_BR != padding)[..., None]
    return ids_BR, g_BRD


def _linear(call: Call, gradient: Tensor, names: Sequence[str], span: slice) -> dict[str, Tensor]:
    g_NRO = call.rows(gradient)[span]
    found = {"bias": g_NRO.sum(1)} if "bias" in names else {}
    if "weight" in names:
        found["weight"] = g_NRO.transpose(1, 2) @ call.rows(call.input)[span]
    return found


def _embedding(call: Call, gradient: Tensor, names: Sequence[str], span: slice) -> dict[str, Tensor]:
    ids_BR, g_BRD = _looked_up(call, gradient)
    ids_NR, g_NRD = ids_BR[span], g_BRD[span]
    size: Any = call.module.num_embeddings
    place_NR = torch.arange(len(ids_NR), device=ids_NR.device)[:, None] * size + ids_NR
    table = g_NRD.new_zeros(len(ids_NR) * size, g_NRD.shape[-1])
    table.index_add_(0, place_NR.reshape(-1), g_NRD.reshape(-1, g_NRD.shape[-1]))
    return {"weight": table.reshape(len(ids_NR), size, -1)}


def _layer_norm(call: Call, gradient: Tensor, names: Sequence[str], span: slice) -> dict[str, Tensor]:
    module: Any = call.module
    if len(module.normalized_shape) != 1:
        return _replayed(call, [gradient], names, span)
    g_NRD = call.rows(gradient)[span]
    found = {"bias": g_NRD.sum(1)} if "bias" in names else {}
    if "weight" in names:
        x_NRD = call.rows(call.input)[span]
        found["weight"] = (g_NRD * F.layer_norm(x_NRD, module.normalized_shape, eps=module.eps)).sum(1)
    return found


# Layers common enough to be worth a rule; every other module is replayed. A rule is checked like a replay is.
_RULES = {nn.Linear: _linear, nn.Embedding: _embedding, nn.LayerNorm: _layer_norm}


def _replayed(call: Call, gradients: Sequence[Tensor], names: Sequence[str], span: slice) -> dict[str, Tensor]:
    """Run the module again for each example apart, under vmap, and pull its output gradients back."""
    num = call.num_examples
    if any(shape[0] % num if len(shape) else True for shape in call.shapes):
        raise UnseparableError(f"{call.path}: returns {call.shapes} for {num} examples")
    if not any(call.batched):
        raise UnseparableError(f"{call.path}: no argument holds the examples")
    parameters = {name: call.module.get_parameter(name).detach() for name in names}
    arguments = list(zip(call.leaves, call.batched, strict=True))
    moving = [leaf.reshape(num, -1, *leaf.shape[1:])[span] for leaf, is_batched in arguments if is_batched]
    cotangents = [gradient.reshape(num, -1, *gradient.shape[1:])[span] for gradient in gradients]

    def one(values: list[Tensor], pulled: list[Tensor]) -> dict[str, Tensor]:
        rest = iter(values)
        leaves = [next(rest) if is_batched else leaf for leaf, is_batched in arguments]
        args, kwargs = pytree.tree_unflatten(leaves, call.structure)

        def outputs(values: dict[str, Tensor]) -> list[Tensor]:
            returned = pytree.tree_leaves(functional_call(call.module, values, args, kwargs))
            return [returned[place] for place in call.outputs]

        _, pull_back, *_ = vjp(outputs, parameters)
        return pull_back(pulled)[0]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
        return vmap(one)(moving, cotangents)


def chunks_of(call: Call, names: Sequence[str]) -> Iterator[slice]:
    """Yield the examples of a call in spans whose gradients fit into a bounded piece of memory."""
    parameters = [call.module.get_parameter(name) for name in names]
    size = max(1, sum(parameter.numel() * parameter.element_size() for parameter in parameters))
    by_rule = type(call.module) in _RULES
    device = parameters[0].device.type
    budget = (CHUNK_BYTES if by_rule else REPLAY_BYTES).get(device, CHUNK_BYTES["cuda"])
    step = max(1, budget // size)
    step = step if by_rule and device == "cpu" else min(step, MAX_REPLAYED) if not by_rule else step
    for start in range(0, call.num_examples, step):
        yield slice(start, min(start + step, call.num_examples))
