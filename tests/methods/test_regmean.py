"""RegMean against least squares on the inputs themselves."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.regmean import RegMean, input_axes

# N = rows, I = inputs, O = outputs
NUM_INPUTS, NUM_OUTPUTS = 7, 5


def models(values, source="m"):
    return [CheckpointReader.of(tensors, f"{source}{i}") for i, tensors in enumerate(values)]


def merge(members, grams, **parameters):
    inputs = MergeInputs.of(models(members), gram=models(grams, "gram of m"))
    return dict(RegMean(**parameters).merge(inputs)), inputs.report


def merge_one(matrices, grams, **parameters):
    return merge([{"w": matrix} for matrix in matrices], [{"w": gram} for gram in grams], **parameters)[0]["w"]


def layers(num_members=3, num_rows=50, seed=0):
    """Draw each member's inputs, with correlations of its own, and its weight."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_members, NUM_INPUTS, NUM_INPUTS, generator=draw).double()
    x_KNI = torch.randn(num_members, num_rows, NUM_INPUTS, generator=draw).double() @ mixing
    weights_KOI = torch.randn(num_members, NUM_OUTPUTS, NUM_INPUTS, generator=draw).double()
    return x_KNI, weights_KOI, x_KNI.transpose(1, 2) @ x_KNI / num_rows


def close(actual, wanted):
    # the ridge of 1e-8, times how much the least certain direction is amplified
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_by_hand():
    # G = (diag(1, 3), diag(3, 1)): column by column (1 * 1 + 3 * 5) / 4 and (3 * 2 + 1 * 6) / 4
    weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]])]
    grams = [torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0]))]
    torch.testing.assert_close(merge_one(weights, grams), torch.tensor([[4.0, 3.0]]))
    # the second member counts three times
    merged = merge_one(weights, grams, weights=(1.0, 3.0))
    torch.testing.assert_close(merged, torch.tensor([[(1 + 9 * 5) / 10, (3 * 2 + 3 * 6) / 6]]))


def test_it_is_least_squares_on_the_members_answers():
    x_KNI, weights_KOI, grams_KII = layers()
    answers = torch.cat([x @ weight.T for x, weight in zip(x_KNI, weights_KOI, strict=True)])
    oracle = torch.linalg.lstsq(torch.cat(list(x_KNI)), answers).solution.T
    close(merge_one(weights_KOI, grams_KII, off_diagonal=1.0), oracle)


def test_off_diagonals_are_shrunk():
    _, weights_KOI, grams_KII = layers()
    diagonals_KII = torch.diag_embed(grams_KII.diagonal(dim1=1, dim2=2))
    for factor in (0.0, 0.9):
        shrunk_KII = factor * grams_KII + (1 - factor) * diagonals_KII
        oracle = (weights_KOI @ shrunk_KII).sum(0) @ torch.linalg.inv(shrunk_KII.sum(0))
        close(merge_one(weights_KOI, grams_KII, off_diagonal=factor), oracle)
    close(merge_one(weights_KOI, grams_KII), oracle)


def test_weights_stored_the_other_way_round_and_kernels():
    _, weights_KOI, grams_KII = layers()
    wanted = merge_one(weights_KOI, grams_KII)
    close(merge_one([weight.T.contiguous() for weight in weights_KOI], grams_KII), wanted.T)
    kernels = weights_KOI.reshape(3, NUM_OUTPUTS, 7, 1, 1)
    close(merge_one(kernels, grams_KII), wanted.reshape(NUM_OUTPUTS, 7, 1, 1))


def test_square_weights_lie_as_their_neighbours():
    def named(sizes):
        return CheckpointReader.of({name: torch.zeros(shape) for name, shape in sizes.items()}, "model")

    weights = named({
        "h.0.attn.c_attn.weight": (4, 12),
        "h.0.attn.c_proj.weight": (4, 4),
        "h.0.mlp.c_proj.weight": (16, 4),
        "encoder.query.weight": (4, 4),
        "encoder.dense.weight": (16, 4),
        "lm_head.weight": (99, 4),
    })
    sizes = [4, 4, 16, 4, 4, 4]
    grams = named({name: (size, size) for name, size in zip(weights, sizes, strict=True)})
    assert input_axes(weights, grams) == {
        "h.0.attn.c_attn.weight": 0,
        "h.0.attn.c_proj.weight": 0,
        "h.0.mlp.c_proj.weight": 0,
        "encoder.query.weight": 1,
        "encoder.dense.weight": 1,
        "lm_head.weight": 1,
    }
    alone = named({"a.weight": (4, 4)})
    assert input_axes(alone, alone) == {"a.weight": 1}


