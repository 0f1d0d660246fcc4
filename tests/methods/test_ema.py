"""The exponential moving average against its recursion and its limits."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.ema import Ema


def merge_values(values, **parameters):
    members = [CheckpointReader.of({"w": torch.tensor(value)}, f"m{i}") for i, value in enumerate(values)]
    return dict(Ema(**parameters).merge(MergeInputs.of(members)))["w"].tolist()


def test_by_hand():
    # 8 -> (8 + 0) / 2 = 4 -> (4 + 2) / 2 = 3
    assert merge_values([[8.0], [0.0], [2.0]], decay=0.5) == [3.0]
    # Half, a quarter and an eighth from the last to the first, of 7/8 in all.
    assert merge_values([[8.0], [0.0], [2.0]], decay=0.5, start="zero") == pytest.approx([(1.0 + 0.0 + 1.0) * 8 / 7])


@pytest.mark.parametrize("start", ["first", "zero"])
def test_the_recursion(start):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(12, 5, generator=draw)
    average = values[0].double() if start == "first" else torch.zeros(5).double()
    for value in values[1:] if start == "first" else values:
        average = 0.8 * average + 0.2 * value.double()
    wanted = average if start == "first" else average / (1 - 0.8**12)
    assert merge_values(values.tolist(), decay=0.8, start=start) == pytest.approx(wanted.tolist(), abs=1e-6)


def test_its_limits():
    values = [[1.0], [2.0], [6.0]]
    for start in ("first", "zero"):
        assert merge_values(values, decay=0.0, start=start) == [6.0]
        assert merge_values(values[:1], start=start) == [1.0]
    assert merge_values(values, decay=1 - 1e-9, start="zero") == pytest.approx([3.0])
    assert merge_values(values, decay=1 - 1e-9) == pytest.approx([1.0])


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_never_moves_is_refused(decay):
    with pytest.raises(MergeError, match="decay must be at least 0 and below 1"):
        Ema(decay=decay)
