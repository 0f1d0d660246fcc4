"""Consensus merging against masks worked out by hand and a dense float64 oracle."""

import pytest
import torch
from vectors import around, draw, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method

BASE = torch.ones(5)
VECTORS = torch.tensor([
    [4.0, 2.0, 1.0, 0.0, 1.0],
    [4.0, 0.0, 1.0, 0.0, 1.0],
    [4.0, 0.0, -8.0, 0.0, -2.0],
])  # sums 12, 2, -6, 0, 0
# |tau_t| against |tau - tau_t|: 4 and 8 three times; 2, 0, 0 and 0, 2, 2; 1, 1, 8 and 7, 7, 2; zeros; 1, 1, 2 and 1, 1, 2


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"mask_scale": 0.5, "scale": 1.0}, [12, 0, 0, 0, 0]),
        ({"mask_scale": 0.5, "scale": 1.0, "min_tasks": 1}, [12, 2, -6, 0, 0]),
        ({"mask_scale": 0.6, "scale": 1.0, "min_tasks": 1}, [0, 2, -6, 0, 0]),
        ({"mask_scale": 0.1, "scale": 1.0}, [12, 0, -6, 0, 0]),
        ({"mask_scale": [0.6, 0.5, 0.5], "scale": 1.0}, [12, 0, 0, 0, 0]),
        ({"mask_scale": [0.6, 0.6, 0.5], "scale": 1.0}, [0, 0, 0, 0, 0]),
        ({"mask_scale": 0.5}, [4.8, 0, 0, 0, 0]),
        ({"min_tasks": 0, "scale": 0.5}, [6, 1, -3, 0, 0]),
        # The third task alone, by its own mask.
        ({"mask_scale": 0.5, "task": 2}, [12, 0, -6, 0, 0]),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("consensus", BASE, around(BASE, VECTORS), **parameters)
    torch.testing.assert_close(merged, BASE + torch.tensor(wanted, dtype=torch.float32))


def test_weights_count_in_the_sum():
    merged = merge_values("consensus", BASE, around(BASE, VECTORS), min_tasks=0, scale=1.0, weights=[1.0, 0.5, 0.0])
    torch.testing.assert_close(merged, BASE + torch.tensor([6.0, 2.0, 1.5, 0.0, 1.5]))


def test_several_pieces_against_float64():
    base, vectors = draw(200_001), draw(4, 200_001, seed=1)
    total = vectors.double().sum(0)
    votes = sum((v.double().abs() >= 0.3 * (total - v).abs()).int() for v in vectors)
    # entries that a rounding of 0.3 might decide are left out
    clear = torch.stack([(v.double().abs() - 0.3 * (total - v).abs()).abs() > 1e-6 for v in vectors]).all(0)
    merged = merge_values("consensus", base, around(base, vectors), mask_scale=0.3, min_tasks=3, scale=0.7)
    wanted = base.double() + 0.7 * total * (votes >= 3)
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(merged.double()[clear], wanted[clear], rtol=0, atol=1e-5)


def test_members_that_do_not_overlap_are_restored_by_their_masks():
    base = draw(60)
    vectors = torch.zeros(3, 60)
    for place in range(3):
        vectors[place, place * 20 : place * 20 + 20] = draw(20, seed=place + 1)
    for place, member in enumerate(around(base, vectors)):
        merged = merge_values("consensus", base, around(base, vectors), task=place)
        torch.testing.assert_close(merged, member, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"task": 3}, "task must be a member's place from 0 to 2, got 3"),
        ({"min_tasks": 4}, "min_tasks 4 masks out everything of 3 members"),
        ({"mask_scale": [0.1, 0.2]}, "mask_scale needs one value a member: got 2 for 3"),
    ],
)
def test_what_does_not_fit_the_members_is_refused(parameters, message):
    with pytest.raises(MergeError, match=f"consensus: {message}"):
        merge_values("consensus", BASE, around(BASE, VECTORS), **parameters)


def test_a_negative_count_is_refused():
    with pytest.raises(RecipeError, match="min_tasks must be 0 or more"):
        make_method("consensus", {"min_tasks": -1})
