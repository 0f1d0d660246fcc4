"""The Karcher mean against slerp's closed form, symmetry, and its own condition in full dimension."""

import math

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.karcher import Karcher, spherical_mean


def make_inputs(values):
    return MergeInputs.of([CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values)])


def merge_values(values, **parameters):
    return dict(Karcher(**parameters).merge(make_inputs(values)))["w"]


def at(*degrees):
    return [torch.tensor([math.cos(math.radians(one)), math.sin(math.radians(one))]).double() for one in degrees]


def log_map(mean, unit):
    """Return the vector at `mean` that leads to `unit` along the great circle."""
    across = unit - (mean @ unit) * mean
    return torch.atan2(across.norm(), mean @ unit) * across / across.norm()


def test_on_a_circle_the_mean_direction_is_the_mean_angle():
    torch.testing.assert_close(merge_values(at(0, 30, 90)), at(40)[0])
    # The direction of the plain mean would be 37.4 degrees.
    merged = merge_values(at(0, 30, 90), weights=(1.0, 2.0, 1.0))
    torch.testing.assert_close(merged, at(37.5)[0])


def test_lengths_are_averaged():
    first, second = at(10, 70)
    torch.testing.assert_close(merge_values([2 * first, 5 * second], weights=(1.0, 2.0)), 4 * at(50)[0])


@pytest.mark.parametrize("spread", [1e-4, 0.1, 1.0, 10.0])
def test_the_pulls_of_the_members_cancel_out(spread):
    draw = torch.Generator().manual_seed(0)
    centre, noise = torch.randn(400, generator=draw).double(), torch.randn(6, 400, generator=draw).double()
    values, weights = centre + spread * noise, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1]).double()
    merged = merge_values(values, weights=tuple(weights.tolist()))
    norms = values.norm(dim=1)
    assert float(merged.norm()) == pytest.approx(float(weights @ norms / weights.sum()))
    mean = merged / merged.norm()
    pulls = torch.stack([log_map(mean, unit) for unit in values / norms[:, None]])
    rest = (weights[:, None] * pulls).sum(0).norm() / (weights @ pulls.norm(dim=1))
    assert rest < 1e-9  # the default tolerance is 1e-10, the angles between 1e-4 and 1.5


def test_two_members_of_one_length_are_slerp():
    draw = torch.Generator().manual_seed(1)
    values = [torch.nn.functional.normalize(torch.randn(30, generator=draw).double(), dim=0) for _ in range(2)]
    inputs = make_inputs(values)
    wanted = dict(make_method("slerp", {"t": 0.3}).merge(inputs))["w"]
    torch.testing.assert_close(merge_values(values, weights=(0.7, 0.3)), wanted)


def test_more_dimensions_than_memory_is_asked_for_change_nothing():
    # Two pieces of a piece's size and a rest, with all directions in them.
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(3, 300_000, generator=draw)
    units = values.double() / values.double().norm(dim=1, keepdim=True)
    coefficients, _ = spherical_mean(units @ units.T, torch.full((3,), 1 / 3).double(), 100, 1e-12)
    wanted = coefficients @ units * values.double().norm(dim=1).mean()
    torch.testing.assert_close(merge_values(values).double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_member_of_zeros_only_shortens():
    torch.testing.assert_close(merge_values([torch.zeros(2).double(), *at(20, 60)]), 2 / 3 * at(40)[0])
    assert merge_values([torch.zeros(2)] * 3).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("values", [[[1.0], [-3.0]], [[2.0], [2.0], [-1.0]], [[0.0, 1.0], [0.0, -1.0]]])
def test_without_a_mean_direction_members_are_averaged_and_named(values):
    values = torch.tensor(values)
    inputs = make_inputs(values)
    torch.testing.assert_close(dict(Karcher().merge(inputs))["w"], values.mean(0))
    assert list(inputs.report["averaged"]) == ["w"]


def test_steps_that_run_out_are_told():
    inputs = make_inputs(at(0, 30, 90))
    # No step at all: the direction of the mean.
    merged = dict(Karcher(max_iterations=0).merge(inputs))["w"]
    plain = sum(at(0, 30, 90))
    torch.testing.assert_close(merged, plain / plain.norm())
    assert 1e-3 < inputs.report["not_converged"]["w"] < 0.1


@pytest.mark.parametrize("parameters", [{"tolerance": 0.0}, {"max_iterations": -1}, {"weights": [1.0, -1.0]}])
def test_what_is_out_of_range_is_refused(parameters):
    with pytest.raises(RecipeError, match=next(iter(parameters))):
        make_method("karcher", parameters)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(MergeError, match="karcher: weights needs one value a member: got 3 for 2 members"):
        merge_values(at(0, 10), weights=(1.0, 1.0, 1.0))
