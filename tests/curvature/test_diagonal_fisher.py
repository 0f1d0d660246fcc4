"""The diagonal Fisher against closed forms and against one example at a time."""

import numpy as np
import pytest
import torch
from oracles import BATCHES, LABELS, MODELS, assert_same, make, one_by_one, texts
from torch import nn
from torch.nn import functional as F

from hf_zoo.curvature.fisher import DiagonalFisher, diagonal_fisher
from hf_zoo.curvature.likelihoods import Estimator, class_factor
from hf_zoo.errors import ModelError


class Regression(nn.Module):
    """A linear layer: its logits are W x + b."""

    def __init__(self, width=4, outputs=3):
        super().__init__()
        self.layer = nn.Linear(width, outputs).double()

    def forward(self, x):
        return self.layer(x)


def softmax_regression(count=6):
    torch.manual_seed(0)
    model, x = Regression(), torch.randn(count, 4, dtype=torch.float64)
    return model, x, model(x).detach().softmax(-1)


def test_the_exact_fisher_of_softmax_regression_is_its_closed_form():
    model, x, p = softmax_regression()
    got = diagonal_fisher(model, [{"x": x}], "image_classification", dtype=torch.float64)
    variance = p * (1 - p)
    # Both sides are sums of six float64 products.
    torch.testing.assert_close(got["layer.weight"], torch.einsum("bk,bi->ki", variance, x**2) / 6, rtol=1e-12, atol=0)
    torch.testing.assert_close(got["layer.bias"], variance.mean(0), rtol=1e-12, atol=0)


def test_class_factors_square_to_the_information_of_a_softmax():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, 0], logits[1, -1], logits[2, :3] = 800.0, 800.0, -800.0  # classes that are certain, and impossible
    p = logits.softmax(-1)
    factor = torch.stack([class_factor(p, column) for column in range(5)], -1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_agrees_with_one_example_at_a_time(name, kind):
    model, objective, batch = make(name)
    if kind == "exact" and objective in ("masked_lm", "causal_lm"):  # a backward pass a token of the vocabulary
        batch = {key: value[:3, :6] for key, value in batch.items()}
    expected = one_by_one(model, objective, batch, kind)
    got = diagonal_fisher(model, [batch], objective, Estimator(kind), dtype=torch.float64)
    # T5 computes its norms in float32 whatever the weights are.
    assert_same(got, expected, 1e-5 if name == "t5" else 1e-10)


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
def test_float32_is_enough(name):
    model, objective, batch = make(name)
    expected = one_by_one(model, objective, batch, "empirical")
    got = diagonal_fisher(model, [batch], objective, Estimator("empirical"))
    assert {value.dtype for value in got.values()} == {torch.float32}
    for key, value in expected.items():
        assert float((got[key] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-12, key


def test_sampled_labels_come_to_the_exact_fisher():
    model, x, p = softmax_regression()
    draws = 1000
    exact = diagonal_fisher(model, [{"x": x}], "image_classification", dtype=torch.float64)["layer.weight"]
    estimator = Estimator("sampled", num_samples=draws)
    got = diagonal_fisher(model, [{"x": x}], "image_classification", estimator, dtype=torch.float64)["layer.weight"]
    scores = torch.eye(3, dtype=torch.float64) - p[:, None]  # example, label drawn, class
    squares = torch.einsum("byk,bi->byki", scores**2, x**2)
    mean = torch.einsum("by,byki->bki", p, squares)
    variance = torch.einsum("by,byki->bki", p, (squares - mean[:, None]) ** 2).sum(0) / (6**2 * draws)
    assert float(((got - exact) / variance.sqrt()).abs().max()) < 5  # twelve standard normals
    assert float((got - exact).abs().max()) > 0


def test_the_squared_batch_gradient_is_as_large_on_average():
    model, x, _ = softmax_regression(8)
    exact = diagonal_fisher(model, [{"x": x}], "image_classification", dtype=torch.float64)["layer.weight"]
    repeats = []
    for seed in range(400):
        estimator = Estimator("sampled", seed=seed)
        fisher = DiagonalFisher(model, "image_classification", estimator, per_example=False, dtype=torch.float64)
        fisher.add({"x": x})
        repeats.append(fisher.mean()["layer.weight"])
    found = torch.stack(repeats)
    error = (found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)
    assert float(error.abs().max()) < 5
    # Without the factor of the batch size it would be an eighth.
    assert float((found.mean(0) / exact).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_squared_batch_gradient_is_refused_where_it_is_biased(kind):
    with pytest.raises(ModelError, match="per_example=false"):
        DiagonalFisher(Regression(), "image_classification", Estimator(kind), per_example=False)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_batches_and_their_order_do_not_matter(name):
    model, objective, batch = make(name)
    whole = DiagonalFisher(model, objective, Estimator("sampled", 2, seed=3), dtype=torch.float64)
    whole.add(batch)
    parts = DiagonalFisher(model, objective, Estimator("sampled", 2, seed=3), dtype=torch.float64)
    for places in ([4], [1, 3], [0, 2]):
        parts.add({key: value[places] for key, value in batch.items()}, np.array(places))
    assert parts.num_examples == 5
    assert_same(parts.mean(), whole.mean(), 1e-10)


def test_other_seeds_draw_other_labels():
    model, objective, batch = make("bert")
    first, second = (
        diagonal_fisher(model, [batch], objective, Estimator("sampled", seed=seed), dtype=torch.float64)
        for seed in (0, 1)
    )
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])


@pytest.mark.parametrize("shape", [(7, 2), (7,)])
def test_regression_is_gaussian_of_unit_variance(shape):
    torch.manual_seed(0)
    outputs = 1 if len(shape) == 1 else 2
    model, x, y = Regression(outputs=outputs), torch.randn(7, 4, dtype=torch.float64), torch.randn(shape).double()
    batch = {"x": x, "labels": y}
    exact = diagonal_fisher(model, [batch], "regression", dtype=torch.float64)["layer.weight"]
    torch.testing.assert_close(exact, (x**2).mean(0).expand(outputs, 4), rtol=1e-12, atol=0)
    empirical = diagonal_fisher(model, [batch], "regression", Estimator("empirical"), dtype=torch.float64)
    residual = y.reshape(7, outputs) - model(x).detach()
    expected = torch.einsum("bo,bi->oi", residual**2, x**2) / 7
    torch.testing.assert_close(empirical["layer.weight"], expected, rtol=1e-12, atol=0)
    drawn = diagonal_fisher(model, [batch], "regression", Estimator("sampled", 1000), dtype=torch.float64)
    # A squared normal has variance 2: the standard error of the mean of 1000 is 4.5 %, of a sum of seven less.
    torch.testing.assert_close(drawn["layer.weight"], exact, rtol=0.2, atol=0)


def test_the_model_is_left_as_it_was():
    model, objective, batch = make("bert")
    model.train()
    model.bert.embeddings.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = diagonal_fisher(model, [batch], objective, dtype=torch.float64)
    assert model.training
    assert model.bert.encoder.layer[0].attention.self.dropout.training
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Frozen parameters have a Fisher too, and dropout, which was on, had no part in it.
    model.eval().requires_grad_(True)
    assert_same(fisher, one_by_one(model, objective, batch, "exact"), 1e-10)


class Devious(nn.Module):
    """Read weights past their modules, share them, add constants, and put the examples second on the way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.shared = nn.Linear(5, 5, bias=False)
        self.never = nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.randn(5))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        hidden = F.linear(x, 2 * self.first.weight, self.first.bias).tanh() + self.shift
        hidden = self.second(hidden.transpose(0, 1)).transpose(0, 1)  # rows before examples
        hidden = self.shared(self.shared(hidden).tanh()) + hidden @ self.shared.weight
        return self.head(self.norm(hidden).mean(1))


@pytest.mark.parametrize("rows", [3, 6])
def test_gradients_are_found_wherever_a_network_uses_its_weights(rows):
    torch.manual_seed(0)
    model, x = Devious(), torch.randn(6, rows, 4, dtype=torch.float64)
    fisher = diagonal_fisher(model, [{"x": x}, {"x": x[:1]}], "image_classification", dtype=torch.float64)
    x = torch.cat([x, x[:1]])

    def one(values, example):
        return torch.func.functional_call(model, values, (example[None],))[0]

    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    p = model(x).detach().softmax(-1)
    jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))(values, x)
    information = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    for name, J in jacobian.items():
        J = J.flatten(2)
        expected = torch.einsum("bki,bkl,bli->i", J, information, J) / len(x)
        torch.testing.assert_close(fisher[name].flatten(), expected, rtol=1e-9, atol=1e-15, msg=name)
    assert not fisher["never.weight"].any()


class Peeking(Regression):
    """Look at a value of the batch, which vmap forbids, with a parameter outside any module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3).double())

    def forward(self, x):
        return self.layer(x) * self.scale if float(x.sum()) else self.layer(x)


