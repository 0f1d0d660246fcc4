"""Inner products found piece by piece and linear combinations of members, against dense float64."""

import math

import pytest
import torch

from hf_zoo import geometry
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.geometry import cosines, gram_matrices, mix, note, slerp_coefficients
from hf_zoo.inputs import MergeInputs

SHAPES = [(), (1,), (7,), (5, 6), (1, 9), (9, 1), (4, 3, 2, 2), (0, 3)]


def make_inputs(values, base=None, **others):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    return MergeInputs.of(members, base=None if base is None else CheckpointReader.of({"w": base}, "base"), **others)


def as_vectors(value, vectors):
    """Return a tensor's vectors as (V, L)."""
    if vectors == "tensor" or value.ndim < 2:
        return value.reshape(1, -1)
    matrix = value.reshape(len(value), math.prod(value.shape[1:]))
    return matrix if vectors == "rows" else matrix.T


@pytest.fixture(params=[1 << 18, 10], ids=["one piece", "many pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(geometry, "SURVEYED_ENTRIES", request.param)
    monkeypatch.setattr(geometry, "FEWEST_ENTRIES", min(request.param, 4))
    return request.param


@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_against_float64(shape, vectors, task_vectors, piece):
    draw = torch.Generator().manual_seed(0)
    # Sixteenths: differences to the base are exact in float32, so nothing but float64's own rounding is left.
    base, *values = [torch.randint(-40, 40, shape, generator=draw) / 16 for _ in range(4)]
    gram = gram_matrices(make_inputs(values, base).tensors("w"), task_vectors=task_vectors, vectors=vectors)
    origin = base.double() if task_vectors else 0.0
    stack = torch.stack([as_vectors(value.double() - origin, vectors) for value in values])
    wanted = torch.einsum("ivl,jvl->vij", stack, stack)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, wanted)


@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixing_against_float64(shape, vectors, task_vectors):
    draw = torch.Generator().manual_seed(1)
    base, *values = [torch.randn(shape, generator=draw) for _ in range(4)]
    count = len(as_vectors(base, vectors))
    coefficients = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    origin = base.double() if task_vectors else torch.zeros(shape, dtype=torch.float64)
    stack = torch.stack([as_vectors(value.double() - origin, vectors) for value in values])
    wanted = as_vectors(origin, vectors) + torch.einsum("vk,kvl->vl", coefficients, stack)
    inputs = make_inputs(values, base)
    for size in (4, 1000):  # pieces that begin and end inside rows
        pieces = [
            mix(piece, coefficients, task_vectors=task_vectors, vectors=vectors)
            for piece in inputs.tensors("w").pieces(size)
        ]
        merged = torch.cat(pieces).reshape(shape)
        # Three products in float32.
        torch.testing.assert_close(as_vectors(merged, vectors).double(), wanted, rtol=1e-5, atol=1e-6)


def test_mixing_keeps_the_wider_type_and_the_inputs():
    values = [torch.ones(3), torch.full((3,), 1 + 2**-40, dtype=torch.float64)]
    (piece,) = make_inputs(values).tensors("w").pieces()
    merged = mix(piece, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(merged, values[1], rtol=0, atol=0)
    assert values[0].tolist() == [1.0] * 3


def test_angles_of_nearly_parallel_vectors_survive():
    # float32 sums would lose an angle of 1e-6, whose cosine is 1 - 5e-13.
    near = torch.tensor([1.0, 1e-6])
    gram = gram_matrices(make_inputs([torch.tensor([1.0, 0.0]), near]).tensors("w"))
    assert math.acos(float(cosines(gram)[0, 0, 1])) == pytest.approx(1e-6, rel=1e-3)


def test_a_vector_of_zeros_is_orthogonal_to_all():
    gram = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert cosines(gram).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_factors_on_the_arc_by_hand():
    right_angle = torch.eye(2, dtype=torch.float64)
    parallel = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    factors = slerp_coefficients(torch.stack([right_angle, parallel, opposite]), 1 / 3, 0.9995)
    # sin(60 degrees) and sin(30 degrees) over sin(90 degrees)
    wanted = [[3**0.5 / 2, 0.5], [2 / 3, 1 / 3], [2 / 3, 1 / 3]]
    torch.testing.assert_close(factors, torch.tensor(wanted, dtype=torch.float64))


def test_notes_are_sorted_whatever_the_order():
    inputs = make_inputs([torch.ones(1)])
    for name in ("b", "c", "a"):
        note(inputs, "ratios", name, 1.0)
    assert list(inputs.report["ratios"]) == ["a", "b", "c"]
