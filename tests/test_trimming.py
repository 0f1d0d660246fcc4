"""Thresholds against sorting, and chance against its probability."""

import math

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.inputs import MergeInputs
from hf_zoo.trimming import drop_at_random, kth_largest, least_kept, num_kept, trim


def inputs_of(vectors, dtype=torch.float32, base=None):
    """Return inputs of models of tensors `t0`, `t1`, ... cut out of these vectors."""
    base = torch.zeros_like(vectors[0]) if base is None else base
    cuts = {"t0": (0, 3), "t1": (3, 150_000), "t2": (150_000, len(base))}
    readers = [
        CheckpointReader.of({name: values[a:b].to(dtype) for name, (a, b) in cuts.items()}, "m")
        for values in (base, *vectors)
    ]
    return MergeInputs.of(readers[1:], base=readers[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "zeros"])
def test_the_kth_largest_is_that_of_sorting(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 300_000, generator=generator, dtype=torch.float64)
    vectors = {
        "normal": vectors * 0.01,
        "ties": (vectors * 4).round() / 8,
        "tiny": vectors * 1e-40,  # below the smallest normal float32
        "zeros": torch.zeros_like(vectors),
    }[kind]
    inputs = inputs_of(vectors, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    ordered = [vector.to(dtype).to(wide).abs().sort(descending=True).values for vector in vectors]
    ranks = [(1, 30_000, 300_000), (150_001,)]
    found = kth_largest(list(inputs.floating()), ranks)
    assert found == [tuple(float(ordered[row][rank - 1]) for rank in ranks[row]) for row in range(2)]


def test_a_small_tensor_and_rows_nobody_asks_for():
    inputs = inputs_of(torch.tensor([[3.0, -1.0, 2.0], [1.0, 1.0, -7.0]]))
    assert kth_largest([inputs.tensors("t0")], [(), (1, 3)]) == [(), (7.0, 1.0)]
    assert kth_largest([inputs.tensors("t0")], [(), ()]) == [(), ()]


def test_no_tensor_and_no_entry_have_zeros():
    inputs = inputs_of(torch.zeros(1, 150_000))
    assert kth_largest([], [(0,)]) == [(0.0,)]
    assert kth_largest([inputs.tensors("t2")], [(0, 0)]) == [(0.0, 0.0)]


def test_other_values_than_magnitudes_can_be_ranked():
    inputs = inputs_of(torch.randn(2, 200_000, generator=torch.Generator().manual_seed(1)))
    (found,) = kth_largest(inputs.floating(), [(500,)], rows=lambda piece: [piece[0].abs() + piece[1].abs()])
    every = torch.cat([t[0].abs() + t[1].abs() for t in inputs.floating()])
    assert found == (float(every.sort(descending=True).values[499]),)


def test_each_member_keeps_a_fraction_of_the_whole_vector():
    vectors = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(2))
    inputs = inputs_of(vectors)
    found = least_kept(list(inputs.floating()), (0.2, 1.0, 0.001))
    ordered = vectors.abs().sort(descending=True).values
    assert found == (float(ordered[0, 39_999]), 0.0, float(ordered[2, 199]))
    assert [int((vector.abs() >= least).sum()) for vector, least in zip(vectors, found, strict=True)] == [
        40_000, 200_000, 200
    ]  # fmt: skip


def test_a_vector_keeps_what_reaches_the_threshold():
    least = math.sqrt(0.1)
    least = float(torch.tensor(least))
    values = torch.tensor([least, -least, least * 0.999999, -2.0, 0.0])
    torch.testing.assert_close(trim(values, least), torch.tensor([least, -least, 0.0, -2.0, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(trim(values, 0.0), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("density", "count", "kept"), [(0.2, 10, 2), (0.29, 100, 28), (1e-9, 10, 1), (1.0, 3, 3), (0.5, 0, 0)]
)
def test_how_many_a_density_keeps(density, count, kept):
    assert num_kept(density, count) == kept  # 0.29 * 100 is 28.999...: rounded down, as everybody does


@pytest.mark.parametrize("density", [0.5, 0.1, 0.9990001, 3e-6])
def test_each_entry_is_kept_with_the_probability_asked_for(density):
    count = 2_000_003
    values = drop_at_random(torch.ones(count), density, torch.Generator().manual_seed(0))
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    # five standard deviations of a binomial
    assert abs(float(values.sum()) - density * count) < 5 * math.sqrt(count * density * (1 - density))


def test_below_sixteen_bits_chance_is_not_rounded():
    # Sixteen bits alone would keep 1 of 65536 or nothing.
    density = 0.5 / 65536
    kept = sum(
        float(drop_at_random(torch.ones(2**20), density, torch.Generator().manual_seed(seed)).sum())
        for seed in range(60)
    )
    assert abs(kept - 480) < 5 * math.sqrt(480)


def test_draws_are_the_generators_and_all_are_kept_at_one():
    one = drop_at_random(torch.ones(1001), 0.3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(drop_at_random(torch.ones(1001), 0.3, torch.Generator().manual_seed(5)), one)
    wide = drop_at_random(torch.ones(1001, dtype=torch.float64), 0.3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(wide.float(), one, rtol=0, atol=0)
    assert drop_at_random(torch.ones(9), 1.0, torch.Generator()).all()
