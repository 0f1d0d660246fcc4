"""EMR-merging against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch
from vectors import around, draw, inputs_of, merge_all, merge_values

from hf_zoo.errors import MergeError
from hf_zoo.methods.base import make_method

BASE = torch.ones(4)
VECTORS = torch.tensor([[1.0, -2.0, 3.0, 1.0], [3.0, 1.0, -1.0, -1.0]])  # signs of the sum + - + 0
UNIFIED = torch.tensor([3.0, -2.0, 3.0, 0.0])


def test_the_unified_model_by_hand():
    torch.testing.assert_close(merge_values("emr", BASE, around(BASE, VECTORS)), BASE + UNIFIED, rtol=0, atol=0)
    half = merge_values("emr", BASE, around(BASE, VECTORS), scale=0.5)
    torch.testing.assert_close(half, BASE + 0.5 * UNIFIED, rtol=0, atol=0)


def test_the_models_of_the_tasks_by_hand():
    first = merge_values("emr", BASE, around(BASE, VECTORS), task=0)  # all but the last: 7 of size, 8 of the unified
    torch.testing.assert_close(first, BASE + 7 / 8 * UNIFIED)
    second = merge_values("emr", BASE, around(BASE, VECTORS), task=1)  # the first alone: 6 of size, 3 of the unified
    torch.testing.assert_close(second, BASE + 2 * torch.tensor([3.0, 0.0, 0.0, 0.0]))


def test_rescalers_are_those_of_the_whole_model_and_reported():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    members = [{"a": VECTORS[k, :2], "b": VECTORS[k, 2:]} for k in range(2)]
    merged = merge_all("emr", base, members, task=1)
    torch.testing.assert_close(merged["a"], torch.tensor([6.0, 0.0]))
    torch.testing.assert_close(merged["b"], torch.zeros(2))
    inputs = inputs_of(base, members)
    dict(make_method("emr").merge(inputs))
    assert inputs.report["rescalers"] == {"m0": pytest.approx(7 / 8), "m1": pytest.approx(2.0)}


def test_several_pieces_against_float64():
    base, vectors = draw(200_001), draw(3, 200_001, seed=1)
    wide = vectors.double()
    sign = wide.sum(0).sign()
    unified = sign * torch.where(wide.sign() == sign, wide.abs(), 0).amax(0)
    mask = wide[2] * unified > 0
    wanted = base + mask * unified * wide[2].abs().sum() / (mask * unified).abs().sum()
    torch.testing.assert_close(
        merge_values("emr", base, around(base, vectors)).double(), base + unified, rtol=0, atol=0
    )
    merged = merge_values("emr", base, around(base, vectors), task=2)
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)


def test_a_single_member_is_returned():
    for task in (None, 0):
        torch.testing.assert_close(merge_values("emr", BASE, [BASE + VECTORS[0]], task=task), BASE + VECTORS[0])


def test_a_task_that_is_not_there_is_refused():
    with pytest.raises(MergeError, match="emr: task must be a member's place from 0 to 1, got 2"):
        merge_values("emr", BASE, around(BASE, VECTORS), task=2)
