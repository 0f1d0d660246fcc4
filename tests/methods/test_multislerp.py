"""The mean direction at the mean length, by hand and by the tangent-space construction in float64."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.multislerp import Multislerp


def make_inputs(values, base=None):
    members = [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)]
    return MergeInputs.of(members, base=None if base is None else CheckpointReader.of({"w": base}, "base"))


def merge_values(values, base=None, **parameters):
    return dict(Multislerp(**parameters).merge(make_inputs(values, base)))["w"]


def tangent_space(values, weights):
    """Project to the tangent space at the mean direction, average there and project back, as its author states it."""
    values, weights = values.double(), torch.tensor(weights, dtype=torch.float64)[:, None]
    norms = values.norm(dim=1, keepdim=True)
    units = values / norms
    mean = (weights * units).sum(0)
    mean = mean / mean.norm()
    tangent = (weights * (units - (units @ mean)[:, None] * mean)).sum(0)
    size = tangent.norm() + 1e-300
    return (torch.cos(size) * mean + torch.sin(size) / size * tangent) * (weights * norms).sum()


def test_by_hand():
    merged = merge_values([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])])
    torch.testing.assert_close(merged, torch.full((2,), 4 * 0.5**0.5))
    merged = merge_values([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 8.0])], weights=(3.0, 4.0))
    torch.testing.assert_close(merged, (3 * 3 + 4 * 8) / 7 * torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_construction_in_the_tangent_space(normalize):
    draw = torch.Generator().manual_seed(0)
    base, values, weights = torch.randn(200, generator=draw), torch.randn(5, 200, generator=draw), (1, 2, 0, 0.5, 3)
    merged = merge_values(values, base, weights=weights, task_vectors=True, normalize=normalize)
    scaled = [weight / (sum(weights) if normalize else 1) for weight in weights]
    wanted = base.double() + tangent_space(values - base, scaled)
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-5, atol=1e-5)  # products in float32


def test_directions_that_cancel_out_are_averaged_and_named():
    inputs = make_inputs([torch.tensor([1.0]), torch.tensor([-3.0])])
    assert dict(Multislerp().merge(inputs))["w"].tolist() == [-1.0]
    assert list(inputs.report["averaged"]) == ["w"]


def test_members_without_a_direction_count_with_their_length_alone():
    merged = merge_values([torch.zeros(2), torch.tensor([0.0, 6.0]), torch.tensor([0.0, 3.0])])
    torch.testing.assert_close(merged, torch.tensor([0.0, 3.0]))
    assert merge_values([torch.zeros(2)] * 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -0.5), (), (float("nan"), 1.0)])
def test_weights_without_a_mean_are_refused(weights):
    with pytest.raises(MergeError, match="weights must be finite, none negative and their sum above 0"):
        Multislerp(weights=weights)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(MergeError, match="multislerp: weights needs one value a member: got 1 for 2 members"):
        merge_values([torch.ones(1)] * 2, weights=(1.0,))
