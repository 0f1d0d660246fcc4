"""The sum of the members' task vectors, added to the base or taken away from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.task_vectors import require_finite, weighted_sum, weights_of


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(ElementwiseMethod):
    """Add the members' scaled task vectors to the base.

    theta = theta_0 + scale * sum_t w_t (theta_t - theta_0), Ilharco et al. (2023), section 3. A negative scale or
    weight takes away what a member has learned (negation, section 4); `weights: [1, -1, 1]` makes the analogy of
    section 6. The paper tunes the scale on held-out data between 0 and 1, and uses 0.4 where it cannot.

    Attributes:
        scale: Multiplies the sum of the task vectors.
        weights: How much each task vector counts; null counts all once.
        normalize: Divide the sum by the sum of the weights.
    """

    paper: ClassVar[Paper] = Paper(
        "Editing Models with Task Arithmetic", "Ilharco et al.", 2023, "https://arxiv.org/abs/2212.04089"
    )
    linear: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    scale: float = 0.4
    weights: float | tuple[float, ...] | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        require_finite("task_arithmetic", scale=self.scale, weights=self.weights)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of weights.

        Raises:
            MergeError: If there is not one weight per member, or nothing to divide by.
        """
        super().check(inputs)
        weights = weights_of(self.weights, inputs, "task_arithmetic")
        if self.normalize and abs(sum(weights)) < 1e-8:
            raise MergeError(f"task_arithmetic: weights {list(weights)} sum to 0: set `normalize: false`")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the base plus the scaled sum; one member's entries are held at a time."""
        weights = weights_of(self.weights, pieces.inputs, "task_arithmetic")
        factor = self.scale / sum(weights) if self.normalize else self.scale
        base = pieces.base
        total = weighted_sum((member - base for member in pieces), weights)
        return total.mul_(factor).add_(base)
