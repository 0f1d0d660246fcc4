"""Arcee Fusion against numbers worked out by hand and a dense float64 oracle."""

import math

import pytest
import torch
from vectors import draw, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.arcee_fusion import divergence
from hf_zoo.methods.base import make_method


def test_the_divergence_by_hand():
    rows = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    base = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    wanted = torch.tensor([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.0], dtype=torch.float64)
    torch.testing.assert_close(divergence(rows, base), wanted, rtol=1e-6, atol=1e-12)


def test_small_divergences_are_not_rounding_noise():
    base = draw(1, 768)
    change = 1e-5 * draw(1, 768, seed=1)
    p = base.double().softmax(1)
    # For small changes the divergence is half the variance of the change under the base's softmax.
    mean = (p * change).sum()
    wanted = 0.5 * (p * (change.double() - mean).square()).sum()
    assert float(divergence(base.double() + change, base.double())) == pytest.approx(float(wanted), rel=1e-3)


def test_the_entries_that_changed_most_are_taken_by_hand():
    # A row each: within it the divergence is shared, so the change decides. Quartiles of 1..8: places 1, 3, 5.
    base = torch.zeros(1, 8)
    member = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    for fence, taken in [(0.0, 5), (0.5, 3), (1.0, 1), (1.5, 0)]:  # from 4, 6, 8, 10 on
        merged = merge_values("arcee_fusion", base, [member], fence=fence)
        torch.testing.assert_close(merged, torch.where(member > 8 - taken, member, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(500, 603), (300_001,), (20, 30, 5, 101)])
def test_several_pieces_against_float64(shape):
    base, change = draw(*shape), draw(*shape, seed=1) * draw(*shape, seed=2).abs() / 64
    member = base + change
    ours, theirs = member.double().log_softmax(-1), base.double().log_softmax(-1)
    importance = change.double().abs() * (ours.exp() * (ours - theirs)).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, median, high = (float(ordered[int(part * (len(ordered) - 1))]) for part in (0.25, 0.5, 0.75))
    wanted = torch.where(importance >= median + 1.5 * (high - low), member, base)
    merged = merge_values("arcee_fusion", base, [member])
    taken = float((merged != base).float().mean())
    assert 0.05 < taken < 0.3
    assert int((merged != wanted).sum()) <= 3  # importance is float32: one at the threshold may fall on either side


def test_two_members_are_refused():
    with pytest.raises(MergeError, match="arcee_fusion merges 1 members, got 2: m0, m1"):
        merge_values("arcee_fusion", [1.0], [[1.0], [2.0]])


def test_a_negative_fence_is_refused():
    with pytest.raises(RecipeError, match="arcee_fusion: fence must be 0 or more"):
        make_method("arcee_fusion", {"fence": -1.0})
