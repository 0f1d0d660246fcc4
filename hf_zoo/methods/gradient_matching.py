"""Task vectors added or removed with the curvature of every task and of the base taken into account."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.information import check_fishers, fisher_of, has_fisher, moment_of
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member


@dataclass(frozen=True, kw_only=True)
class GradientMatching(ElementwiseMethod):
    """Add task vectors so that their gradients match those of training on all tasks at once.

    Daheim et al. (2024), uncertainty-based gradient matching, with diagonal curvature: with `H_0 = s_0 F_0 + delta_0`
    and `H_t = s_t F_t`, the merge is `theta_0 + sum_t alpha_t (H_0 + H_t) (theta_t - theta_0) / (H_0 + sum_t alpha_t
    H_t)`. It is exact where losses are quadratic with such a curvature. Task arithmetic is its limit for tasks without
    curvature, the Fisher average its limit for a base without.

    Entries without any curvature are merged by task arithmetic. Tensors without a Fisher, such as running statistics,
    get the mean of the members that are added, weighted by alpha.

    A negative alpha removes a task. The sum of curvatures may then be near zero or negative, as Fishers are estimates;
    `removal` says what to do, and the report holds the share of entries that reached the floor.

    Attributes:
        scale: The paper's alpha: one for all tasks or one a member; negative to remove what the member learned.
        examples: The paper's s_t, the sizes of the members' training sets. Null takes those of their manifests.
        base_examples: The paper's s_0, the size of the base's training set. Null takes that of its manifest, and the
            mean of the members' where nothing is known of it.
        ridge: The paper's delta_0, 0 or more: curvature of the base that is not due to its data.
        relative_ridge: Whether the ridge is a share of the mean curvature of the base, `mean(s_0 F_0)` over the whole
            model. If not, it is in units of the sum of losses: the weight decay the base was trained with.
        removal: `floor` raises the sum of curvatures to `floor` times H_0; `safe` leaves removed tasks out of the sum;
            `plain` subtracts removed tasks' vectors as they are, times alpha.
        floor: Least sum of curvatures in units of H_0, in (0, 1].

    The base's Fisher is optional: without it, F_0 is the mean of the members' Fishers, weighted by s_t. As F_t is
    estimated after training on a task, this takes the base to be as certain as its children of what matters to them.
    """

    paper: ClassVar[Paper] = Paper(
        "Model merging by uncertainty-based gradient matching",
        "Daheim et al.",
        2024,
        "https://arxiv.org/abs/2310.12808",
    )
    notes: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE, Need.FISHER})

    scale: float | tuple[float, ...] = 1.0
    examples: float | tuple[float, ...] | None = None
    base_examples: float | None = None
    ridge: float = 1e-12
    relative_ridge: bool = True
    removal: Literal["floor", "safe", "plain"] = "floor"
    floor: float = 0.1

    def __post_init__(self) -> None:
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not all(map(math.isfinite, scales)):
            raise MergeError(f"scale must be finite, got {self.scale}")
        sizes = self.examples if isinstance(self.examples, tuple) else (self.examples,)
        for what, size in [*(("examples", size) for size in sizes), ("base_examples", self.base_examples)]:
            if size is not None and not 0 <= size < math.inf:
                raise MergeError(f"{what} must be 0 or more and finite, got {size}")
        if not 0 <= self.ridge < math.inf:
            raise MergeError(f"ridge must be 0 or more and finite, got {self.ridge}")
        if not 0 < self.floor <= 1:
            raise MergeError(f"floor must be in (0, 1], got {self.floor}")

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse Fishers of other models, and members of unknown training sets.

        Raises:
            MergeError: If Fishers and members do not fit, the sizes of training sets are unknown, or there is not one
                scale or size per member.
        """
        super().check(inputs)
        check_fishers(inputs, self.name())
        per_member(self.scale, inputs, "gradient_matching: scale")
        if self.examples is None and inputs.num_examples is None:
            raise MergeError(
                "gradient_matching needs the sizes of the members' training sets, and their manifests do not say "
                "them: give `examples`"
            )
        per_member(self._sizes(inputs), inputs, "gradient_matching: examples")

    def overview(self, inputs: MergeInputs) -> _Certainty:
        """Return how much every model counts, and the ridge."""
        sizes = per_member(self._sizes(inputs), inputs, "gradient_matching: examples")
        base_size = self.base_examples if self.base_examples is not None else inputs.base_num_examples
        if base_size is None:
            base_size = sum(sizes) / len(sizes)
        pooled = inputs.base_fisher is None
        if pooled:
            base_size = base_size / sum(sizes) if sum(sizes) else 0.0
        ridge = self.ridge
        if ridge and self.relative_ridge:
            ridge *= base_size * _mean_fisher(inputs, sizes)
        inputs.report["base_fisher"] = "mean of the members'" if pooled else "given"
        inputs.report["base_examples"] = base_size * (sum(sizes) if pooled else 1)
        scales = per_member(self.scale, inputs, "gradient_matching: scale")
        return _Certainty(scales, sizes, base_size, ridge, inputs.report)

    def blend(self, pieces: MemberTensors, survey: _Certainty) -> Tensor:
        """Return merged entries; one member's entries and Fisher are held at a time."""
        base, scales = pieces.base, survey.scales
        if not has_fisher(pieces):
            added = [max(scale, 0.0) for scale in scales]
            return weighted_mean(pieces, added) if any(added) else base
        pooled = pieces.inputs.base_fisher is None
        # theta - theta_0 = (H_0 steps + matched) / (H_0 + curvature) + subtracted
        steps, matched, curvature, total, subtracted = (torch.zeros_like(base) for _ in range(5))
        for index, scale in enumerate(scales):
            curvature_of = fisher_of(pieces, index) * survey.sizes[index]
            if pooled:
                total.add_(curvature_of)
            if scale == 0:
                continue
            vector = pieces[index] - base
            if scale < 0 and self.removal == "plain":
                subtracted.add_(vector, alpha=scale)
                continue
            steps.add_(vector, alpha=scale)
            matched.addcmul_(curvature_of, vector, value=scale)
            if scale > 0 or self.removal == "floor":
                curvature.add_(curvature_of, alpha=scale)
        of_base = (total if pooled else fisher_of(pieces, None)) * survey.base_size
        of_base.add_(survey.ridge)
        curvature.add_(of_base)
        if self.removal == "floor" and min(scales) < 0:
            least = of_base * self.floor
            survey.count_floored(int((curvature < least).sum()), base.numel())
            curvature = torch.maximum(curvature, least)
        flat = curvature == 0
        merged = matched.addcmul_(of_base, steps).div_(curvature)
        if bool(flat.any()):
            merged = torch.where(flat, steps, merged)
        return merged.add_(subtracted).add_(base)

    def _sizes(self, inputs: MergeInputs) -> float | tuple[float, ...]:
        sizes = inputs.num_examples if self.examples is None else self.examples
        assert sizes is not None  # `check` has refused otherwise
        return sizes


