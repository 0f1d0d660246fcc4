"""Where each parameter's per-example gradients are read off a network: tried and checked on its first batch.

No table of architectures: a parameter is looked for in the calls of its own module; where these do not account for
its gradient (a table read past its module, a bias handed on to other layers), in the module around that one, and so
on up to the whole network.
"""

# B = examples of the probe

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_zoo.curvature.calls import Call, UnseparableError, chunks_of, example_gradients, recording
from hf_zoo.errors import ModelError

PROBED = 4
# A right attribution agrees to rounding, a wrong one is off by about the gradient itself.
TOLERANCE = 1e-3
# In roundings of the largest gradient: below it a gradient is rounding itself (the biases of attention's keys).
NEGLIGIBLE = 8
# What a network says when it is run on one example apart and cannot be.
_REFUSALS = (UnseparableError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)

Owner = tuple[str, str]  # a module's name, and the parameter's name inside it


@dataclass
class Plan:
    """Where gradients are read off.

    Attributes:
        owners: Parameter -> the modules whose calls account for its gradient, together.
        expanded: Tables that are looked up once for a whole batch.
        scaling: Module and argument -> whether its first dimension holds the examples.
    """

    owners: dict[str, tuple[Owner, ...]]
    expanded: frozenset[str]
    scaling: dict[tuple[str, str], bool]

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to record, by name."""
        paths = {path for owners in self.owners.values() for path, _ in owners}
        return {path: module for path, module in model.named_modules() if path in paths}

    def mark(self, calls: Iterable[Call]) -> None:
        """Tell calls which of their arguments hold the examples."""
        for call in calls:
            call.batched = [
                isinstance(leaf, Tensor) and leaf.ndim > 0
                and self.scaling.get((call.path, key), len(leaf) == call.num_examples)
                for leaf, key in zip(call.leaves, call.keys, strict=True)
            ]  # fmt: skip


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run a model and return its logits.

    Raises:
        ModelError: If it returns none.
    """
    kwargs: dict[str, Any] = dict(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    output = model(**kwargs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(model).__name__} returns no logits ({type(output).__name__}): give a model with a head"
        )
    return logits


