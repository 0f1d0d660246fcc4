"""The weighted mean against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.means import weighted_mean
from hf_zoo.methods.average import Average
from hf_zoo.methods.base import make_method


def merge_values(values, dtype=torch.float32, output=None, **parameters):
    members = [CheckpointReader.of({"w": torch.tensor(v, dtype=dtype)}, f"m{i}") for i, v in enumerate(values)]
    return dict(Average(**parameters).merge(MergeInputs.of(members, output)))["w"]


def test_by_hand():
    torch.testing.assert_close(merge_values([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([2.0, 4.0]), rtol=0, atol=0)
    merged = merge_values([[1.0, 2.0], [3.0, 6.0]], weights=(3.0, 1.0))
    torch.testing.assert_close(merged, torch.tensor([1.5, 3.0]), rtol=0, atol=0)


def test_many_members_against_float64():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(16, 50, generator=draw)
    weights = torch.rand(16, generator=draw).tolist()
    oracle = (torch.tensor(weights, dtype=torch.float64)[:, None] * values.double()).sum(0) / sum(weights)
    # 16 additions in float32: a few units in the last place of the largest partial sum
    torch.testing.assert_close(weighted_mean(values, weights).double(), oracle, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    # In bfloat16 256 + 1 is 256: nine additions there would give 256 / 9. The mean, 264 / 9, rounds to 29.375.
    merged = merge_values([[256.0]] + [[1.0]] * 8, torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, torch.tensor([29.375], dtype=torch.bfloat16), rtol=0, atol=0)


def test_float64_stays_float64():
    merged = merge_values([[1.0], [1.0 + 2**-40]], torch.float64)
    torch.testing.assert_close(merged, torch.tensor([1.0 + 2**-41], dtype=torch.float64), rtol=0, atol=0)


def test_the_type_can_be_chosen_and_the_widest_is_kept():
    assert merge_values([[1.0], [2.0]], output=torch.float16).dtype == torch.float16
    members = [
        CheckpointReader.of({"w": torch.ones(1, dtype=dtype)}, str(dtype)) for dtype in (torch.bfloat16, torch.float32)
    ]
    for order in (members, members[::-1]):
        assert dict(Average().merge(MergeInputs.of(order)))["w"].dtype == torch.float32


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [-1.0, 0.5], []])
def test_weights_without_a_mean_are_refused(weights):
    with pytest.raises(RecipeError, match="parameters: weights must be finite and their sum above 0"):
        make_method("average", {"weights": weights})


def test_infinite_weights_are_refused():
    with pytest.raises(MergeError, match="weights must be finite"):
        Average(weights=(1.0, float("inf")))


def test_a_wrong_number_of_weights_is_refused_with_the_members():
    with pytest.raises(MergeError, match="average: weights needs one value a member: got 3 for 2 members: m0, m1"):
        merge_values([[1.0], [2.0]], weights=(1.0, 1.0, 1.0))


def test_integer_buffers_are_the_first_members():
    members = [CheckpointReader.of({"count": torch.tensor(n), "mask": torch.tensor([n > 5])}, str(n)) for n in (7, 3)]
    merged = dict(Average().merge(MergeInputs.of(members)))
    assert merged["count"].item() == 7
    assert merged["mask"].tolist() == [True]
    assert merged["mask"].dtype == torch.bool
