"""The losses against explicit loops in float64."""

import math

import pytest
import torch

from hf_zoo.errors import ModelError
from hf_zoo.losses import compute_loss, cross_entropy, masked_lm_loss, nt_xent
from hf_zoo.recipe.schema import ObjectiveSpec


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(row):
    largest = max(row)
    total = largest + math.log(sum(math.exp(value - largest) for value in row))
    return [value - total for value in row]


def test_cross_entropy_of_hard_labels_is_the_sum_of_negative_log_probabilities():
    logits, labels = randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    output = cross_entropy(logits, labels)
    expected = -sum(log_softmax(row.tolist())[label] for row, label in zip(logits, labels, strict=True))
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-12)
    assert float(output.loss) == pytest.approx(expected / 5, rel=1e-12)
    assert int(output.weight) == 5
    hits = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    assert int(output.statistics["accuracy"]) == hits


def test_cross_entropy_of_soft_targets_weighs_every_class():
    logits, targets = randn(3, 4), randn(3, 4, seed=1).softmax(-1)
    expected = -sum(
        t * p
        for row, target in zip(logits, targets, strict=True)
        for t, p in zip(target.tolist(), log_softmax(row.tolist()), strict=True)
    )
    output = cross_entropy(logits, targets)
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-12)
    assert output.statistics == {}


def test_one_hot_targets_give_the_loss_of_hard_labels():
    logits, labels = randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    soft = cross_entropy(logits, torch.nn.functional.one_hot(labels, 3).double())
    torch.testing.assert_close(soft.loss, cross_entropy(logits, labels).loss)


def test_masked_lm_counts_masked_positions_alone():
    logits = randn(2, 3, 5)
    labels = torch.tensor([[-100, 4, -100], [0, -100, 2]])
    places = [(0, 1, 4), (1, 0, 0), (1, 2, 2)]
    expected = -sum(log_softmax(logits[b, i].tolist())[token] for b, i, token in places)
    output = masked_lm_loss(logits, labels)
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-12)
    assert int(output.weight) == 3
    assert int(output.statistics["accuracy"]) == sum(int(logits[b, i].argmax()) == token for b, i, token in places)


def test_masked_lm_without_a_masked_token_is_zero_and_still_has_a_gradient():
    logits = randn(1, 2, 3).requires_grad_()
    output = masked_lm_loss(logits, torch.full((1, 2), -100))
    output.loss.backward()
    assert not output.loss.detach()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logits, labels = randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    parts = [cross_entropy(logits[part], labels[part]) for part in (slice(0, 2), slice(2, 7))]
    whole = cross_entropy(logits, labels)
    mean = sum(part.loss_sum for part in parts) / sum(part.weight for part in parts)
    torch.testing.assert_close(mean, whole.loss)


def explicit_nt_xent(embeddings, temperature):
    """Spec 1.5, term by term."""
    z = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in embeddings.tolist()]
    count = len(z)
    losses, ranks = [], []
    for i in range(count):
        s = [sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature for j in range(count)]
        positive = (i + count // 2) % count
        others = [s[j] for j in range(count) if j != i]
        losses.append(-s[positive] + math.log(sum(math.exp(value) for value in others)))
        ranks.append(sum(value >= s[positive] for value in others))
    return sum(losses) / count, ranks


@pytest.mark.parametrize(("images", "temperature"), [(1, 0.5), (3, 0.5), (8, 0.07)])
def test_nt_xent_equals_its_definition(images, temperature):
    embeddings = randn(2 * images, 5)
    loss, ranks = nt_xent(embeddings, temperature)
    expected, expected_ranks = explicit_nt_xent(embeddings, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert ranks.tolist() == expected_ranks


def test_nt_xent_gradient_is_that_of_finite_differences():
    embeddings = randn(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.5)[0], embeddings)


def test_views_that_agree_rank_first_and_a_collapse_ranks_last():
    views = randn(4, 6)
    _, ranks = nt_xent(torch.cat([views, 3 * views]), 0.07)  # the cosine does not see the scale
    assert ranks.tolist() == [1] * 8
    _, ranks = nt_xent(torch.ones(8, 6), 0.07)
    assert ranks.tolist() == [7] * 8


def test_an_odd_number_of_embeddings_is_refused():
    with pytest.raises(ModelError, match="even number"):
        nt_xent(torch.ones(3, 2), 0.1)


def test_half_precision_logits_are_widened_before_the_softmax():
    logits = randn(4, 1000).to(torch.bfloat16)
    labels = torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(cross_entropy(logits, labels).loss, cross_entropy(logits.float(), labels).loss)
    assert cross_entropy(logits, labels).loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["image_classification", "sequence_classification"])
def test_compute_loss_dispatches_and_skips_statistics_on_request(name):
    logits, labels = randn(4, 3), torch.tensor([0, 1, 2, 0])
    output = compute_loss(ObjectiveSpec(name=name), logits, labels, statistics=False)
    torch.testing.assert_close(output.loss, cross_entropy(logits, labels).loss)
    assert output.statistics == {}


def test_contrastive_statistics_are_sums_over_anchors():
    embeddings = randn(6, 4)
    output = compute_loss(ObjectiveSpec(name="contrastive", temperature=0.3), embeddings)
    loss, ranks = nt_xent(embeddings, 0.3)
    torch.testing.assert_close(output.loss, loss)
    assert int(output.weight) == 6
    assert int(output.statistics["mean_rank"]) == ranks.sum()
    assert int(output.statistics["top1"]) == (ranks == 1).sum()
    assert int(output.statistics["top5"]) == (ranks <= 5).sum()


@pytest.mark.parametrize(
    ("name", "logits", "labels"),
    [
        ("image_classification", (4, 3), (5,)),
        ("masked_lm", (2, 3, 4), (2, 4)),
        ("sequence_classification", (4, 3, 2), (4,)),
    ],
)
def test_labels_that_do_not_fit_are_named(name, logits, labels):
    with pytest.raises(ModelError, match="do not fit"):
        compute_loss(ObjectiveSpec(name=name), torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_missing_labels_are_named():
    with pytest.raises(ModelError, match="needs labels"):
        compute_loss(ObjectiveSpec(name="masked_lm"), torch.zeros(1, 2, 3))
