"""DARE against its expectation, and against the same draws made by hand."""

import pytest
import torch
from vectors import around, draw, inputs_of, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method
from hf_zoo.task_vectors import elected
from hf_zoo.trimming import drop_at_random

COUNT = 300_000  # three pieces


def test_nothing_dropped_is_task_arithmetic():
    base, vectors = draw(50), draw(2, 50, seed=1)
    merged = merge_values("dare", base, around(base, vectors), density=1.0, scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * vectors.sum(0), rtol=0, atol=0)


def test_what_is_kept_is_divided_by_the_density():
    merged = merge_values("dare", torch.zeros(COUNT), [torch.full((COUNT,), 3.0)], density=0.25)
    assert set(merged.unique().tolist()) == {0.0, 12.0}
    # five standard deviations: 12 sqrt(0.25 * 0.75 / COUNT)
    assert abs(float(merged.mean()) - 3) < 0.048


def test_members_are_dropped_independently_at_their_own_densities():
    base, ones = torch.zeros(COUNT), torch.ones(COUNT)
    merged = merge_values("dare", base, [ones, 10 * ones], density=[0.5, 0.2], rescale="none")
    kept = [float(((merged == 1) | (merged == 11)).float().mean()), float((merged >= 10).float().mean())]
    both = float((merged == 11).float().mean())
    assert kept == pytest.approx([0.5, 0.2], abs=0.005)
    assert both == pytest.approx(0.1, abs=0.003)


def test_the_sum_of_magnitudes_is_kept_per_tensor():
    vector = draw(COUNT)
    merged = merge_values("dare", torch.zeros(COUNT), [vector], density=0.1, rescale="norm")
    assert float(merged.double().abs().sum()) == pytest.approx(float(vector.double().abs().sum()), rel=1e-6)
    factor = (merged / vector)[merged != 0]
    assert 9.5 < float(factor.min()) <= float(factor.max()) < 10.5


def test_signs_are_elected_among_what_is_left():
    base, vectors = draw(1000), draw(3, 1000, seed=1)
    members = around(base, vectors)
    (piece,) = inputs_of(base, members).tensors("w").pieces()
    kept = [drop_at_random(vector.clone(), 0.5, piece.generator(i)) * 2 for i, vector in enumerate(vectors)]
    weights = (1.0, 2.0, 0.5)
    merged = merge_values("dare", base, members, density=0.5, election="total", weights=weights)
    torch.testing.assert_close(merged, base + elected(kept, weights))


def test_the_seed_decides():
    base, members = torch.zeros(1000), [torch.ones(1000)]
    first, again, other = (merge_values("dare", base, members, density=0.5, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_that_is_no_fraction_is_refused(density):
    with pytest.raises(RecipeError, match=r"dare: density must lie in \(0, 1\]"):
        make_method("dare", {"density": density})


def test_a_wrong_number_of_densities_is_refused():
    with pytest.raises(MergeError, match="dare: density needs one value a member: got 2 for 1"):
        merge_values("dare", [1.0], [[1.0]], density=[0.1, 0.2])
