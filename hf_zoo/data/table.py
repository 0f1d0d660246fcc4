"""What image and text tables share: samples that know their epoch, also in worker processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset


class EpochTable(Dataset[dict[str, Any]]):
    """A table whose samples carry the epoch they are drawn in.

    The epoch lies in shared memory: persistent worker processes, which keep their copy of the table from the first
    epoch on, see `set_epoch` too.
    """

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Passes over the data done."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say how many passes are done; accelerate calls it before each."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        raise NotImplementedError
