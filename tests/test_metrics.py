"""The metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hf_zoo.errors import DataError
from hf_zoo.metrics import (
    accuracy,
    count_confusions,
    load_metric,
    macro_f1,
    masked_accuracy,
    matthews_correlation,
    metric_names,
    retrieval,
    top_k_accuracy,
)


@pytest.fixture(params=[2, 3, 12], ids="{} classes".format)
def answers(request):
    generator = np.random.default_rng(request.param)
    references = generator.integers(request.param, size=60)
    guesses = generator.integers(request.param, size=60)
    return np.where(generator.random(60) < 0.6, references, guesses), references


def test_confusions_are_those_of_scikit_learn(answers):
    predictions, references = answers
    labels = range(12)
    expected = sklearn_metrics.confusion_matrix(references, predictions, labels=labels)
    np.testing.assert_array_equal(count_confusions(predictions, references, 12), expected)


def test_accuracy_f1_and_matthews_equal_scikit_learn(answers):
    predictions, references = answers
    confusions = count_confusions(predictions, references, 12)  # classes nobody names must change nothing
    assert accuracy(confusions) == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
    assert macro_f1(confusions) == pytest.approx(sklearn_metrics.f1_score(references, predictions, average="macro"))
    expected = sklearn_metrics.matthews_corrcoef(references, predictions)
    assert matthews_correlation(confusions) == pytest.approx(expected)


def test_matthews_is_zero_for_a_constant_answer():
    confusions = count_confusions(np.zeros(6, int), np.array([0, 1, 0, 1, 1, 1]), 2)
    assert matthews_correlation(confusions) == 0


def test_top_k_equals_scikit_learn_without_ties_and_counts_ties_as_misses():
    generator = np.random.default_rng(0)
    scores, references = generator.normal(size=(50, 8)), generator.integers(8, size=50)
    for k in (1, 3, 5):
        expected = sklearn_metrics.top_k_accuracy_score(references, scores, k=k, labels=range(8))
        assert top_k_accuracy(scores, references, k) == pytest.approx(expected)
    assert top_k_accuracy(np.zeros((4, 8)), np.arange(4), 5) == 0


def test_masked_accuracy_leaves_unmasked_positions_out():
    references = np.array([-100, 3, -100, 5, 7, 7])
    predictions = np.array([9, 3, 1, 5, 7, 0])
    assert masked_accuracy(predictions, references) == pytest.approx(0.75)
    with pytest.raises(DataError, match="other than -100"):
        masked_accuracy(predictions, np.full(6, -100))


def test_retrieval_of_known_ranks():
    assert retrieval(np.array([1, 1, 5, 9])) == {"top1": 0.5, "top5": 0.75, "mean_rank": 4.0}


def test_every_metric_is_an_evaluate_metric_that_gathers_batches(answers):
    import evaluate

    predictions, references = answers
    for name, expected in (
        ("accuracy", sklearn_metrics.accuracy_score(references, predictions)),
        ("f1", sklearn_metrics.f1_score(references, predictions, average="macro")),
        ("matthews_correlation", sklearn_metrics.matthews_corrcoef(references, predictions)),
    ):
        metric = load_metric(name)
        assert isinstance(metric, evaluate.Metric)
        for part in (slice(0, 25), slice(25, 60)):
            metric.add_batch(predictions=predictions[part], references=references[part])
        assert metric.compute() == {name: pytest.approx(expected)}
    assert {load_metric(name).name for name in metric_names()} == set(metric_names())


def test_metrics_of_sequences_read_sequences():
    result = load_metric("masked_accuracy").compute(predictions=[[1, 2], [3]], references=[[-100, 2], [4]])
    assert result == {"masked_accuracy": 0.5}
    scores = [[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]
    assert load_metric("top_k_accuracy").compute(predictions=scores, references=[2, 2], k=2) == {"top_k_accuracy": 0.5}
    assert load_metric("retrieval").compute(predictions=[1, 7])["mean_rank"] == 4


def test_an_unknown_metric_names_what_there_is(monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    with pytest.raises(DataError, match=r"did you mean 'accuracy'.*matthews_correlation"):
        load_metric("acuracy")