@dataclass(frozen=True)
class _Certainty:
    """How much every model counts.

    Attributes:
        scales: The members' alpha.
        sizes: Factors of the members' Fishers, s_t.
        base_size: Factor of the base's Fisher, s_0, or of the sum of all H_t where it stands in for it.
        ridge: The delta_0 of every entry.
        report: Where to say how many entries reached the floor.
    """

    scales: tuple[float, ...]
    sizes: tuple[float, ...]
    base_size: float
    ridge: float
    report: dict[str, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_floored(self, floored: int, of: int) -> None:
        """Add to the report; pieces come from several threads."""
        with self.lock:
            before = self.report.get("floored", {"entries": 0, "of": 0})
            entries, of = before["entries"] + floored, before["of"] + of
            self.report["floored"] = {"entries": entries, "of": of, "share": entries / of if of else 0.0}


def _mean_fisher(inputs: MergeInputs, sizes: tuple[float, ...]) -> float:
    """Return the mean entry of the base's Fisher, or of the sum of the members' H_t where there is none."""
    assert inputs.fisher is not None
    factors = sizes if inputs.base_fisher is None else (1.0,)
    fishers = inputs.fisher if inputs.base_fisher is None else (inputs.base_fisher,)
    mean = 0.0
    for fisher, factor in zip(fishers, factors, strict=True):
        total, count = moment_of(fisher, 1)
        mean += factor * total / max(count, 1)
    return mean
