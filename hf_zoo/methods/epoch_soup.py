"""The mean of a run's last snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Paper


@dataclass(frozen=True, kw_only=True)
class EpochSoup(ElementwiseMethod):
    """Average the last members of a run, given in the order of training.

    Izmailov et al. (2018), algorithm 1, on snapshots taken once an epoch.

    Attributes:
        last: How many of the last members to average.
    """

    paper: ClassVar[Paper] = Paper(
        "Averaging weights leads to wider optima and better generalization",
        "Izmailov et al.",
        2018,
        "https://arxiv.org/abs/1803.05407",
    )
    linear: ClassVar[bool] = True

    last: int = 5

    def __post_init__(self) -> None:
        if self.last < 1:
            raise MergeError(f"last must be at least 1, got {self.last}")

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse fewer members than are to be averaged.

        Raises:
            MergeError: If there are fewer than `last`.
        """
        super().check(inputs)
        if len(inputs.members) < self.last:
            raise MergeError(
                f"epoch_soup averages the last {self.last} members, got {len(inputs.members)}: give more snapshots, "
                "or lower `last`"
            )

    def blend(self, pieces: MemberTensors, survey: None) -> Tensor:
        """Return the mean; the members before the last are not read."""
        count = len(pieces)
        return weighted_mean(pieces[index] for index in range(count - self.last, count))
