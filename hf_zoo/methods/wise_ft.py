"""The straight line from the base to a member, or from one member to another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.means import completed
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WiseFt(ElementwiseMethod):
    """Stand on the straight line from the base to a member, or from one member to another.

    Wortsman et al. (2022), equation 1: (1 - alpha) times the weights before fine-tuning plus alpha times those after.

    Attributes:
        alpha: How far to go: 0 is the line's start, 1 its end; the paper recommends 0.5 where nothing is known.
        start: Where the line starts: at the `base`, with one member, or at the first of two members, `member`.
        grid: Places to try on held-out data instead of `alpha`, besides both ends; the best is taken, the first of
            equals. The report has all `scores` and the `barrier`, max over alpha of (1 - alpha) score(0) + alpha
            score(1) - score(alpha): by how much the line falls below the straight connection of its ends' scores.
    """

    paper: ClassVar[Paper] = Paper(
        "Robust fine-tuning of zero-shot models", "Wortsman et al.", 2022, "https://arxiv.org/abs/2109.01903"
    )
    linear: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    arity: ClassVar[tuple[int, int | None]] = (1, 1)

    alpha: float = 0.5
    start: Literal["base", "member"] = "base"
    grid: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field, values in (("alpha", (self.alpha,)), ("grid", self.grid or ())):
            if not all(0 <= value <= 1 for value in values):
                raise MergeError(f"{field} must lie in 0 to 1, got {', '.join(map(str, values))}")
        needs = {Need.BASE} if self.start == "base" else set()
        object.__setattr__(self, "needs", frozenset(needs if self.grid is None else needs | {Need.SCORE}))
        object.__setattr__(self, "arity", (1, 1) if self.start == "base" else (2, 2))

    def overview(self, inputs: MergeInputs) -> float:
        """Return how far to go; with a grid, every place on it is scored, computed tensor by tensor."""
        return self.alpha if self.grid is None else self.chosen(inputs, lambda: self._best(inputs))

    def blend(self, pieces: MemberTensors, survey: float) -> Tensor:
        """Return the point's entries."""
        start, end = pieces.base if self.start == "base" else pieces[0], pieces[len(pieces) - 1]
        wide = torch.promote_types(start.dtype, end.dtype)
        return torch.lerp(start.to(wide), end.to(wide), survey)

    def _best(self, inputs: MergeInputs) -> float:
        assert inputs.score is not None  # `Method.check` has refused otherwise
        assert self.grid is not None
        places = sorted({0.0, 1.0, *self.grid})
        scores = [inputs.score(self._line(inputs, alpha)) for alpha in places]
        level = [(1 - alpha) * scores[0] + alpha * scores[-1] for alpha in places]
        best = places[scores.index(max(scores))]
        inputs.report.update({
            "scores": {str(alpha): score for alpha, score in zip(places, scores, strict=True)},
            "barrier": max(straight - score for straight, score in zip(level, scores, strict=True)),
            "alpha": best,
        })
        logger.info("wise_ft: best of %d places at alpha %g, score %.4f", len(places), best, max(scores))
        return best

    def _line(self, inputs: MergeInputs, alpha: float) -> CheckpointReader:
        """Return the model at a place, to be scored, every tensor computed when it is asked for."""

        def read(name: str) -> Tensor:
            dtype = inputs.layout[name].dtype
            if not dtype.is_floating_point:
                return inputs.members[0][name]
            return self.blend(inputs.tensors(name), alpha).to("cpu", dtype)

        return completed(CheckpointReader(f"line at {alpha:g}", inputs.layout, read, {}), inputs)
