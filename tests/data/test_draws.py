"""The law of chance: a draw depends on seed, epoch, sample and purpose alone."""

import math

import numpy as np

from hf_zoo.data.draws import Draws


def draw(indices, seed=1, epoch=2, purpose="test", count=3):
    return Draws(seed, epoch, np.asarray(indices)).uniform(purpose, count)


def test_a_sample_draws_the_same_in_any_batch_and_order():
    whole = draw(range(10))
    np.testing.assert_array_equal(draw([7, 3]), whole[[7, 3]])


def test_a_longer_row_begins_with_the_shorter_one():
    np.testing.assert_array_equal(draw(range(4), count=9)[:, :3], draw(range(4)))


def test_seed_epoch_purpose_and_sample_all_matter():
    rows = [draw([5]), draw([5], seed=2), draw([5], epoch=3), draw([5], purpose="other"), draw([6])]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_numbers_are_uniform_and_neighbours_are_uncorrelated():
    numbers = draw(range(2000), count=20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Five standard errors: of 40,000 numbers in 16 bins, and of the correlations of 38,000 and of 39,980 pairs.
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    expected = numbers.size / 16
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected * 15 / 16)
    for first, second in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(first.size)


def test_what_a_batch_draws_once_depends_on_all_its_samples():
    def first(indices, epoch=0):
        return Draws(1, epoch, np.asarray(indices)).of_batch("mix").random()

    assert first([1, 2, 3]) == first([1, 2, 3])
    assert len({first([1, 2, 3]), first([1, 2, 4]), first([2, 1, 3]), first([1, 2, 3], epoch=1)}) == 4


def test_no_global_generator_moves():
    import torch

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # ruff: ignore[numpy-legacy-random]
    draw(range(5))
    Draws(1, 0, np.arange(3)).of_batch("mix").random()
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # ruff: ignore[numpy-legacy-random]
