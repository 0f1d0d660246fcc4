"""TIES against numbers worked out by hand and a dense float64 oracle that sorts."""

import pytest
import torch
from vectors import around, draw, merge_all, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0])
VECTORS = torch.tensor([[4.0, -1.0, 3.0, 0.5], [2.0, -5.0, -4.0, 1.0]])


def oracle(base, vectors, density, weights, scale=1.0, election="total", normalize=True):
    """Sort, trim, elect and average in float64; vectors are (K, n)."""
    vectors = vectors.double()
    kept = []
    for vector, fraction in zip(vectors, density, strict=True):
        count = max(1, int(fraction * vector.numel()))
        least = vector.abs().sort(descending=True).values[count - 1]
        kept.append(torch.where(vector.abs() >= least, vector, 0))
    weighted = torch.stack(kept) * torch.tensor(weights, dtype=torch.float64)[:, None]
    signs = weighted.sign()
    sign = (weighted if election == "total" else signs).sum(0).sign()
    agrees = (signs == sign) & (sign != 0)
    total = (weighted * agrees).sum(0)
    if normalize:
        total = total / (torch.tensor(weights, dtype=torch.float64).abs()[:, None] * agrees).sum(0).clamp(min=1e-30)
    return base.double() + scale * total


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        # Half is kept: (4, 0, 3, 0) and (0, -5, -4, 0). The third's sum is -1: only the second agrees.
        ({"density": 0.5}, [4.0, -5.0, -4.0, 0.0]),
        ({"density": 0.5, "scale": 0.5}, [2.0, -2.5, -2.0, 0.0]),
        ({"density": 1.0}, [3.0, -3.0, -4.0, 0.75]),
        ({"density": 1.0, "normalize": False}, [6.0, -6.0, -4.0, 1.5]),
        ({"density": [1.0, 0.5]}, [4.0, -3.0, -4.0, 0.5]),
        # (8, -2, 6, 1) and (2, -5, -4, 1): the third's sum is 2 now; the mean is over weights 2 and 1.
        ({"density": 1.0, "weights": [2.0, 1.0]}, [10 / 3, -7 / 3, 3.0, 2 / 3]),
        # One against one for the third: nobody wins.
        ({"density": 1.0, "election": "count"}, [3.0, -3.0, 0.0, 0.75]),
        ({"density": 1.0, "election": "count", "tie": "positive"}, [3.0, -3.0, 3.0, 0.75]),
    ],
)
def test_by_hand(parameters, wanted):
    merged = merge_values("ties", BASE, around(BASE, VECTORS), **parameters)
    torch.testing.assert_close(merged, BASE + torch.tensor(wanted))


@pytest.mark.parametrize("trim", ["vector", "tensor"])
@pytest.mark.parametrize("election", ["total", "count"])
def test_many_entries_against_float64(trim, election):
    base, vectors = draw(200_001), draw(3, 200_001, seed=1)  # two pieces, and many equal magnitudes
    parameters = {"density": (0.1, 0.5, 1.0), "weights": (1.0, 2.0, 0.5), "scale": 0.7, "election": election}
    merged = merge_values("ties", base, around(base, vectors), trim=trim, **parameters)
    # a handful of float32 roundings of numbers below 16
    torch.testing.assert_close(merged.double(), oracle(base, vectors, **parameters), rtol=0, atol=1e-5)


def test_the_whole_vector_is_trimmed_unless_each_tensor_is():
    base = {"big": torch.zeros(2, 2), "small": torch.zeros(4)}
    member = {"big": torch.tensor([[9.0, -8.0], [7.0, 6.0]]), "small": torch.tensor([0.1, 0.4, -0.3, 0.2])}
    whole = merge_all("ties", base, [member], density=0.5)
    torch.testing.assert_close(whole["big"], member["big"], rtol=0, atol=0)
    torch.testing.assert_close(whole["small"], torch.zeros(4), rtol=0, atol=0)
    each = merge_all("ties", base, [member], density=0.5, trim="tensor")
    torch.testing.assert_close(each["big"], torch.tensor([[9.0, -8.0], [0.0, 0.0]]), rtol=0, atol=0)
    torch.testing.assert_close(each["small"], torch.tensor([0.0, 0.4, -0.3, 0.0]), rtol=0, atol=0)


def test_integer_tensors_do_not_count_in_the_whole_vector():
    base = {"w": torch.zeros(4), "count": torch.tensor([0] * 96)}
    member = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "count": torch.tensor([9] * 96)}
    merged = merge_all("ties", base, [member], density=0.5)
    torch.testing.assert_close(merged["w"], torch.tensor([0.0, 0.0, 3.0, 4.0]), rtol=0, atol=0)


def test_a_part_without_floating_tensors_is_copied():
    merged = merge_all("ties", {"count": torch.tensor([1, 2])}, [{"count": torch.tensor([3, 4])}])
    assert merged["count"].tolist() == [3, 4]


def test_all_equal_to_the_smallest_kept_are_kept():
    merged = merge_values("ties", torch.zeros(4), [torch.tensor([1.0, -1.0, 1.0, 2.0])], density=0.5)
    torch.testing.assert_close(merged, torch.tensor([1.0, -1.0, 1.0, 2.0]), rtol=0, atol=0)


def test_everything_kept_of_members_that_agree_is_their_mean():
    base = torch.zeros(50)
    members = [draw(50, seed=seed).abs() + 1 for seed in range(3)]
    torch.testing.assert_close(merge_values("ties", base, members, density=1.0), sum(members) / 3)


def test_at_least_one_entry_is_kept():
    merged = merge_values("ties", torch.zeros(4), [torch.tensor([1.0, -3.0, 1.0, 2.0])], density=1e-6)
    torch.testing.assert_close(merged, torch.tensor([0.0, -3.0, 0.0, 0.0]), rtol=0, atol=0)


def test_float64_is_trimmed_in_float64():
    values = 1.0 + torch.arange(200_000, dtype=torch.float64) * 2.0**-40  # all alike in float32
    merged = merge_values("ties", torch.zeros(200_000), [values], torch.float64, density=0.25)
    assert int((merged != 0).sum()) == 50_000
    assert merged[-50_000:].all()


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1, [0.5, 2.0]])
def test_a_density_that_is_no_fraction_is_refused(density):
    with pytest.raises(RecipeError, match=r"ties: density must lie in \(0, 1\], got"):
        make_method("ties", {"density": density})


def test_a_wrong_number_of_densities_is_refused():
    with pytest.raises(MergeError, match="ties: density needs one value a member: got 3 for 2"):
        merge_values("ties", BASE, around(BASE, VECTORS), density=[0.1, 0.2, 0.3])
