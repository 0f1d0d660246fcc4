"""One model's weights, unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import NEED_FIELDS, ElementwiseMethod, Need, Paper


@dataclass(frozen=True, kw_only=True)
class Passthrough(ElementwiseMethod):
    """Keep one model's weights as they are.

    For stacks of layers (Kim et al., 2023, section 3), and for tensors that shall not be merged.

    Attributes:
        keep: `base`, or the place of a member, the first being 0.
        scale: Factor on the weights, as mergekit's `scale`.
    """

    paper: ClassVar[Paper] = Paper(
        "SOLAR 10.7B: scaling large language models with simple yet effective depth up-scaling",
        "Kim et al.",
        2023,
        "https://arxiv.org/abs/2312.15166",
    )

    keep: int | str = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.keep != "base" and not (isinstance(self.keep, int) and self.keep >= 0):
            raise MergeError(f"passthrough: keep must be `base` or the place of a member from 0, got {self.keep!r}")

    @property
    def uses_base(self) -> bool:
        """Whether the base is what is kept."""
        return self.keep == "base"

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a model that is not there.

        Raises:
            MergeError: If there is no such member, or no base.
        """
        super().check(inputs)
        if self.keep == "base" and getattr(inputs, NEED_FIELDS[Need.BASE]) is None:
            raise MergeError(f"passthrough: keep: base needs {Need.BASE.value}, and there is none")
        if isinstance(self.keep, int) and self.keep >= len(inputs.members):
            raise MergeError(f"passthrough: there is no member {self.keep}: there are {len(inputs.members)}, from 0")

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the model's entries."""
        kept = pieces.base if self.keep == "base" else pieces[int(self.keep)]
        return kept if self.scale == 1 else kept * self.scale
