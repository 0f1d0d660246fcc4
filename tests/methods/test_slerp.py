"""The arc between two members against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.slerp import Slerp


def merge_values(values, **parameters):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    return dict(Slerp(**parameters).merge(MergeInputs.of(members)))["w"]


def oracle(first, second, t):
    first, second = first.double().flatten(), second.double().flatten()
    angle = torch.acos(first @ second / (first.norm() * second.norm()))
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def test_by_hand():
    merged = merge_values([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])], t=1 / 3)
    torch.testing.assert_close(merged, torch.tensor([[3**0.5, 2.0]]))  # sin 60 and sin 30 degrees


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_a_tensor_of_many_pieces_against_float64(t):
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(700, 400, generator=draw), torch.randn(700, 400, generator=draw)
    merged = merge_values([first, first + 0.5 * second], t=t)
    wanted = oracle(first, first + 0.5 * second, t).reshape(700, 400)
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-5, atol=1e-6)  # two products in float32


def test_two_of_one_length_keep_it():
    draw = torch.Generator().manual_seed(1)
    first, second = (torch.nn.functional.normalize(torch.randn(50, generator=draw), dim=0) for _ in range(2))
    assert merge_values([first, second], t=0.3).norm() == pytest.approx(1.0, rel=1e-5)


def test_nearly_parallel_and_opposite_are_interpolated_linearly():
    first = torch.tensor([1.0, 0.0])
    for second in (torch.tensor([3.0, 0.03]), torch.tensor([-3.0, 0.03])):
        torch.testing.assert_close(merge_values([first, second], t=0.25), 0.75 * first + 0.25 * second)
    second = torch.tensor([3.0, 0.3])  # cosine 0.995
    linear = 0.75 * first + 0.25 * second
    torch.testing.assert_close(merge_values([first, second], t=0.25, threshold=0.9), linear)
    assert not torch.allclose(merge_values([first, second], t=0.25), linear)


def test_zeros_count_as_orthogonal():
    merged = merge_values([torch.zeros(2), torch.tensor([2.0, 4.0])])
    torch.testing.assert_close(merged, torch.tensor([2.0, 4.0]) * 0.5**0.5)
    assert merge_values([torch.zeros(2)] * 2).tolist() == [0.0, 0.0]


def test_bfloat16_is_rounded_once():
    draw = torch.Generator().manual_seed(2)
    first, second = (torch.randn(300, generator=draw).bfloat16() for _ in range(2))
    torch.testing.assert_close(
        merge_values([first, second], t=0.3), oracle(first, second, 0.3).bfloat16(), rtol=2**-8, atol=0
    )


@pytest.mark.parametrize("parameters", [{"t": 1.5}, {"t": -0.1}, {"threshold": 1.0}])
def test_what_is_out_of_range_is_refused(parameters):
    with pytest.raises(RecipeError, match=next(iter(parameters))):
        make_method("slerp", parameters)


def test_three_members_are_refused():
    with pytest.raises(MergeError, match="slerp merges 2 members, got 3: m0, m1, m2"):
        merge_values([torch.ones(1)] * 3)
