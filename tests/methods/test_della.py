"""DELLA against its probabilities and expectation, and against the same draws made by hand."""

import pytest
import torch
from vectors import around, draw, inputs_of, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method
from hf_zoo.methods.della import keep_probabilities
from hf_zoo.task_vectors import elected


def test_probabilities_by_hand():
    rows = torch.tensor([[0.1, -0.5, 0.3, 0.0, -0.2], [1.0, 2.0, 3.0, 4.0, 5.0]])
    wanted = torch.tensor([[0.45, 0.6, 0.55, 0.4, 0.5], [0.4, 0.45, 0.5, 0.55, 0.6]])
    torch.testing.assert_close(keep_probabilities(rows, 0.5, 0.2), wanted)
    torch.testing.assert_close(keep_probabilities(rows[:, :1], 0.5, 0.2), torch.full((2, 1), 0.5))


def test_equal_magnitudes_are_ranked_by_place():
    torch.testing.assert_close(
        keep_probabilities(torch.tensor([[2.0, -2.0, 2.0]]), 0.5, 0.4), torch.tensor([[0.3, 0.5, 0.7]])
    )


def test_everything_kept_with_a_plain_sum_is_task_arithmetic():
    base, vectors = draw(6, 5), draw(2, 6, 5, seed=1)
    merged = merge_values("della", base, around(base, vectors), density=1.0, election="none", scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * vectors.sum(0), rtol=0, atol=0)


def test_each_place_is_kept_as_often_as_it_should_be():
    # 100000 equal rows, several pieces: the columns' frequencies are the probabilities of their ranks.
    vector = torch.tensor([4.0, -1.0, 3.0, -2.0, 5.0]).repeat(100_000, 1)
    merged = merge_values("della", torch.zeros_like(vector), [vector], density=0.5, epsilon=0.4, election="none")
    chances = torch.tensor([0.6, 0.3, 0.5, 0.4, 0.7])
    frequency = (merged != 0).float().mean(0)
    torch.testing.assert_close(frequency, chances, rtol=0, atol=0.008)  # five standard deviations
    torch.testing.assert_close(merged[merged != 0], (vector / chances)[merged != 0])


def test_a_convolution_is_ranked_per_output():
    base, vector = torch.zeros(3, 2, 2, 2), draw(3, 2, 2, 2, seed=4) + 10
    merged = merge_values("della", base, [vector], density=0.5, epsilon=0.5, election="none")
    chances = keep_probabilities(vector.reshape(3, 8), 0.5, 0.5).reshape(vector.shape)
    kept = merged != 0
    assert 0 < int(kept.sum()) < 24
    torch.testing.assert_close(merged[kept], (vector / chances)[kept])


def test_the_sum_of_magnitudes_is_kept_per_tensor():
    vector = draw(300, 700)
    merged = merge_values("della", torch.zeros(300, 700), [vector], rescale="norm", election="none")
    assert float(merged.double().abs().sum()) == pytest.approx(float(vector.double().abs().sum()), rel=1e-6)


def test_signs_are_elected_among_what_is_left():
    base, vectors = draw(10, 100), draw(3, 10, 100, seed=1)
    members = around(base, vectors)
    (piece,) = inputs_of(base, members).tensors("w").pieces(1000)
    kept = []
    for index, vector in enumerate(vectors):
        chances = keep_probabilities(vector, 0.5, 0.2).reshape(-1)
        coins = torch.rand(1000, generator=piece.generator(index))
        kept.append(torch.where(coins < chances, vector.reshape(-1) / chances, 0.0))
    merged = merge_values("della", base, members, density=0.5, epsilon=0.2)
    torch.testing.assert_close(merged.reshape(-1), base.reshape(-1) + elected(kept, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("parameters", [{"density": 0.9, "epsilon": 0.3}, {"density": 0.1}, {"density": [0.5, 0.05]}])
def test_probabilities_out_of_range_are_refused(parameters):
    with pytest.raises(RecipeError, match=r"della: density .* must lie in \(0, 1\]: they are probabilities"):
        make_method("della", parameters)


def test_a_wrong_number_of_epsilons_is_refused():
    with pytest.raises(MergeError, match="della: epsilon needs one value a member: got 2 for 1"):
        merge_values("della", [1.0], [[1.0]], density=0.5, epsilon=[0.1, 0.2])