def make_plan(model: nn.Module, inputs: Mapping[str, Tensor]) -> Plan:
    """Find out where each parameter's per-example gradients can be read off.

    On a few examples, the per-example gradients of random cotangents, weighted at random and added up, are compared to
    what autograd says of the weighted cotangents.

    Args:
        model: The model, in evaluation mode, every floating parameter requiring a gradient.
        inputs: Its first batch.

    Raises:
        ModelError: If the examples of some parameters cannot be told apart, even by the whole network under vmap.
    """
    count = len(next(iter(inputs.values())))
    places = [i % count for i in range(min(max(count, 2), PROBED))]
    probe = {name: value[places] for name, value in inputs.items()}
    by_identity: dict[int, list[Owner]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        path, _, name = full.rpartition(".")
        by_identity.setdefault(id(parameter), []).append((path, name))
    owners = {name: tuple(by_identity[id(p)]) for name, p in model.named_parameters() if p.is_floating_point()}
    plan = Plan(owners, frozenset(), {})
    plan.expanded = _shared_tables(model, probe, plan)
    while failed := _failed(model, probe, plan):
        if stuck := [name for name in failed if all(path == "" for path, _ in plan.owners[name])]:
            raise ModelError(
                f"{type(model).__name__}: the gradients of {', '.join(stuck[:3])} cannot be told apart by example "
                f"({failed[stuck[0]]}): torch.func.vmap must be able to run the model. Load it with "
                "attn_implementation='eager', or use estimator=sampled with per_example=false, which needs no vmap"
            )
        for name in failed:
            plan.owners[name] = _climbed(plan.owners[name])
    return plan


def gradients_at(
    logits: Tensor, calls: Sequence[Call], cotangent: Tensor, retain_graph: bool
) -> list[list[Tensor] | None]:
    """Pull a cotangent back to the outputs of some calls.

    Returns:
        For each call the gradient of each of its outputs; null where none arrives.
    """
    edges = [edge for call in calls for edge in call.edges]
    if not edges:
        return [None for _ in calls]
    found = torch.autograd.grad(logits, edges, cotangent, retain_graph=retain_graph, allow_unused=True)
    rest = iter(found)
    gradients: list[list[Tensor] | None] = []
    for call in calls:
        own = [next(rest) for _ in call.edges]
        if all(gradient is None for gradient in own):
            gradients.append(None)
        else:
            pairs = zip(own, call.shapes, strict=True)
            gradients.append([cotangent.new_zeros(shape) if g is None else g for g, shape in pairs])
    return gradients


def _shared_tables(model: nn.Module, probe: Mapping[str, Tensor], plan: Plan) -> frozenset[str]:
    """Return the embeddings that are looked up once for the whole batch and can be handed on once an example."""
    tables = {path: module for path, module in model.named_modules() if type(module) is nn.Embedding}
    count = len(next(iter(probe.values())))
    with recording(tables, count) as calls:
        logits = run(model, probe)
    single = {call.path for call in calls if call.shapes and call.shapes[0][0] == 1}
    single -= {call.path for call in calls if not (call.shapes and call.shapes[0][0] == 1)}
    try:
        with recording(tables, count, single) as calls:
            if torch.equal(run(model, probe), logits):
                return frozenset(single)
    except _REFUSALS:
        pass
    return frozenset()


def _failed(model: nn.Module, probe: Mapping[str, Tensor], plan: Plan) -> dict[str, str]:
    """Return the parameters whose gradients the plan does not account for, and why."""
    count = len(next(iter(probe.values())))
    modules = plan.modules(model)
    with recording(modules, count - 1, plan.expanded) as fewer:
        run(model, {name: value[: count - 1] for name, value in probe.items()})
    with recording(modules, count, plan.expanded) as calls:
        logits = run(model, probe)
    plan.scaling |= _scaling(calls, fewer)
    plan.mark(calls)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(logits.shape, generator=generator).to(logits)
    weights_B = torch.randn(count, generator=generator).to(logits)
    gradients = gradients_at(logits, calls, cotangent, retain_graph=True)
    weighted = cotangent * weights_B.reshape(-1, *[1] * (cotangent.ndim - 1))
    parameters = dict(model.named_parameters())
    names = list(plan.owners)
    wanted = torch.autograd.grad(logits, [parameters[name] for name in names], weighted, allow_unused=True)
    largest = max(float(value.norm()) for value in wanted if value is not None)
    rounding = NEGLIGIBLE * torch.finfo(logits.dtype).eps * largest
    called = {call.path for call, own in zip(calls, gradients, strict=True) if own is not None}
    failed = {}
    for name, value in zip(names, wanted, strict=True):
        want = torch.zeros_like(parameters[name]) if value is None else value
        if not any(path in called for path, _ in plan.owners[name]):
            if want.any():
                failed[name] = "it has a gradient, but its module is never called"
            continue
        try:
            with torch.no_grad():
                error = float((_weighted_sum(plan, name, calls, gradients, weights_B, want) - want).norm())
        except _REFUSALS as refusal:
            failed[name] = " ".join(str(refusal).split())[:200]
            continue
        if not error <= TOLERANCE * float(want.norm()) + rounding:
            failed[name] = f"its gradient is off by {error:.1e} of {float(want.norm()):.1e}"
    return failed


def _weighted_sum(
    plan: Plan,
    name: str,
    calls: Sequence[Call],
    gradients: Sequence[list[Tensor] | None],
    weights_B: Tensor,
    like: Tensor,
) -> Tensor:
    total = torch.zeros_like(like)
    for path, local in plan.owners[name]:
        for call, own in zip(calls, gradients, strict=True):
            if call.path == path and own is not None:
                for span in chunks_of(call, [local]):
                    each = example_gradients(call, own, [local], span)[local]
                    total += torch.tensordot(weights_B[span], each, 1)
    return total


def _scaling(calls: Sequence[Call], fewer: Sequence[Call]) -> dict[tuple[str, str], bool]:
    """Return which arguments grew with the number of examples, in every call of their module."""
    before: dict[tuple[str, str], list[Tensor]] = {}
    for call in fewer:
        for key, leaf in zip(call.keys, call.leaves, strict=True):
            if isinstance(leaf, Tensor):
                before.setdefault((call.path, key), []).append(leaf)
    scaling: dict[tuple[str, str], bool] = {}
    for call in calls:
        for key, leaf in zip(call.keys, call.leaves, strict=True):
            place = (call.path, key)
            if isinstance(leaf, Tensor) and leaf.ndim and before.get(place):
                small = before[place].pop(0)
                count = call.num_examples
                grew = small.ndim > 0 and len(leaf) * (count - 1) == len(small) * count and len(leaf) >= count
                scaling[place] = scaling.get(place, True) and grew
    return scaling


def _climbed(owners: Sequence[Owner]) -> tuple[Owner, ...]:
    """Return the modules around some, each once, none inside another."""
    moved = []
    for path, name in owners:
        parent, _, last = path.rpartition(".")
        moved.append((parent, f"{last}.{name}") if path else (path, name))
    paths = {path for path, _ in moved}
    outermost = {p for p in paths if not any(p != q and (q == "" or p.startswith(f"{q}.")) for q in paths)}
    kept: dict[str, str] = {}
    for path, name in moved:
        if path in outermost:
            kept.setdefault(path, name)
    return tuple(kept.items())
