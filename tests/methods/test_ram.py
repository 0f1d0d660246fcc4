"""RAM and RAM+ against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch
from vectors import around, draw, merge_all, merge_values

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method

BASE = torch.ones(5)
VECTORS = torch.tensor([[4.0, 2.0, 0.0, 1e-6, 3.0], [2.0, 0.0, -3.0, 0.0, -3.0], [0.0, 0.0, 0.0, 0.0, 3.0]])
# Shared and own: 2 and 1, 2 and 1, 1 and 0.


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({}, [3.0, 2.0, -3.0, 0.0, 1.0]),
        ({"scale": 2.0}, [6.0, 4.0, -6.0, 0.0, 2.0]),
        ({"epsilon": 2.5}, [4.0, 0.0, -3.0, 0.0, 1.0]),
        ({"rescale": 0.5, "limit": 10.0}, [3.0, 4.0, -6.0, 0.0, 1.0]),
        ({"rescale": 0.5}, [3.0, 2.2, -3.3, 0.0, 1.0]),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("ram", BASE, around(BASE, VECTORS), **parameters)
    torch.testing.assert_close(merged, BASE + torch.tensor(wanted), rtol=0, atol=1e-6)


def test_entries_are_counted_in_the_whole_model_or_in_each_tensor():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    members = [
        {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 0.0])},
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 0.0])},
    ]
    whole = merge_all("ram", base, members, rescale=1.0, limit=9.0)  # one shared, two of its own
    torch.testing.assert_close(whole["a"], torch.tensor([1.0, 1.5]))
    torch.testing.assert_close(whole["b"], torch.tensor([1.5, 0.0]))
    each = merge_all("ram", base, members, rescale=1.0, limit=9.0, scope="tensor")  # one and one, none and one
    torch.testing.assert_close(each["a"], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(each["b"], torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("scope", ["vector", "tensor"])
def test_several_pieces_against_float64(scope):
    base, vectors = draw(200_001), draw(3, 200_001, seed=1) * (draw(3, 200_001, seed=2) > 1)
    wide, changed = vectors.double(), vectors != 0
    count = changed.sum(0)
    rho = torch.tensor(
        [float((c & (count > 1)).sum() / (c & (count == 1)).sum()) for c in changed], dtype=torch.float64
    )
    alone = ((1 + 0.1 * rho.clamp(max=0.5))[:, None] * wide).sum(0)
    wanted = base + torch.where(count == 1, alone, wide.sum(0) / count.clamp(min=1))
    merged = merge_values("ram", base, around(base, vectors), rescale=0.1, limit=0.5, scope=scope)
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)


def test_members_that_share_nothing_are_all_kept():
    vectors = torch.block_diag(*draw(3, 20, seed=1)[:, None] + 9)
    merged = merge_values("ram", torch.zeros(60), list(vectors))
    torch.testing.assert_close(merged, vectors.sum(0), rtol=0, atol=0)


def test_negative_numbers_are_refused():
    with pytest.raises(RecipeError, match="ram: epsilon, rescale and limit must be 0 or more"):
        make_method("ram", {"epsilon": -1e-5})
