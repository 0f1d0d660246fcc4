"""The ratio between base and mean by hand, against float64, and as the projection it is derived from."""

import json

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.model_stock import ModelStock
from hf_zoo.streaming import write_merge


def make_inputs(values, base):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    return MergeInputs.of(members, base=CheckpointReader.of({"w": base}, "base"))


def merge_values(values, base, **parameters):
    return dict(ModelStock(**parameters).merge(make_inputs(values, base)))["w"]


def test_by_hand():
    base = torch.tensor([1.0, 1.0])
    # Task vectors at 60 degrees, of lengths 2 and 1: t = 2 cos / (1 + cos) = 2/3.
    task_vectors = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5]])
    inputs = make_inputs(list(base + task_vectors), base)
    merged = dict(ModelStock().merge(inputs))["w"]
    torch.testing.assert_close(merged, base + 2 / 3 * task_vectors.mean(0))
    assert inputs.report["ratios"]["w"] == pytest.approx(2 / 3)


def test_many_members_against_float64():
    draw = torch.Generator().manual_seed(0)
    base, shared = torch.randn(300_000, generator=draw), torch.randn(300_000, generator=draw)
    values = base + shared + torch.randn(4, 300_000, generator=draw)
    task_vectors = values.double() - base.double()
    units = task_vectors / task_vectors.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(4, 4, 1)
    cosine = (units @ units.T)[first, second].mean()
    wanted = base.double() + 4 * cosine / (1 + 3 * cosine) * task_vectors.mean(0)
    torch.testing.assert_close(merge_values(list(values), base).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_members_around_a_centre_find_the_point_nearest_to_it(count):
    # The paper's picture: members equally far from a centre, at right angles around it and to the base's direction.
    centre, around = torch.zeros(10).double(), 2.0 * torch.eye(10).double()[1 : count + 1]
    centre[0] = 3.0
    members = centre + around
    merged = merge_values(list(members), torch.zeros(10).double())
    mean = members.mean(0)
    nearest = (centre @ mean) / (mean @ mean) * mean
    torch.testing.assert_close(merged, nearest)


def test_each_row_may_have_its_own_ratio():
    draw = torch.Generator().manual_seed(1)
    base, *values = torch.randn(4, 3, 2, 2, 2, generator=draw)
    base, values = base.double(), [base.double() + 3 + value for value in values]
    merged = merge_values(values, base, vectors="rows")
    for row in range(3):
        wanted = merge_values([value[row] for value in values], base[row])
        torch.testing.assert_close(merged[row], wanted)
    assert not torch.allclose(merged, merge_values(values, base))


def test_members_at_more_than_a_right_angle_give_the_base():
    # A cosine of -1/2: t = -2, away from the mean.
    base, values = torch.tensor([5.0, 5.0]), [torch.tensor([6.0, 5.0]), torch.tensor([4.5, 5 + 0.75**0.5])]
    assert merge_values(values, base).tolist() == [5.0, 5.0]
    unclipped = base - 2 * (torch.stack(values).mean(0) - base)
    torch.testing.assert_close(merge_values(values, base, clip=False), unclipped)


def test_opposite_members_give_the_base_without_a_clip_too():
    base = torch.tensor([5.0, 5.0])
    assert merge_values([base + 1, base - 1], base, clip=False).tolist() == [5.0, 5.0]


def test_one_member_has_no_angle():
    with pytest.raises(MergeError, match="model_stock merges 2 or more members, got 1"):
        merge_values([torch.ones(2)], torch.zeros(2))


def test_members_that_agree_are_kept():
    torch.testing.assert_close(merge_values([torch.ones(2)] * 3, torch.zeros(2)), torch.ones(2))


def test_weights_and_report_do_not_depend_on_the_threads(tmp_path):
    draw = torch.Generator().manual_seed(2)
    tensors = [{f"w{i}": torch.randn(40 + i, 50, generator=draw) for i in range(12)} for _ in range(4)]
    base, *members = [CheckpointReader.of(own, f"m{i}") for i, own in enumerate(tensors)]
    made = []
    for num_threads in (1, 4):
        inputs = MergeInputs.of(members, base=base)
        (tmp_path / str(num_threads)).mkdir()
        (path,) = write_merge(
            tmp_path / str(num_threads), ModelStock(clip=False), inputs, num_threads=num_threads
        ).paths
        made.append((path.read_bytes(), json.dumps(inputs.report)))
    assert made[0] == made[1]
    assert len(json.loads(made[0][1])["ratios"]) == 12
