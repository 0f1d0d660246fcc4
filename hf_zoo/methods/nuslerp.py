"""The arc between two members or their task vectors, also row by row or column by column."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.geometry import Vectors, gram_matrices, mix, slerp_coefficients
from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper

# Beyond it the angle is lost in float64's rounding of the cosine: 1 - cos^2 below 1e-14.
PARALLEL = 1 - 5e-15


@dataclass(frozen=True, kw_only=True)
class Nuslerp(ElementwiseMethod):
    """Walk along the arc between two members or their task vectors, by tensor, row or column.

    As `slerp`, with weights in place of t, linear only where the angle vanishes, and the choice of what a vector is.
    mergekit's `nuslerp` is the same for a whole tensor and for matrices: its `nuslerp_flatten: false` is `rows` here,
    with `nuslerp_row_wise: true` also `columns`; a `base_model` there is `task_vectors: true` here. For kernels of
    convolutions a row here is all an output reads, there one line of the kernel.

    Attributes:
        weights: One for each of the two members, their sum not 0; the second's share is how far to go. Null for half.
        vectors: What walks along an arc of its own: the whole `tensor`, each of its `rows` (what one output reads), or
            each of its `columns`. Tensors of one dimension are one vector.
        task_vectors: Whether the members' differences to the base are interpolated and added to it, not the weights.
    """

    paper: ClassVar[Paper] = Paper(
        "Animating rotation with quaternion curves", "Shoemake", 1985, "https://doi.org/10.1145/325165.325242"
    )
    linear: ClassVar[bool] = True
    arity: ClassVar[tuple[int, int | None]] = (2, 2)
    surveys: ClassVar[bool] = True

    weights: tuple[float, float] | None = None
    vectors: Vectors = "tensor"
    task_vectors: bool = False

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is not None and not (all(map(math.isfinite, weights)) and abs(sum(weights)) > 1e-6):
            raise MergeError(f"weights must be two finite numbers whose sum is not 0, got {list(weights)}")
        if self.task_vectors:
            object.__setattr__(self, "needs", frozenset({Need.BASE}))

    def survey(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the two members' factors for each vector, (V, 2)."""
        t = 0.5 if self.weights is None else self.weights[1] / sum(self.weights)
        gram_VKK = gram_matrices(tensors, task_vectors=self.task_vectors, vectors=self.vectors)
        return slerp_coefficients(gram_VKK, t, PARALLEL)

    def blend(self, pieces: MemberTensors, survey: Tensor) -> Tensor:
        """Return the entries of the points on the arcs."""
        return mix(pieces, survey, task_vectors=self.task_vectors, vectors=self.vectors)
