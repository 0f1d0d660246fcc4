"""Breadcrumbs against numbers worked out by hand and a dense oracle that sorts."""

import pytest
import torch
from vectors import around, draw, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method

BASE = torch.zeros(10)
VECTOR = torch.tensor([10.0, -9.0, 8.0, -7.0, 6.0, 5.0, -4.0, 3.0, 2.0, -1.0])


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"density": 0.3, "gamma": 0.2}, [0, 0, 8, -7, 6, 0, 0, 0, 0, 0]),
        ({"density": 0.3, "gamma": 0.0}, [10, -9, 8, 0, 0, 0, 0, 0, 0, 0]),
        ({"density": 0.3, "gamma": 0.2, "scale": 0.5}, [0, 0, 4, -3.5, 3, 0, 0, 0, 0, 0]),
        # Only two entries are not to stay: they are the largest.
        ({"density": 0.8, "gamma": 0.5}, [0, 0, 8, -7, 6, 5, -4, 3, 2, -1]),
        ({"density": 1.0, "gamma": 0.5}, VECTOR.tolist()),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("breadcrumbs", BASE, [VECTOR], **parameters)
    torch.testing.assert_close(merged, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=0)


def test_vectors_are_added_or_elected():
    other = -VECTOR.flip(0) / 2  # 0.5 -1 -1.5 2 -2.5 -3 3.5 -4 4.5 -5; 0.3 and 0.2 keep 3.5 -4 and -3
    added = merge_values("breadcrumbs", BASE, [VECTOR, other], density=[0.3, 0.3], gamma=[0.2, 0.2])
    torch.testing.assert_close(added, torch.tensor([0, 0, 8, -7, 6, -3, 3.5, -4, 0, 0]), rtol=0, atol=0)
    every = {"density": 1.0, "election": "total"}
    elected = merge_values("breadcrumbs", BASE, [VECTOR, other], **every)
    wanted = torch.tensor([5.25, -5, 8, -7, 6, 5, -4, -4, 4.5 / 2 + 1, -3])
    torch.testing.assert_close(elected, wanted, rtol=0, atol=0)


def test_several_pieces_against_sorting():
    base, vectors = draw(300_001), draw(2, 300_001, seed=1)
    density, gamma = (0.2, 0.5), (0.05, 0.1)
    wanted = base.double()
    for vector, fraction, largest in zip(vectors, density, gamma, strict=True):
        ordered = vector.abs().sort(descending=True).values
        masked, kept = int(largest * 300_001), int(fraction * 300_001)
        stays = (vector.abs() <= ordered[masked]) & (vector.abs() >= ordered[masked + kept - 1])
        wanted += 0.3 * torch.where(stays, vector, 0).double()
    merged = merge_values("breadcrumbs", base, around(base, vectors), density=density, gamma=gamma, scale=0.3)
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)  # float32 roundings of numbers below 16


def test_fractions_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"breadcrumbs: density must lie in \(0, 1\], got 0"):
        make_method("breadcrumbs", {"density": 0.0})
    with pytest.raises(RecipeError, match=r"breadcrumbs: gamma must lie in \[0, 1\], got -0.1"):
        make_method("breadcrumbs", {"gamma": -0.1})


def test_a_wrong_number_of_gammas_is_refused():
    with pytest.raises(MergeError, match="breadcrumbs: gamma needs one value a member: got 2 for 1"):
        merge_values("breadcrumbs", BASE, [VECTOR], gamma=[0.1, 0.2])
