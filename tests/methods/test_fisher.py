"""The Fisher-weighted mean against numbers worked out by hand and a dense float64 oracle."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError, RecipeError
from hf_zoo.inputs import PIECE_ENTRIES, MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.fisher import Fisher
from hf_zoo.shards import TensorInfo


def models(values, source="m"):
    return [CheckpointReader.of(tensors, f"{source}{i}") for i, tensors in enumerate(values)]


def merge(members, fishers, **parameters):
    inputs = MergeInputs.of(models(members), fisher=models(fishers, "fisher of m"), compute_dtype=torch.float64)
    return dict(Fisher(**parameters).merge(inputs)), inputs.report


def merge_entries(values, fishers, **parameters):
    def as_models(rows):
        return [{"w": torch.tensor(row, dtype=torch.float64)} for row in rows]

    return merge(as_models(values), as_models(fishers), **parameters)[0]["w"]


def close(actual, wanted):
    # a few float64 operations an entry
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_by_hand():
    # (3 * 1 + 1 * 5) / 4 = 2; (1 * 2 + 3 * 6) / 4 = 5
    close(merge_entries([[1.0, 2.0], [5.0, 6.0]], [[3.0, 1.0], [1.0, 3.0]]), [2.0, 5.0])
    # lambda = (1, 3): (3 * 1 + 3 * 5) / 6 = 3; (1 * 2 + 9 * 6) / 10 = 5.6
    close(merge_entries([[1.0, 2.0], [5.0, 6.0]], [[3.0, 1.0], [1.0, 3.0]], weights=(1.0, 3.0)), [3.0, 5.6])


def test_the_floor_is_the_least_fisher():
    # Floored to 1: (1 * 1 + 4 * 6) / 5 = 5. Both below the floor: the plain mean.
    close(merge_entries([[1.0, 1.0], [6.0, 5.0]], [[0.0, 0.2], [4.0, 0.1]], floor=1.0), [5.0, 3.0])


def test_favouring_the_target_floors_only_the_first_member():
    # No other member knows anything of the first entry: the first member's value is kept. The second: (1 + 4 * 6) / 5.
    close(merge_entries([[1.0, 1.0], [6.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]], floor=1.0, favour_target=True), [1.0, 5.0])


def test_entries_nobody_knows_get_the_mean_by_weight_and_not_nan():
    close(merge_entries([[2.0], [6.0]], [[0.0], [0.0]], floor=0.0), [4.0])
    close(merge_entries([[2.0], [6.0]], [[0.0], [0.0]], floor=0.0, weights=(3.0, 1.0)), [3.0])


def test_equal_fishers_give_the_mean_and_a_huge_one_its_member():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 50, generator=draw, dtype=torch.float64).tolist()
    close(merge_entries(values, [[0.3] * 50] * 3), torch.tensor(values, dtype=torch.float64).mean(0))
    merged = merge_entries(values, [[1e-3] * 50, [1e12] * 50, [1e-3] * 50])
    torch.testing.assert_close(merged, torch.tensor(values[1], dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_common_factor_changes_nothing_without_a_floor():
    draw = torch.Generator().manual_seed(0)
    values, fishers = (torch.rand(2, 3, 50, generator=draw, dtype=torch.float64)).unbind(0)
    once = merge_entries(values.tolist(), fishers.tolist(), floor=0.0)
    close(merge_entries(values.tolist(), (fishers * 1e-9).tolist(), floor=0.0), once)


def test_normalizing_divides_by_the_norm_over_the_whole_model():
    # Norms over both tensors: 5 and 10. The first entry: (3/5 * 1 + 6/10 * 5) / (3/5 + 6/10) = 3.
    members = [
        {"a": torch.tensor([1.0]), "b": torch.tensor([[2.0]])},
        {"a": torch.tensor([5.0]), "b": torch.ones(1, 1)},
    ]
    fishers = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])},
        {"a": torch.tensor([6.0]), "b": torch.full((1, 1), 8.0)},
    ]
    merged, report = merge(members, fishers, normalize=True)
    assert merged["a"].item() == pytest.approx(3.0, rel=1e-6)
    assert merged["b"].item() == pytest.approx(1.5, rel=1e-6)
    assert report["fisher_norms"] == pytest.approx({"m0": 5.0, "m1": 10.0})


def test_norms_are_of_the_whole_model_and_taken_once():
    reads = []

    def read(name):
        reads.append(name)
        return torch.full((2,), 3.0 if name == "a" else 4.0)

    layout = {name: TensorInfo((2,), torch.float32) for name in "ab"}
    fisher = CheckpointReader("m0", layout, read, {})
    inputs = MergeInputs.of(models([{"a": torch.ones(2), "b": torch.ones(2)}]), fisher=(fisher,))
    for name in "ab":  # as where hyper-parameters differ from tensor to tensor
        Fisher(normalize=True).overview(inputs.only([name]))
        assert inputs.report["fisher_norms"]["m0"] == pytest.approx(50**0.5)
    assert reads == ["a", "b"]


@pytest.mark.parametrize("normalize", [False, True])
def test_several_pieces_against_a_dense_float64_oracle(normalize):
    draw = torch.Generator().manual_seed(0)
    shape = (3, PIECE_ENTRIES // 100 + 7, 100)
    values, fishers = torch.randn(shape, generator=draw), torch.rand(shape, generator=draw) * 1e-5
    weights = (0.5, 2.0, 1.0)
    factors = torch.tensor(weights, dtype=torch.float64)
    if normalize:
        factors = factors / fishers.double().flatten(1).norm(dim=1)
    precision = factors[:, None, None] * fishers.double().clamp(min=1e-6)
    oracle = (precision * values.double()).sum(0) / precision.sum(0)
    members = [{"w": value} for value in values]
    merged, _ = merge(members, [{"w": fisher} for fisher in fishers], weights=weights, normalize=normalize)
    # computed in float64, written in float32: half a unit in the last place
    torch.testing.assert_close(merged["w"].double(), oracle, rtol=1e-7, atol=1e-7)


def test_buffers_have_no_fisher_and_get_the_mean():
    members = [{"w": torch.tensor([v]), "running_var": torch.tensor([v])} for v in (1.0, 5.0)]
    fishers = [{"w": torch.tensor([f])} for f in (3.0, 1.0)]
    merged, _ = merge(members, fishers, weights=(1.0, 3.0))
    assert merged["running_var"].item() == pytest.approx(4.0)
    assert merged["w"].item() == pytest.approx(3.0)


def test_fishers_that_do_not_fit_are_refused():
    one = {"w": torch.ones(2), "v": torch.ones(1)}
    with pytest.raises(MergeError, match="needs the Fisher of every member: got 1 for 2 members"):
        merge([one, one], [one])
    with pytest.raises(MergeError, match="fisher of m1 lacks the Fisher of 'v', which others have"):
        merge([one, one], [one, {"w": torch.ones(2)}])
    with pytest.raises(MergeError, match=r"the Fisher of 'w' is \[3\], the tensor \[2\]: it belongs to another model"):
        merge([one, one], [one, {"w": torch.ones(3), "v": torch.ones(1)}])
    with pytest.raises(MergeError, match="fisher of m0 has the Fisher of none of 'w', 'v'"):
        merge([one, one], [{"x": torch.ones(2)}] * 2)
    with pytest.raises(CheckpointError, match="fisher of m1: tensor 'w' holds -2: a diagonal Fisher is"):
        merge([one, one], [one, {"w": torch.tensor([1.0, -2.0]), "v": torch.ones(1)}])
    with pytest.raises(CheckpointError, match="fisher of m1: tensor 'w' .*1 NaN of 2"):
        merge([one, one], [one, {"w": torch.tensor([1.0, float("nan")]), "v": torch.ones(1)}])
    with pytest.raises(MergeError, match="the Fisher of fisher of m1 is zero everywhere and has no norm"):
        merge([one, one], [one, {"w": torch.zeros(2), "v": torch.zeros(1)}], normalize=True)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weights": [1.0, -1.0]}, "weights must be finite, none negative and their sum above 0"),
        ({"weights": [0.0]}, "weights must be finite"),
        ({"floor": -1e-6}, "floor must be 0 or more and finite, got -1e-06"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        make_method("fisher", parameters)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(MergeError, match="fisher: weights needs one value a member: got 3 for 2 members"):
        merge_entries([[1.0], [2.0]], [[1.0], [1.0]], weights=(1.0, 1.0, 1.0))
