"""The line from the base to a member, or between members."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.wise_ft import WiseFt


def merge_values(values, base=None, **parameters):
    members = [CheckpointReader.of({"w": torch.tensor(value)}, f"m{i}") for i, value in enumerate(values)]
    base = None if base is None else CheckpointReader.of({"w": torch.tensor(base)}, "base")
    return dict(WiseFt(**parameters).merge(MergeInputs.of(members, base=base)))["w"].tolist()


def test_by_hand():
    assert merge_values([[3.0, 8.0]], [1.0, 4.0]) == [2.0, 6.0]
    assert merge_values([[3.0, 8.0]], [1.0, 4.0], alpha=0.25) == [1.5, 5.0]


def test_between_two_members_no_base_is_needed():
    assert merge_values([[1.0, 4.0], [3.0, 8.0]], start="member", alpha=0.75) == [2.5, 7.0]


@pytest.mark.parametrize("start", ["base", "member"])
def test_the_ends_are_exact(start):
    # In float32 0.1 + (1e8 - 0.1) is no longer 1e8 for every such pair.
    first, second = [0.1, 1e8, 1 / 3], [1e8, 0.1, -1e-8]
    given = {"values": [second], "base": first} if start == "base" else {"values": [first, second]}
    for alpha, end in ((0.0, first), (1.0, second)):
        assert merge_values(**given, alpha=alpha, start=start) == torch.tensor(end).tolist()


def test_the_wider_type_is_kept():
    members = [CheckpointReader.of({"w": torch.tensor([1 + 2**-40], dtype=torch.float64)}, "m")]
    inputs = MergeInputs.of(members, base=CheckpointReader.of({"w": torch.ones(1)}, "base"))
    assert dict(WiseFt(alpha=1.0).merge(inputs))["w"].item() == 1 + 2**-40


def test_a_line_has_two_ends():
    with pytest.raises(MergeError, match="wise_ft merges 1 members, got 2"):
        merge_values([[1.0], [2.0]], [0.0])
    with pytest.raises(MergeError, match="wise_ft merges 2 members, got 1"):
        merge_values([[1.0]], start="member")
    with pytest.raises(MergeError, match="wise_ft needs the base model"):
        merge_values([[1.0]])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_place_off_the_line_is_refused(alpha):
    with pytest.raises(MergeError, match="alpha must lie in 0 to 1"):
        WiseFt(alpha=alpha)


def test_the_best_place_of_a_grid_and_the_barrier():
    members = [
        CheckpointReader.of({"w": torch.tensor([value]), "n": torch.tensor(3)}, str(value)) for value in (0.0, 4.0)
    ]
    tried = []

    def score(tensors):
        tried.append(float(tensors["w"]))
        assert int(tensors["n"]) == 3
        return {0.0: 0.6, 1.0: 0.3, 2.0: 0.9, 3.0: 0.9, 4.0: 0.8}[tried[-1]]

    inputs = MergeInputs.of(members, score=score)
    merged = dict(WiseFt(start="member", grid=(0.75, 0.25, 0.5)).merge(inputs))
    assert tried == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert merged["w"].tolist() == [2.0]
    assert inputs.report["alpha"] == pytest.approx(0.5)
    # At 0.25 the straight connection of 0.6 and 0.8 is at 0.65.
    assert inputs.report["barrier"] == pytest.approx(0.35)
    assert inputs.report["scores"] == {"0.0": 0.6, "0.25": 0.3, "0.5": 0.9, "0.75": 0.9, "1.0": 0.8}


def test_a_grid_needs_a_score():
    with pytest.raises(MergeError, match="wise_ft needs a score on held-out data"):
        merge_values([[1.0]], [0.0], grid=(0.5,))
    with pytest.raises(MergeError, match=r"grid must lie in 0 to 1, got 0\.5, 2"):
        WiseFt(grid=(0.5, 2))
