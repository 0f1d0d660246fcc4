"""Arcs by tensor, row and column against a dense float64 oracle."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.nuslerp import Nuslerp


def merge_values(values, base=None, **parameters):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    base = None if base is None else CheckpointReader.of({"w": base}, "base")
    return dict(Nuslerp(**parameters).merge(MergeInputs.of(members, base=base)))["w"]


def oracle(first, second, t, dim):
    first, second = first.double(), second.double()
    cosine = (first * second).sum(dim, keepdim=True) / (
        first.norm(dim=dim, keepdim=True) * second.norm(dim=dim, keepdim=True)
    )
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def test_by_hand():
    first, second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    half = 0.5**0.5
    # By rows the first pair is at a right angle and the second parallel.
    torch.testing.assert_close(merge_values([first, second], vectors="rows"), torch.tensor([[half, half], [2.0, 0.0]]))
    # By columns (1, 1) and (0, 3) are at 45 degrees, where half way has 1 / (2 cos 22.5) of each; the other, 0 and
    # (1, 0), count as at a right angle.
    part = 0.5 / (0.5 + 0.5 * half) ** 0.5
    torch.testing.assert_close(
        merge_values([first, second], vectors="columns"), torch.tensor([[part, half], [4 * part, 0.0]])
    )


@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize(("vectors", "dim"), [("tensor", (0, 1)), ("rows", 1), ("columns", 0)])
def test_matrices_against_float64(vectors, dim, task_vectors):
    draw = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(500, 300, generator=draw) for _ in range(3))
    merged = merge_values(
        [first, second], base, vectors=vectors, task_vectors=task_vectors, weights=(1.0, 3.0)
    ).double()
    origin = base.double() if task_vectors else 0.0
    wanted = origin + oracle(first - origin, second - origin, 0.75, dim)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)  # products in float32


def test_a_row_of_a_kernel_is_all_an_output_reads():
    draw = torch.Generator().manual_seed(1)
    first, second = torch.randn(6, 4, 3, 3, generator=draw), torch.randn(6, 4, 3, 3, generator=draw)
    kernels = merge_values([first, second], vectors="rows")
    matrices = merge_values([first.reshape(6, 36), second.reshape(6, 36)], vectors="rows")
    torch.testing.assert_close(kernels.reshape(6, 36), matrices, rtol=0, atol=0)


def test_a_tensor_of_one_dimension_is_one_vector():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for vectors in ("rows", "columns"):
        torch.testing.assert_close(merge_values([first, second], vectors=vectors), torch.full((2,), 2**0.5))


def test_a_small_angle_is_no_line():
    # At a cosine of 0.9998 slerp interpolates linearly.
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.02])
    wanted = oracle(first, second, 0.5, 0)
    merged = merge_values([first.double(), second.double()])
    torch.testing.assert_close(merged, wanted)
    assert (merged - (first + second) / 2).abs().max() > 1e-5


def test_opposite_vectors_are_interpolated_linearly():
    merged = merge_values([torch.tensor([1.0, 2.0]), torch.tensor([-2.0, -4.0])], weights=(3.0, 1.0))
    torch.testing.assert_close(merged, torch.tensor([0.25, 0.5]))


def test_task_vectors_need_a_base():
    with pytest.raises(MergeError, match="nuslerp needs the base model"):
        merge_values([torch.ones(2), torch.ones(2)], task_vectors=True)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [float("inf"), 1.0], [1.0], [1.0, 1.0, 1.0]])
def test_weights_without_a_share_are_refused(weights):
    with pytest.raises(RecipeError, match="weights"):
        make_method("nuslerp", {"weights": weights})
