"""Entries swapped where two members nearly agree, by hand and by its author's formula."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.nearswap import Nearswap


def merge_values(values, **parameters):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    return dict(Nearswap(**parameters).merge(MergeInputs.of(members)))["w"]


def test_by_hand():
    first, second = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.25, 3.0, -1.0, 1.0])
    assert merge_values([first, second], t=0.5).tolist() == [1.25, 1.5, 0.5, 1.0]


def test_its_authors_formula():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 200_000, generator=draw, dtype=torch.float64)
    weight = (0.3 / (first - second).abs()).clamp(max=1)
    torch.testing.assert_close(merge_values([first, second], t=0.3), weight * second + (1 - weight) * first)


def test_its_limits():
    first, second = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert merge_values([first, second], t=0.0).tolist() == first.tolist()
    assert merge_values([first, second], t=float("inf")).tolist() == second.tolist()


@pytest.mark.parametrize("t", [-1.0, float("nan")])
def test_a_negative_change_is_refused(t):
    with pytest.raises(MergeError, match="t must not be negative"):
        Nearswap(t=t)