def test_equal_grams_give_the_mean_and_one_member_itself():
    _, weights_KOI, grams_KII = layers()
    close(merge_one(weights_KOI, grams_KII[:1].expand(3, -1, -1)), weights_KOI.mean(0))
    close(merge_one(weights_KOI[:1], grams_KII[:1]), weights_KOI[0])


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_inputs_nobody_uses_keep_the_mean(off_diagonal):
    _, weights_KOI, grams_KII = layers()
    grams_KII[:, 2] = 0
    grams_KII[:, :, 2] = 0
    merged = merge_one(weights_KOI, grams_KII, off_diagonal=off_diagonal)
    close(merged[:, 2], weights_KOI[:, :, 2].mean(0))
    others = [0, 1, 3, 4, 5, 6]
    close(
        merged[:, others],
        merge_one(weights_KOI[:, :, others], grams_KII[:, others][:, :, others], off_diagonal=off_diagonal),
    )


def test_fewer_rows_than_inputs_have_a_solution_near_the_mean():
    x_KNI, weights_KOI, grams_KII = layers(num_members=2, num_rows=2)
    merged = merge_one(weights_KOI, grams_KII, off_diagonal=1.0)
    # Both members' answers can be met at once: four rows, seven inputs.
    for x, weight in zip(x_KNI, weights_KOI, strict=True):
        torch.testing.assert_close(x @ merged.T, x @ weight.T, rtol=1e-4, atol=1e-4)
    # Inputs in units of their size: nothing moves away from the mean in directions no row has.
    lengths = grams_KII.sum(0).diagonal().sqrt()
    unseen = torch.linalg.svd(torch.cat(list(x_KNI)) / lengths)[2][4:]
    moved = (merged - weights_KOI.mean(0)) * lengths
    assert (moved @ unseen.T).norm() < 1e-4 * moved.norm()
    # As they are stored, in float32, they have eigenvalues below zero; there is a solution all the same.
    rounded = merge_one(weights_KOI, grams_KII.float(), off_diagonal=1.0)
    assert rounded.norm() < 2 * weights_KOI.mean(0).norm()


def test_everything_else_is_averaged_and_counted():
    _, weights_KOI, grams_KII = layers()
    members = [{"w": weight, "b": torch.full((2,), float(i))} for i, weight in enumerate(weights_KOI)]
    merged, report = merge(members, [{"w": gram} for gram in grams_KII], weights=(1.0, 1.0, 2.0))
    torch.testing.assert_close(merged["b"], torch.full((2,), 1.25))
    assert report["regression"] == {"solved": 1, "averaged": 1}


def test_grams_that_do_not_fit_are_refused():
    weight, gram = {"w": torch.ones(2, 3)}, {"w": torch.eye(3)}
    with pytest.raises(MergeError, match="needs the Gram matrices of every member: got 1 for 2 members"):
        merge([weight, weight], [gram])
    with pytest.raises(MergeError, match="gram of m1 lacks the Gram matrices of 'w'"):
        merge([weight, weight], [gram, {}])
    with pytest.raises(MergeError, match="gram of m0 lacks the Gram matrices of 'w'"):
        merge([weight, weight], [{}, {}])
    with pytest.raises(MergeError, match=r"'w' is \[4, 4\] and fits no side of a weight of \[2, 3\]"):
        merge([weight, weight], [gram, {"w": torch.eye(4)}])
    with pytest.raises(CheckpointError, match="gram of m1: tensor 'w' has a negative entry on its diagonal"):
        merge([weight, weight], [gram, {"w": -torch.eye(3)}])
    with pytest.raises(CheckpointError, match="gram of m1: tensor 'w' holds 9 NaN of 9"):
        merge([weight, weight], [gram, {"w": torch.full((3, 3), float("nan"))}])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"off_diagonal": 1.5}, r"off_diagonal must be in \[0, 1\], got 1.5"),
        ({"weights": [0.0, 0.0]}, "weights must be finite, none negative and their sum above 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        make_method("regmean", parameters)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(MergeError, match="regmean: weights needs one value a member: got 2 for 1 members"):
        merge_one([torch.ones(2, 3)], [torch.eye(3)], weights=(1.0, 1.0))
