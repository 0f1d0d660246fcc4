"""The mean of a run's last snapshots."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.epoch_soup import EpochSoup


def merge_values(values, **parameters):
    members = [CheckpointReader.of({"w": torch.tensor(value)}, f"m{i}") for i, value in enumerate(values)]
    return dict(EpochSoup(**parameters).merge(MergeInputs.of(members)))["w"].tolist()


def test_by_hand():
    assert merge_values([[100.0], [1.0], [2.0], [6.0]], last=3) == [3.0]
    assert merge_values([[100.0], [1.0]], last=1) == [1.0]
    assert merge_values([[9.0], *([float(i)] for i in range(5))]) == [2.0]  # five by default


def test_earlier_members_are_not_read():
    read = []

    def watched(index):
        def read_tensor(name):
            read.append(index)
            return torch.full((2,), float(index))

        reader = CheckpointReader.of({"w": torch.zeros(2)}, f"m{index}")
        return CheckpointReader(reader.source, reader.layout, read_tensor, {})

    merged = dict(EpochSoup(last=2).merge(MergeInputs.of([watched(i) for i in range(4)])))["w"]
    assert merged.tolist() == [2.5, 2.5]
    assert set(read) == {2, 3}


def test_too_few_members_are_refused():
    with pytest.raises(MergeError, match=r"epoch_soup averages the last 5 members, got 2: give more .* lower `last`"):
        merge_values([[1.0], [2.0]])
    with pytest.raises(MergeError, match="last must be at least 1, got 0"):
        EpochSoup(last=0)
