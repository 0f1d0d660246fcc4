"""Greedy soups on scores worked out by hand."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.greedy_soup import GreedySoup, greedy_choice

TARGET = 1.0


def soup(values, score=None, **parameters):
    """Merge one-number models; the score is minus the distance to 1."""
    members = [CheckpointReader.of({"w": torch.tensor([value])}, f"m{i}") for i, value in enumerate(values)]
    inputs = MergeInputs.of(members, score=score or (lambda tensors: -abs(float(tensors["w"][0]) - TARGET)))
    merged = dict(GreedySoup(**parameters).merge(inputs))
    return float(merged["w"][0]), inputs.report | {"choices": inputs.choices}


def test_members_are_tried_from_the_best_and_kept_if_the_mean_rises():
    # Alone: m2 (0.5) is best, then m0 (2.0), then m1 (3.0). m2 + m0 = 1.25 is nearer to 1; all three = 1.83 is not.
    value, report = soup([2.0, 3.0, 0.5])
    assert value == pytest.approx(1.25)
    assert report["order"] == ["m2", "m0", "m1"]
    assert report["accepted"] == ["m2", "m0"]
    assert report["choices"] == {"greedy_soup: w": [2, 0]}
    assert report["scores"] == {"m0": -1.0, "m1": -2.0, "m2": -0.5}
    assert [(step["member"], step["accepted"]) for step in report["steps"]] == [("m0", True), ("m1", False)]
    assert report["score"] == pytest.approx(-0.25)


def test_the_given_order_can_end_elsewhere():
    # m0 alone 2.0; with m1: 2.5, worse; with m2: 1.25, better.
    value, report = soup([2.0, 3.0, 0.5], order="given")
    assert report["accepted"] == ["m0", "m2"]
    assert value == pytest.approx(1.25)


def test_pruning_starts_from_all_and_drops_the_worst():
    # All: 1.83; without m1 (the worst): 1.25, better; without m0 then: 0.5, worse; without m2: 2.0, worse.
    value, report = soup([2.0, 3.0, 0.5], start="all")
    assert value == pytest.approx(1.25)
    assert report["accepted"] == ["m2", "m0"]
    assert [step["member"] for step in report["steps"]] == ["m1", "m0", "m2"]


def test_pruning_never_drops_everybody():
    accepted, score, _ = greedy_choice([0, 1], lambda chosen: 5.0 - len(chosen), [9.0, 1.0], "all")
    assert accepted == [0]
    assert score == pytest.approx(9.0)


@pytest.mark.parametrize(("accept_equal", "accepted"), [(False, ["m0"]), (True, ["m0", "m1"])])
def test_an_equal_score_is_taken_only_on_request(accept_equal, accepted):
    _, report = soup([0.25, 0.75], score=lambda tensors: 0.0, accept_equal=accept_equal)
    assert report["accepted"] == accepted


def test_the_soup_is_never_worse_than_its_best_member():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = (4 * torch.rand(6, generator=draw)).tolist()
        for start in ("best", "all"):
            _, report = soup(values, start=start)
            if start == "best":
                assert report["score"] >= max(report["scores"].values())
            assert len(report["accepted"]) >= 1


def test_a_random_order_comes_from_the_seed():
    members = [CheckpointReader.of({"w": torch.tensor([float(i)])}, f"m{i}") for i in range(8)]

    def order(seed):
        inputs = MergeInputs.of(members, seed=seed, score=lambda tensors: float(tensors["w"][0]))
        dict(GreedySoup(order="random").merge(inputs))
        return inputs.report["order"]

    assert order(1) == order(1)
    assert sorted(order(1)) == [f"m{i}" for i in range(8)]
    assert order(1) != order(2)


def test_an_unknown_order_is_refused():
    with pytest.raises(RecipeError, match=r"parameters\.order: expected one of score, given, random"):
        make_method("greedy_soup", {"order": "scores"})


def test_a_part_of_a_model_is_scored_in_the_whole():
    members = [
        CheckpointReader.of({"w": torch.tensor([value]), "other": torch.tensor([other])}, f"m{i}")
        for i, (value, other) in enumerate([(2.0, 4.0), (0.5, 8.0)])
    ]
    seen = []

    def score(tensors):
        seen.append((float(tensors["w"]), float(tensors["other"])))
        return -abs(seen[-1][0] - TARGET)

    inputs = MergeInputs.of(members, score=score).only(["w"])
    assert dict(GreedySoup().merge(inputs)) == {"w": torch.tensor([1.25])}
    assert seen == [(2.0, 6.0), (0.5, 6.0), (1.25, 6.0)]  # the others' mean meanwhile
