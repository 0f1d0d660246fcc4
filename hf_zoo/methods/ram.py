"""RAM: average what several members changed, keep what one member alone changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.task_vectors import require_finite


@dataclass(frozen=True, kw_only=True)
class Ram(ElementwiseMethod):
    """Average the entries that several members changed and keep those that one member alone changed.

    Yuan et al. (2026): training by reinforcement changes few weights, and a mean over all members would dilute what
    only one of them has learned. Entries of a task vector above `epsilon` in magnitude count as changed. With a
    `rescale` this is RAM+ (0.1 in the paper): what member t alone changed is multiplied by 1 + rescale min(rho_t,
    limit), where rho_t is how many of its changed entries it shares, for each that it does not, over the whole model
    (`scope: tensor` counts in each tensor, as mergekit's `ramplus_tl` does).

    Attributes:
        epsilon: Up to which magnitude an entry counts as unchanged.
        rescale: How much the entries of one member alone are strengthened; r in the paper, 0 for plain RAM.
        limit: Largest ratio of shared to own entries that counts; alpha in the paper.
        scope: Where they are counted.
        scale: Multiplies the merged vector.
    """

    paper: ClassVar[Paper] = Paper(
        "Behavior Knowledge Merge in Reinforced Agentic Models",
        "Yuan et al.",
        2026,
        "https://arxiv.org/abs/2601.13572",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})

    epsilon: float = 1e-5
    rescale: float = 0.0
    limit: float = 0.2
    scope: Literal["vector", "tensor"] = "vector"
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_finite("ram", epsilon=self.epsilon, rescale=self.rescale, limit=self.limit, scale=self.scale)
        if self.epsilon < 0 or self.rescale < 0 or self.limit < 0:
            raise MergeError(
                f"ram: epsilon, rescale and limit must be 0 or more, got {self.epsilon}, {self.rescale}, {self.limit}"
            )

    @property
    def surveys(self) -> bool:  # type: ignore[override]
        """Whether every tensor has ratios of its own."""
        return self.rescale > 0 and self.scope == "tensor"

    def overview(self, inputs: MergeInputs) -> tuple[float, ...]:
        """Return every member's factor for what it alone changed, where it is counted over the whole model."""
        if self.rescale > 0 and self.scope == "vector":
            return self._factors(inputs.floating(), len(inputs.members))
        return (1.0,) * len(inputs.members)

    def survey(self, tensors: MemberTensors, overview: tuple[float, ...]) -> tuple[float, ...]:
        """Return every member's factor, counted in one tensor where it is to be."""
        return self._factors([tensors], len(tensors)) if self.surveys else overview

    def blend(self, pieces: MemberTensors, survey: tuple[float, ...]) -> Tensor:
        """Return the base plus the merged vector; one member's entries are held at a time."""
        base = pieces.base
        total, alone, count = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
        for changed, factor in zip(self._changed(pieces, base), survey, strict=True):
            total.add_(changed)
            alone.add_(changed, alpha=factor)
            count.add_(changed.sign_().abs_())
        if any(factor != 1 for factor in survey):
            total = torch.where(count == 1, alone, total)
        return total.div_(count.clamp_(min=1)).mul_(self.scale).add_(base)

    def _factors(self, tensors: Iterable[MemberTensors], count: int) -> tuple[float, ...]:
        shared, own = [0] * count, [0] * count
        for piece in (piece for tensor in tensors for piece in tensor.pieces()):
            changed = [vector != 0 for vector in self._changed(piece, piece.base)]
            members = torch.stack(changed).sum(0)
            for place, mask in enumerate(changed):
                shared[place] += int((mask & (members > 1)).sum())
                own[place] += int((mask & (members == 1)).sum())
        # Where nothing is a member's own its factor does not matter.
        return tuple(1 + self.rescale * min(a / max(b, 1), self.limit) for a, b in zip(shared, own, strict=True))

    def _changed(self, piece: MemberTensors, base: Tensor) -> Iterator[Tensor]:
        """Yield every member's task vector without what counts as unchanged."""
        return (torch.nn.functional.hardshrink(member - base, self.epsilon) for member in piece)
