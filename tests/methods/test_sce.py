"""SCE against numbers worked out by hand and a dense float64 oracle that sorts."""

import pytest
import torch
from vectors import around, draw, merge_values

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method

BASE = torch.ones(4)
VECTORS = torch.tensor([[4.0, 1.0, 3.0, -2.0], [2.0, 1.0, -4.0, -2.0]])  # variances 1, 0, 12.25, 0


def oracle(base, vectors, topk, normalize):
    vectors = vectors.double()
    spread = vectors.var(0, unbiased=False).reshape(-1)
    least = spread.sort(descending=True).values[max(1, int(topk * spread.numel())) - 1]
    vectors = torch.where((spread >= least).reshape(base.shape), vectors, 0)
    energy = vectors.square().flatten(1).sum(1)
    weights = (energy / energy.sum()).reshape(-1, *[1] * base.dim())
    agrees = vectors.sign() == vectors.sum(0).sign()
    merged = (weights * vectors * agrees).sum(0)
    if normalize:
        merged /= (weights * (agrees & (vectors != 0))).sum(0).clamp(min=1e-30)
    return base.double() + merged


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        # The third entry alone: energies 9 and 16, its sum is negative.
        ({"select_topk": 0.25}, [0.0, 0.0, -4 * 16 / 25, 0.0]),
        ({"select_topk": 0.25, "normalize": True}, [0.0, 0.0, -4.0, 0.0]),
        # The first and the third: energies 25 and 20.
        ({"select_topk": 0.5}, [(4 * 25 + 2 * 20) / 45, 0.0, -4 * 20 / 45, 0.0]),
        ({"select_topk": 0.5, "scale": 0.5}, [(4 * 25 + 2 * 20) / 90, 0.0, -4 * 20 / 90, 0.0]),
        # All: energies 30 and 25.
        ({"select_topk": 1.0}, [(4 * 30 + 2 * 25) / 55, 1.0, -4 * 25 / 55, -2.0]),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("sce", BASE, around(BASE, VECTORS), **parameters)
    torch.testing.assert_close(merged, BASE + torch.tensor(wanted))


@pytest.mark.parametrize("normalize", [False, True])
def test_several_pieces_against_float64(normalize):
    # Integers of three members: variances are multiples of 2/9, far enough apart to be told apart in float32.
    base, vectors = (
        draw(400, 500),
        torch.randint(-9, 10, (3, 400, 500), generator=torch.Generator().manual_seed(2)).float() * 3,
    )
    merged = merge_values("sce", base, around(base, vectors), select_topk=0.2, normalize=normalize)
    torch.testing.assert_close(merged.double(), oracle(base, vectors, 0.2, normalize), rtol=0, atol=1e-5)


def test_small_task_vectors_are_weighted_too():
    base = torch.zeros(3)
    vectors = torch.tensor([[3e-5, 0.0, 0.0], [1e-5, 0.0, 0.0]])
    merged = merge_values("sce", base, list(vectors), select_topk=1.0)
    torch.testing.assert_close(merged, torch.tensor([2.8e-5, 0.0, 0.0]), rtol=1e-6, atol=0)


def test_a_single_member_is_returned():
    torch.testing.assert_close(merge_values("sce", BASE, [BASE + VECTORS[0]]), BASE + VECTORS[0])


def test_signs_that_weigh_the_same():
    members = [torch.tensor([2.0]), torch.tensor([-2.0])]
    assert merge_values("sce", torch.zeros(1), members).item() == 0
    assert merge_values("sce", torch.zeros(1), members, tie="positive").item() == 1


def test_a_fraction_out_of_range_is_refused():
    with pytest.raises(RecipeError, match=r"sce: select_topk must lie in \(0, 1\], got 0"):
        make_method("sce", {"select_topk": 0.0})
