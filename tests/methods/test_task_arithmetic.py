"""Task arithmetic against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch
from vectors import merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method

BASE = [1.0, 2.0, -1.0]
MEMBERS = [[2.0, 2.0, -3.0], [1.0, 6.0, -2.0]]  # task vectors (1, 0, -2) and (0, 4, -1)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"scale": 1.0}, [2.0, 6.0, -4.0]),
        ({"scale": 0.5}, [1.5, 4.0, -2.5]),
        ({"scale": -1.0}, [0.0, -2.0, 2.0]),
        ({"scale": 1.0, "weights": [1.0, -1.0]}, [2.0, -2.0, -2.0]),
        ({"scale": 1.0, "weights": 0.5}, [1.5, 4.0, -2.5]),
        ({"scale": 1.0, "weights": [3.0, 1.0], "normalize": True}, [1.75, 3.0, -2.75]),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("task_arithmetic", BASE, MEMBERS, **parameters)
    torch.testing.assert_close(merged, torch.tensor(wanted), rtol=0, atol=0)


def test_the_scale_is_the_papers_where_none_is_given():
    merged = merge_values("task_arithmetic", BASE, MEMBERS)
    torch.testing.assert_close(merged, torch.tensor([1.4, 3.6, -2.2]))


def test_all_the_weight_on_one_member_gives_it():
    merged = merge_values("task_arithmetic", BASE, MEMBERS, scale=1.0, weights=[1.0, 0.0])
    torch.testing.assert_close(merged, torch.tensor(MEMBERS[0]), rtol=0, atol=0)


def test_several_pieces_against_float64():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 500, generator=generator)  # two pieces
    members = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(3)]
    weights = [0.3, -0.5, 1.1]
    vectors = sum(w * (m.double() - base.double()) for w, m in zip(weights, members, strict=True))
    merged = merge_values("task_arithmetic", base, members, scale=0.7, weights=weights)
    # differences of float32 numbers below 5 are off by up to 2e-7
    torch.testing.assert_close(merged.double(), base.double() + 0.7 * vectors, rtol=0, atol=2e-6)


def test_differences_of_bfloat16_are_taken_in_float32():
    # 257 is no bfloat16 number; 256 + (258 - 256) * 0.5 + (258 - 256) * 0.5 needs the sum in float32.
    merged = merge_values("task_arithmetic", [256.0], [[258.0], [258.0]], torch.bfloat16, scale=0.5)
    assert merged.item() == 258


def test_no_mean_of_weights_that_cancel():
    with pytest.raises(MergeError, match="weights .1.0, -1.0. sum to 0"):
        merge_values("task_arithmetic", BASE, MEMBERS, weights=[1.0, -1.0], normalize=True)


def test_a_wrong_number_of_weights_is_refused_with_the_members():
    with pytest.raises(MergeError, match="task_arithmetic: weights needs one value a member: got 3 for 2 members: m0"):
        merge_values("task_arithmetic", BASE, MEMBERS, weights=[1.0, 1.0, 1.0])


def test_infinite_numbers_are_refused():
    with pytest.raises(RecipeError, match="finite"):
        make_method("task_arithmetic", {"scale": float("inf")})
