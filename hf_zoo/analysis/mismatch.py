"""The gradients a merge leaves unmatched (Daheim et al. 2024, arXiv:2310.12808).

Training on all tasks at once, with losses l_t summed over examples and weights alpha_t, ends where task arithmetic
ends but for `-H_0^-1 sum_t alpha_t [grad l_t(theta) - grad l_t(theta_t)]`. The length of that sum g is the gradient
mismatch: raw; scaled by the base's curvature, |H_0^-1 g|, a distance in weights; and natural, sqrt(g^T H_0^-1 g),
whose square is twice the loss that distance is worth. Entries with hardly any curvature, whose gradients are rounding,
make most of the scaled length of a real network and next to nothing of the natural one: compare merges by the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_zoo.analysis.groups import TOTAL, groups_of
from hf_zoo.auto import model_of
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.curvature.members import Examples, open_examples, own_data
from hf_zoo.curvature.saved import fisher_on_disk
from hf_zoo.errors import MergeError
from hf_zoo.evaluation import objective_of
from hf_zoo.information import fisher_of, has_fisher
from hf_zoo.ingredients import Ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import task_reader
from hf_zoo.losses import compute_loss
from hf_zoo.methods.base import Method, Need, make_method, per_member
from hf_zoo.methods.gradient_matching import GradientMatching
from hf_zoo.places import Places
from hf_zoo.population import Member
from hf_zoo.recipe.diagnostics import DiagnosticsSpec
from hf_zoo.recipe.schema import DataSpec, ObjectiveSpec
from hf_zoo.recipe.statistics import StatisticsSpec
from hf_zoo.structure import class_of

SPLIT = "train"
Curvature = Callable[[str], Tensor | None]


class TaskLoss(Protocol):
    """A task's loss, summed over its examples."""

    def gradient(self, tensors: CheckpointReader) -> Mapping[str, Tensor]:
        """Return name -> gradient of the loss at these tensors; names without one are left out."""
        ...


