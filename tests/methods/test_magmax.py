"""MagMax against numbers worked out by hand and a dense oracle."""

import pytest
import torch
from vectors import around, draw, merge_values

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method


def test_by_hand():
    base = torch.ones(5)
    vectors = torch.tensor([[1.0, -2.0, 3.0, -1.0, 0.0], [2.0, 1.0, -3.0, -4.0, 0.0]])
    merged = merge_values("magmax", base, around(base, vectors))
    torch.testing.assert_close(merged, base + torch.tensor([2.0, -2.0, 3.0, -4.0, 0.0]), rtol=0, atol=0)
    merged = merge_values("magmax", base, around(base, vectors), scale=-0.5)
    torch.testing.assert_close(merged, base - torch.tensor([1.0, -1.0, 1.5, -2.0, 0.0]), rtol=0, atol=0)


def test_several_pieces_against_argmax():
    base, vectors = draw(200_001), draw(4, 200_001, seed=1)
    furthest = vectors.abs().max(0).values
    taken = torch.where((vectors == furthest).any(0), furthest, -furthest)
    merged = merge_values("magmax", base, around(base, vectors))
    torch.testing.assert_close(merged, base + taken, rtol=0, atol=0)


def test_an_infinite_scale_is_refused():
    with pytest.raises(RecipeError, match="finite"):
        make_method("magmax", {"scale": float("inf")})
