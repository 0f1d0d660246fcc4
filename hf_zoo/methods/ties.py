"""TIES: trim the task vectors, elect signs, merge what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.methods.base import ElementwiseMethod, Paper, per_member
from hf_zoo.task_vectors import Election, TaskVectorMethod, require_fractions
from hf_zoo.trimming import least_kept, trim

Thresholds = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Ties(TaskVectorMethod, ElementwiseMethod):
    """Keep the largest entries of every task vector, elect a sign for each entry, and average those that agree.

    Yadav et al. (2023), section 3: each task vector keeps the `density` of its entries that is largest in magnitude;
    the sign of an entry is that of the sum of what is left; the mean of the entries of that sign, times `scale`, is
    added to the base. Defaults are those the paper uses without held-out data. All entries equal to the smallest kept
    one are kept too, as in the authors' code.

    Attributes:
        density: Fraction of the entries to keep, one for all or one per member.
        trim: Whether the largest are chosen among all entries of the model (`vector`, as in the paper) or among those
            of each tensor (`tensor`, as in mergekit).
        election: Elect signs by the sum of the entries (`total`, the paper) or by the number of members (`count`);
            `none` adds what is left.
        weights: How much each task vector counts, in the election and in the mean.
        normalize: Divide by the weights of the members that agree; null does so where signs are elected.
        scale: Multiplies the merged vector; lambda in the paper.
        tie: What becomes of an entry whose two signs weigh the same: `zero` leaves the base, as sgn(0) = 0 in the
            paper; `positive` elects the positive side, as mergekit does.
    """

    paper: ClassVar[Paper] = Paper(
        "TIES-Merging: Resolving Interference When Merging Models",
        "Yadav et al.",
        2023,
        "https://arxiv.org/abs/2306.01708",
    )

    density: float | tuple[float, ...] = 0.2
    trim: Literal["vector", "tensor"] = "vector"
    election: Election = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions("ties", density=self.density)

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse a wrong number of densities or weights.

        Raises:
            MergeError: If there is not one per member.
        """
        super().check(inputs)
        per_member(self.density, inputs, "ties: density")

    @property
    def surveys(self) -> bool:  # type: ignore[override]
        """Whether every tensor has thresholds of its own."""
        return self.trim == "tensor"

    def overview(self, inputs: MergeInputs) -> Thresholds | None:
        """Return every member's threshold over the whole task vector."""
        return self._thresholds(list(inputs.floating()), inputs) if self.trim == "vector" else None

    def survey(self, tensors: MemberTensors, overview: Thresholds | None) -> Thresholds:
        """Return every member's threshold in one tensor, or over the whole task vector."""
        return overview or self._thresholds([tensors], tensors.inputs)

    def blend(self, pieces: MemberTensors, survey: Thresholds) -> Tensor:
        """Return the base plus the elected mean; one member's entries are held at a time."""
        base = pieces.base
        trimmed = (trim(member - base, least) for member, least in zip(pieces, survey, strict=True))
        return self.added(base, trimmed, pieces.inputs)

    def _thresholds(self, tensors: list[MemberTensors], inputs: MergeInputs) -> Thresholds:
        return least_kept(tensors, per_member(self.density, inputs, "ties: density"))
