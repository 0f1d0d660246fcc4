"""Arcee Fusion: take over the entries of one model that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import PIECE_ENTRIES, MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper
from hf_zoo.trimming import kth_largest


@dataclass(frozen=True)
class Importance:
    """What is known of a tensor.

    Attributes:
        divergence: Of each row, (rows,).
        least: The smallest importance that is taken over.
    """

    divergence: Tensor
    least: float


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(ElementwiseMethod):
    """Take the most important entries of one member and keep the base's everywhere else.

    As in mergekit, whose documentation is the method's only description. An entry's importance is the magnitude of its
    change times the divergence KL(softmax(row of the member) || softmax(row of the base)) of its row, the last axis of
    its tensor. In each tensor the entries whose importance reaches median + `fence` * interquartile range are taken
    over. A member and a base, no more.

    The divergence is found in float64: in float32, as in mergekit, those of fine-tuned models, often below 1e-8, are
    rounding noise and can come out negative. The quartiles are exact, mergekit's those of a sample in large tensors.

    Attributes:
        fence: How far above the median an entry must be, in interquartile ranges; 1.5 takes about an eighth.
    """

    paper: ClassVar[Paper] = Paper(
        "Arcee Fusion, in mergekit's documentation",
        "Arcee AI",
        2025,
        "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    arity: ClassVar[tuple[int, int | None]] = (1, 1)
    surveys: ClassVar[bool] = True

    fence: float = 1.5

    def __post_init__(self) -> None:
        if not self.fence >= 0:
            raise MergeError(f"arcee_fusion: fence must be 0 or more, got {self.fence}")

    def survey(self, tensors: MemberTensors, overview: None) -> Importance:
        """Return the rows' divergences and the smallest importance that is taken over."""
        length = _row_length(tensors)
        found = [
            divergence(rows[0].reshape(-1, length), rows.base.reshape(-1, length))
            for rows in tensors.pieces(length * max(1, PIECE_ENTRIES // length))
            if rows.numel
        ]
        if not found:
            return Importance(torch.zeros(0), 0.0)
        of_rows = torch.cat(found)
        # Counted from the largest, places of the quartiles as mergekit rounds them.
        ranks = [tensors.numel - int(part * (tensors.numel - 1)) for part in (0.25, 0.5, 0.75)]
        ((low, median, high),) = kth_largest([tensors], [ranks], lambda piece: [_importance(piece, of_rows, length)])
        return Importance(of_rows, median + self.fence * (high - low))

    def blend(self, pieces: MemberTensors, survey: Importance) -> Tensor:
        """Return the member's entries where they are important, the base's elsewhere."""
        important = _importance(pieces, survey.divergence, _row_length(pieces)) >= survey.least
        return torch.where(important, pieces[0], pieces.base)


def divergence(rows: Tensor, base: Tensor) -> Tensor:
    """Return KL(softmax(row) || softmax(row of the base)) of each row.

    Args:
        rows: (rows, n).
        base: (rows, n).

    Returns:
        Non-negative, (rows,), in float64.
    """
    ours, theirs = rows.double().log_softmax(1), base.double().log_softmax(1)
    return (ours.exp() * (ours - theirs)).sum(1).clamp_(min=0)


def _importance(piece: MemberTensors, of_rows: Tensor, length: int) -> Tensor:
    """Return how important the entries of a piece are, which may begin and end within a row."""
    first, last = piece.start // length, -(-(piece.start + piece.numel) // length)
    factors = of_rows[first:last].repeat_interleave(length)
    change = (piece[0] - piece.base).abs_()
    return change.mul_(factors[piece.start - first * length :][: piece.numel])


def _row_length(tensors: MemberTensors) -> int:
    return max(1, tensors.shape[-1] if tensors.shape else 1)
