"""The arc between two members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.geometry import gram_matrices, mix, slerp_coefficients
from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Paper


@dataclass(frozen=True, kw_only=True)
class Slerp(ElementwiseMethod):
    """Walk from the first of two members to the second along the arc between them, tensor by tensor.

    Shoemake (1985) on each tensor laid out flat, lengths left as they are:
    sin((1 - t) theta) / sin(theta) times the first plus sin(t theta) / sin(theta) times the second, theta being the
    angle between them. Nearly parallel or opposite tensors are interpolated linearly. A tensor of zeros has no
    direction and counts as orthogonal to the other. The same numbers as mergekit's `slerp`, whose `base_model` is the
    first member here.

    Attributes:
        t: How far to go: 0 is the first member, 1 the second.
        threshold: Tensors whose cosine is beyond it, on either side, are interpolated linearly.
    """

    paper: ClassVar[Paper] = Paper(
        "Animating rotation with quaternion curves", "Shoemake", 1985, "https://doi.org/10.1145/325165.325242"
    )
    linear: ClassVar[bool] = True
    arity: ClassVar[tuple[int, int | None]] = (2, 2)
    surveys: ClassVar[bool] = True

    t: float = 0.5
    threshold: float = 0.9995

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise MergeError(f"t must lie in 0 to 1, got {self.t}")
        if not 0 <= self.threshold < 1:
            raise MergeError(f"threshold must be at least 0 and below 1, got {self.threshold}")

    def survey(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the two members' factors, (1, 2)."""
        return slerp_coefficients(gram_matrices(tensors), self.t, self.threshold)

    def blend(self, pieces: MemberTensors, survey: Tensor) -> Tensor:
        """Return the entries of the point on the arc."""
        return mix(pieces, survey)
