"""The diagonal of the Fisher information, streamed over batches, each example's gradients squared apart."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_zoo.curvature.calls import Call, add_squares, chunks_of, example_gradients, recording
from hf_zoo.curvature.likelihoods import Estimator, directions, likelihood_of
from hf_zoo.curvature.plan import Owner, Plan, gradients_at, make_plan, run
from hf_zoo.errors import ModelError
from hf_zoo.shards import describe_nonfinite, is_finite


class DiagonalFisher:
    """A diagonal Fisher in the making: add batches, then take the mean.

    F = 1/N sum_n E_y[(d log p(y | x_n) / d theta)^2], element by element, over all floating parameters, frozen ones
    too. Dropout and batch statistics stand still. The sum is kept in the type the model computes in.

    Args:
        model: Returns logits. It is not changed; where it is of another type or elsewhere, a copy is used.
        objective: `sequence_classification`, `image_classification`, `masked_lm`, `causal_lm` or `regression`.
        estimator: How the expectation over labels is taken.
        per_example: Square each example's gradient. False squares the gradient summed over a batch, in which the
            products of two examples vanish on average when labels are sampled: as unbiased, cheaper and noisier (the
            mean-loss gradient's square times the batch size). Valid for `sampled` alone.
        dtype: Type of computation and sum, float32 or float64.
        device: Where to compute; null stays with the model.

    Raises:
        ModelError: If the objective has no likelihood, or the batch shortcut is asked for where it is biased.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: str,
        estimator: Estimator | None = None,
        *,
        per_example: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        likelihood_of(objective)
        self.objective = objective
        self.estimator = estimator or Estimator()
        if not per_example and self.estimator.kind != "sampled":
            raise ModelError(
                f"per_example=false squares the gradient of a whole batch, which is only unbiased where labels are "
                f"sampled, not with estimator={self.estimator.kind}: use estimator=sampled or per_example=true"
            )
        self.per_example = per_example
        self.model = placed(model, dtype, device)
        self.dtype = dtype
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.is_floating_point()}
        self.sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.num_examples = 0
        self._plan: Plan | None = None

    def add(self, batch: Mapping[str, Tensor], indices: Sequence[int] | np.ndarray | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: What the model takes, and `labels`.
            indices: What the examples' draws are a function of; null counts on from the examples added so far.

        Raises:
            ModelError: If labels are missing or the model cannot be taken apart.
        """
        device = next(iter(self.parameters.values())).device
        inputs = moved(batch, self.dtype, device)
        labels = inputs.pop("labels", inputs.get("input_ids") if self.objective == "causal_lm" else None)
        count = len(next(iter(inputs.values())))
        indices = np.arange(self.num_examples, self.num_examples + count) if indices is None else np.asarray(indices)
        with standing_still(self.model), torch.enable_grad():
            if self.per_example and self._plan is None:
                self._plan = make_plan(self.model, inputs)
            modules = self._plan.modules(self.model) if self._plan is not None else {}
            expanded = self._plan.expanded if self._plan is not None else frozenset()
            with recording(modules, count, expanded) as calls:
                logits = run(self.model, inputs)
            if self._plan is not None:
                self._plan.mark(calls)
            mask = inputs.get("attention_mask")
            for direction in directions(self.objective, logits, labels, mask, self.estimator, indices):
                self._add_direction(logits, calls, direction)
        self.num_examples += count

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over the examples so far, parameter by parameter, by the names modules have; tied ones once.

        Raises:
            ModelError: If there were no examples, or the sum is not finite.
        """
        if not self.num_examples:
            raise ModelError("there were no examples to take the Fisher information of")
        for name, total in self.sums.items():
            if not is_finite(total):
                raise ModelError(f"the Fisher information of {name} holds {describe_nonfinite(total)}: the model's "
                                 "gradients overflow; use dtype=float64")  # fmt: skip
        return {name: total / self.num_examples for name, total in self.sums.items()}

    def _add_direction(self, logits: Tensor, calls: Sequence[Call], direction: Tensor) -> None:
        if self._plan is None:
            values = list(self.parameters.values())
            found = torch.autograd.grad(logits, values, direction, retain_graph=True, allow_unused=True)
            for total, gradient in zip(self.sums.values(), found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
            return
        gradients = gradients_at(logits, calls, direction, retain_graph=True)
        live: dict[str, list[tuple[Call, list[Tensor]]]] = {}
        with torch.no_grad():
            for call, own in zip(calls, gradients, strict=True):
                if own is not None:
                    live.setdefault(call.path, []).append((call, own))
            self._add_squares(self._plan, live)

    def _add_squares(self, plan: Plan, live: Mapping[str, list[tuple[Call, list[Tensor]]]]) -> None:
        """Add the squares of one backward pass; a parameter of several calls is summed over them before squaring."""
        together: dict[str, list[tuple[str, str]]] = {}
        for name, owners in plan.owners.items():
            uses = [(call, own, local) for path, local in owners for call, own in live.get(path, ())]
            if len(uses) == 1:
                call, own, local = uses[0]
                if not add_squares(call, own, local, self.sums[name]):
                    together.setdefault(call.path, []).append((name, local))
            elif uses:
                for span in chunks_of(uses[0][0], [uses[0][2]]):
                    parts = [example_gradients(call, own, [local], span)[local] for call, own, local in uses]
                    self.sums[name] += torch.stack(parts).sum(0).square_().sum(0)
        for path, names in together.items():
            ((call, own),) = live[path]
            locals_ = [local for _, local in names]
            for span in chunks_of(call, locals_):
                found = example_gradients(call, own, locals_, span)
                for name, local in names:
                    self.sums[name] += found[local].square().sum(0)  # not in place: it may be the cotangent itself


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    objective: str,
    estimator: Estimator | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of a model over some batches.

    Args:
        model: Returns logits.
        batches: What it takes, and `labels`.
        objective: What its outputs mean.
        estimator: How the expectation over labels is taken; null takes it exactly.
        **options: `per_example`, `dtype` and `device` of `DiagonalFisher`.

    Returns:
        Parameter's name in the module -> mean squared gradient, of its shape.
    """
    fisher = DiagonalFisher(model, objective, estimator, **options)
    for batch in batches:
        fisher.add(batch)
    return fisher.mean()


def placed(model: nn.Module, dtype: torch.dtype, device: torch.device | str | None) -> nn.Module:
    """Return a model in a type on a device: itself where it is so already, else a copy."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device = torch.device(device) if device is not None else first.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if all(p.device == device and (p.dtype == dtype or not p.is_floating_point()) for p in model.parameters()):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def moved(batch: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device, its floating tensors in a type."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in batch.items()
    }


@contextmanager
def standing_still(model: nn.Module) -> Generator[None, None, None]:
    """Keep a model in evaluation mode with every floating parameter in the graph, and put it back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    model.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


__all__ = ["DiagonalFisher", "Owner", "diagonal_fisher", "moved", "placed", "standing_still"]
