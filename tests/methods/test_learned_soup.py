"""Learned soups: the average to begin with, the optimum of a convex problem in the end."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_model
from trials import family_trial, trial_of

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.ingredients import open_ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method

optimize = pytest.importorskip("scipy.optimize", reason="the oracle")

NUM_CLASSES = 3


def run(inputs, **parameters):
    return dict(make_method("learned_soup", parameters).merge(inputs))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Members that differ in their last layer alone: logits are linear in the coefficients of its two tensors.

    Returns the inputs, the members' logits without bias and their biases, (K, N, C) and (K, C), and the labels.
    """
    folder = tmp_path_factory.mktemp("linear")
    model = make_model("vit", 1)
    model.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(3, NUM_CLASSES, 16, generator=draw)
    biases = torch.randn(3, NUM_CLASSES, generator=draw)
    images = torch.randn(40, 1, 8, 8, generator=draw)
    with torch.no_grad():
        features = model.vit(images).last_hidden_state[:, 0]
        mean = features.mean(0)
        weights -= (weights @ mean)[..., None] * mean / mean.square().sum()  # else all images would look alike
        weights *= 2 / (features @ weights.mT).std()
        alone = features @ weights.mT
        noise = torch.randn(40, NUM_CLASSES, generator=draw)
        labels = (alone[0] + biases[0] + noise).argmax(-1)
    state = dict(CheckpointReader.open(folder))
    members = [
        CheckpointReader.of(state | {"classifier.weight": w, "classifier.bias": b}, f"member-{i}")
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trial = trial_of([open_ingredient(str(folder))], "image_classification", samples)
    return MergeInputs.of(members, trials=(trial,)), alone.double(), biases.double(), labels


def loss_of(x, alone, biases, labels):
    """Return the loss in float64 of coefficients of the weights, of the biases, and log beta."""
    weight, bias = torch.tensor(x[:6]).reshape(2, 3)
    logits = torch.einsum("k,knc->nc", weight, alone) + bias @ biases
    return float(torch.nn.functional.cross_entropy(np.exp(x[6]) * logits, labels))


def least_loss(*problem):
    """Minimise over both simplices, starting from all their corners and the middle."""
    corners = [np.r_[w, b, 0.0] for w in np.eye(3) for b in np.eye(3)]
    simplices = [{"type": "eq", "fun": lambda x, s=s: x[s].sum() - 1} for s in (slice(0, 3), slice(3, 6))]
    bounds = [(0, 1)] * 6 + [(-3, 3)]
    options = {"ftol": 1e-10, "maxiter": 300}
    found = [
        optimize.minimize(loss_of, x, problem, "SLSQP", bounds=bounds, constraints=simplices, options=options)
        for x in [np.r_[np.full(6, 1 / 3), 0.0], *corners]
    ]
    return min(one.fun for one in found)


def test_without_a_step_it_is_the_average(reader):
    members = [reader("bert", seed) for seed in (1, 2, 3)]
    inputs = MergeInputs.of(members, trials=(family_trial("bert"),))
    wanted = dict(make_method("average").merge(MergeInputs.of(members)))
    for name, tensor in run(inputs, num_epochs=0).items():
        torch.testing.assert_close(tensor, wanted[name])
    (losses, same) = (inputs.report[f"validation loss of the {what}"] for what in ("average", "soup"))
    assert losses == same
    assert inputs.report["beta"] == {"task": 1.0}


def test_it_comes_to_the_least_loss_of_a_problem_with_one(linear):
    inputs, *problem = linear
    inputs = dataclasses.replace(inputs, report={})
    least, start = least_loss(*problem), loss_of(np.r_[np.full(6, 1 / 3), 0.0], *problem)
    merged = run(inputs, learning_rate=0.2, num_epochs=600)
    assert inputs.report["validation loss of the average"]["task"] == pytest.approx(start, abs=1e-5)
    found = inputs.report["validation loss of the soup"]["task"]
    assert start - least > 0.05
    assert least - 1e-5 < found < least + 1e-3  # AdamW with a constant step hovers around the optimum
    # what is reported is what was merged
    rows = dict(zip(inputs.report["tensors"], zip(*inputs.report["coefficients"].values(), strict=True), strict=True))
    for name in ("classifier.weight", "classifier.bias"):
        own = sum(c * member[name] for c, member in zip(rows[name], inputs.members, strict=True))
        torch.testing.assert_close(merged[name], own)
        assert sum(rows[name]) == pytest.approx(1)
    log_beta = np.log(inputs.report["beta"]["task"])
    told = np.r_[rows["classifier.weight"], rows["classifier.bias"], log_beta]
    assert loss_of(told, *problem) == pytest.approx(found, abs=1e-5)


def test_the_whole_model_may_have_one_coefficient_a_member(linear):
    inputs, *_ = linear
    inputs = dataclasses.replace(inputs, report={})
    run(inputs, granularity="model", num_epochs=50)
    shares = inputs.report["coefficients"].values()
    assert all(len(set(own)) == 1 for own in shares)
    assert sum(own[0] for own in shares) == pytest.approx(1)
    before, after = (inputs.report[f"validation loss of the {what}"]["task"] for what in ("average", "soup"))
    assert after < before - 0.05


def test_running_statistics_get_the_mean(reader):
    members = [reader("resnet", seed) for seed in (1, 2, 3)]
    merged = run(MergeInputs.of(members, trials=(family_trial("resnet"),)), learning_rate=1.0, num_epochs=2)
    wanted = dict(make_method("average").merge(MergeInputs.of(members)))
    statistics = [name for name in merged if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(merged[name], wanted[name])
    weight = "resnet.embedder.embedder.convolution.weight"
    assert not torch.allclose(merged[weight], wanted[weight], atol=1e-3)


def test_tasks_are_learned_together(reader):
    members = [reader("bert", seed) for seed in (1, 2)]
    first = family_trial("bert")
    second = dataclasses.replace(first, task="other", tables={"validation": first.tables["validation"][:2]})
    inputs = MergeInputs.of(members, trials=(first, second))
    run(inputs, num_epochs=20)
    before, after = (inputs.report[f"validation loss of the {what}"] for what in ("average", "soup"))
    assert set(after) == {"task", "other"}
    assert sum(after.values()) < sum(before.values())


def test_a_loss_that_is_not_finite_is_told(linear):
    (trial,) = linear[0].trials
    first, *others = trial.tables["validation"]
    spoilt = {**first, "pixel_values": torch.full((1, 8, 8), float("nan"))}
    trial = dataclasses.replace(trial, tables={"validation": [spoilt, *others]})
    with pytest.raises(MergeError, match="learned_soup: what it lowers is not finite on the validation data"):
        run(dataclasses.replace(linear[0], trials=(trial,), report={}), num_epochs=1)


@pytest.mark.parametrize("wrong", [{"learning_rate": -1.0}, {"num_epochs": -1}, {"batch_size": 0}])
def test_hyper_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        make_method("learned_soup", wrong)