@dataclass(frozen=True)
class MemberLoss:
    """The loss of a member on the training split it was fine-tuned on, or a sample of it scaled up to the whole.

    Dropout and augmentation are off, so that the two gradients that are compared differ in nothing but the weights.

    Attributes:
        ingredient: The member: its class, its config, and its own head where heads are kept apart.
        examples: What the loss is summed over.
        trunk_alone: Whether tensors are those of trunks, under the names of trunks saved alone.
        device: Where to compute.
    """

    ingredient: Ingredient
    examples: Examples
    trunk_alone: bool
    device: str

    @classmethod
    def open(
        cls, ingredient: Ingredient, data: DataSpec | None, trunk_alone: bool, spec: DiagnosticsSpec, seed: int
    ) -> MemberLoss:
        """Open a member's training split.

        Args:
            ingredient: The member.
            data: Its data; null for what its manifest names.
            trunk_alone: Whether trunks are merged.
            spec: How many examples.
            seed: Seed of their choice.

        Raises:
            MergeError: If it is not known what the member learned, or its loss is no sum over examples.
            DataError: If the data is not what the member needs.
        """
        member, objective = check_loss(ingredient)
        model = model_of(*class_of(ingredient.folder), dict(ingredient.reader.items()))
        sample = StatisticsSpec(max_examples=spec.max_examples, batch_size=spec.batch_size, seed=seed)
        examples = open_examples(member, model, data or own_data(member), objective, sample)
        return cls(ingredient, examples, trunk_alone, "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def num_examples(self) -> int:
        """Size of the training split, N_t."""
        return len(self.examples.table)

    def model(self, tensors: CheckpointReader) -> Any:
        """Return the member's stock model with other weights, in float32 or wider.

        Half precision would round away most of a difference of gradients.

        Args:
            tensors: Whole models, or trunks, which are joined with the member's own head.

        Raises:
            ModelError: If a tensor is missing or left over.
        """
        own = self.ingredient
        whole = task_reader([own], tensors) if self.trunk_alone else tensors
        model: Any = model_of(*class_of(own.folder), dict(whole.items()))
        return model.to(self.device, torch.promote_types(model.dtype, torch.float32)).eval()

    def gradient(self, tensors: CheckpointReader) -> dict[str, Tensor]:
        """Return name on disk -> gradient of the summed loss; a model and its gradient are held at a time.

        Args:
            tensors: Whole models, or trunks, which are joined with the member's own head.

        Raises:
            ModelError: If a tensor is missing or left over.
        """
        own, model = self.ingredient, self.model(tensors)
        for indices in self.examples.batches:
            batch = self.examples.collator([self.examples.table[int(index)] for index in indices])
            batch = {name: value.to(self.device) for name, value in batch.items()}
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            compute_loss(self.examples.objective, logits, batch.get("labels"), statistics=False).loss_sum.backward()
        factor = self.num_examples / len(self.examples)
        gradients = {name: p.grad * factor for name, p in model.named_parameters() if p.grad is not None}
        on_disk = {name: value.cpu() for name, value in fisher_on_disk(model, gradients).items()}
        if not self.trunk_alone:
            return on_disk
        return {alone: on_disk[name] for name, alone in own.structure.trunk.items() if name in on_disk}


def check_loss(ingredient: Ingredient) -> tuple[Member, ObjectiveSpec]:
    """Return a member and what it learned, if its loss is a sum over examples.

    Raises:
        MergeError: If it is not, or it is not known what the member learned.
    """
    if ingredient.manifest is None or ingredient.manifest.objective is None:
        raise MergeError(
            f"{ingredient.reference}: no manifest says what it learned, so its loss has no gradient: leave `mismatch` "
            "out of `diagnostics.kinds`"
        )
    member = Member(ingredient.manifest, folder=ingredient.folder)
    objective = objective_of(member)
    if objective.name == "contrastive":
        raise MergeError(
            f"{ingredient.reference}: contrastive learning compares the images of a batch, so its loss is no sum over "
            "examples: leave `mismatch` out of `diagnostics.kinds`"
        )
    return member, objective


def gradient_mismatch(
    losses: Sequence[TaskLoss], alphas: Sequence[float], merged: CheckpointReader, members: Sequence[CheckpointReader]
) -> dict[str, Tensor]:
    """Return sum_t alpha_t [grad l_t(theta) - grad l_t(theta_t)], tensor by tensor, in float64.

    Two gradients and the sum are held at a time.

    Args:
        losses: The tasks' losses.
        alphas: Their weights.
        merged: The merge, theta.
        members: The tasks' own models, theta_t.
    """
    mismatch: dict[str, Tensor] = {}
    for loss, alpha, member in zip(losses, alphas, members, strict=True):
        here, there = loss.gradient(merged), loss.gradient(member)
        for name, gradient in here.items():
            difference = (gradient.double() - there[name].double()) * alpha
            mismatch[name] = mismatch[name].add_(difference) if name in mismatch else difference
    return mismatch


def mismatch_rows(
    mismatch: Mapping[str, Tensor], places: Places, curvature: Curvature | None = None
) -> list[dict[str, Any]]:
    """Return the length of a mismatch in every group of tensors, and in all.

    Args:
        mismatch: What `gradient_mismatch` returned.
        places: Where the tensors are.
        curvature: Returns the diagonal of H_0 for a tensor, null for one it does not know; null where nothing is.

    Returns:
        Rows with `group`, `norm`, and with a curvature `scaled` and `natural`, over the tensors whose curvature is
        known. Entries without gradient count as none, whatever their curvature; the two are null where an entry has
        a gradient and no curvature.
    """
    squares: dict[str, dict[str, float]] = {}
    for name, values in mismatch.items():
        squares[name] = {"norm": float(values.square().sum())}
        diagonal = None if curvature is None else curvature(name)
        if diagonal is not None:
            step = torch.where(values == 0, 0.0, values / diagonal.double().reshape(values.shape))
            squares[name] |= {"scaled": float(step.square().sum()), "natural": float((step * values).sum())}
    keys = ("norm",) if curvature is None else ("norm", "scaled", "natural")
    rows: list[dict[str, Any]] = []
    for group, names in [*groups_of(places, mismatch).items(), (TOTAL, list(mismatch))]:
        row: dict[str, Any] = {"group": group}
        for key in keys:
            known = [squares[name][key] for name in names if key in squares[name]]
            row[key] = math.sqrt(sum(known)) if known and math.isfinite(sum(known)) else None
        rows.append(row)
    return rows


def base_curvature(method: Method, inputs: MergeInputs) -> Curvature:
    """Return H_0 = s_0 F_0 + delta_0 as gradient matching takes it, tensor by tensor.

    Args:
        method: The merge's method; of gradient matching its own sizes and ridge are taken, else their defaults.
        inputs: Members and Fishers, with the sizes of the training sets.

    Raises:
        MergeError: If Fishers and members do not fit.
    """
    matching = method if isinstance(method, GradientMatching) else make_method("gradient_matching")
    assert isinstance(matching, GradientMatching)
    inputs = replace(inputs, report={}, dtype=torch.float64)
    matching.check(inputs)
    return partial(_diagonal, inputs, matching.overview(inputs))


def alphas_of(method: Method, inputs: MergeInputs) -> tuple[float, ...]:
    """Return what a method multiplies every member's task vector by, as far as its hyper-parameters say.

    That is `scale` times `weights` for methods that add task vectors, divided by the weights' sum where the method
    normalizes them; for methods that average, `weights` divided by their sum. What a method does to single entries
    is not in it.

    Args:
        method: The method.
        inputs: The merge's inputs.
    """
    name, count = method.name(), len(inputs.members)
    given = getattr(method, "weights", None)
    weights = per_member(1.0 if given is None else given, inputs, f"{name}: weights")
    scale: Any = getattr(method, "scale", None)
    adds = scale is not None and Need.BASE in method.needs
    if not adds or getattr(method, "normalize", None):
        total = sum(weights)
        weights = tuple(weight / total if total else 1 / count for weight in weights)
    scales = per_member(scale if adds else 1.0, inputs, f"{name}: scale")
    return tuple(one * other for one, other in zip(scales, weights, strict=True))


def _diagonal(inputs: MergeInputs, certainty: Any, name: str) -> Tensor | None:
    tensors = inputs.tensors(name)
    if not has_fisher(tensors):
        return None
    if inputs.base_fisher is not None:
        fisher = fisher_of(tensors, None)
    else:
        fisher = torch.stack([fisher_of(tensors, i) * size for i, size in enumerate(certainty.sizes)]).sum(0)
    return (fisher * certainty.base_size + certainty.ridge).cpu()