def test_a_model_that_cannot_be_taken_apart_is_refused_with_a_way_out():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(ModelError, match="gradients of scale cannot be told apart.*per_example=false"):
        diagonal_fisher(Peeking(), [{"x": x}], "image_classification", dtype=torch.float64)
    found = diagonal_fisher(Peeking(), [{"x": x}], "image_classification", Estimator("sampled"), per_example=False)
    assert found["scale"].any()


def test_padding_changes_nothing():
    model, objective, batch = make("gpt2")
    longer = {key: F.pad(value, (0, 4)) for key, value in batch.items()}
    expected = diagonal_fisher(model, [batch], objective, Estimator("sampled"), dtype=torch.float64)
    got = diagonal_fisher(model, [longer], objective, Estimator("sampled"), dtype=torch.float64)
    assert_same(got, expected, 1e-10)


@pytest.mark.parametrize(
    ("objective", "kind", "batch", "message"),
    [
        ("contrastive", "exact", {}, "no Fisher information"),
        ("sequence_clasification", "exact", {}, "did you mean 'sequence_classification'"),
        ("sequence_classification", "empirical", texts(), "needs one class index an example, got none"),
        ("masked_lm", "sampled", texts(), "-100 where nothing counts, got none"),
    ],
)
def test_mistakes_are_told(objective, kind, batch, message):
    model, _, _ = make("bert-mlm" if objective == "masked_lm" else "bert")
    with pytest.raises(ModelError, match=message):
        diagonal_fisher(model, [batch], objective, Estimator(kind), dtype=torch.float64)


def test_an_exact_expectation_over_a_large_vocabulary_is_refused():
    model, objective, _ = make("gpt2")
    batch = {"input_ids": torch.randint(5, 50, (2, 30))}
    with pytest.raises(ModelError, match=r"29 predictions of 50 classes need 1,421 backward passes.*sampled"):
        diagonal_fisher(model, [batch], objective, dtype=torch.float64)


def test_nothing_to_average_is_refused():
    with pytest.raises(ModelError, match="no examples"):
        DiagonalFisher(Regression(), "regression").mean()


def test_families_and_batches_are_paired():
    assert set(MODELS) == set(BATCHES)
    assert len(LABELS) == 5
