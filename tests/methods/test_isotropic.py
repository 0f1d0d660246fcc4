"""Isotropic merging against cases worked out by hand and the paper's algorithms in dense float64."""

import functools

import pytest
import torch
from vectors import draw_normal as draw
from vectors import merge_vectors

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method
from hf_zoo.methods.isotropic import Isotropic

merge = functools.partial(merge_vectors, Isotropic)


def close(actual, wanted, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def whitened(columns):
    """X (X^T X)^(-1/2)."""
    squares, basis = torch.linalg.eigh(columns.T @ columns)
    return columns @ basis @ torch.diag(squares.rsqrt()) @ basis.T


def test_by_hand():
    # The sum is diag(5, -1): both directions get (5 + 1) / 2.
    vectors = [[[3.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, -2.0]]]
    close(merge(vectors), [[3.0, 0.0], [0.0, -3.0]])
    close(merge(vectors, scale=-0.5), [[-1.5, 0.0], [0.0, 1.5]])


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9)])
def test_iso_c_in_dense_float64(shape):
    vectors = draw(3, *shape)
    left, values, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    wanted = left @ torch.diag(torch.full_like(values, float(values.mean()))) @ right
    close(merge(vectors), wanted)
    # in float32 the task vectors themselves are rounded, and the smallest directions are amplified
    close(merge(vectors, dtype=torch.float32).double(), wanted, 1e-3)
    merged_values = torch.linalg.svdvals(merge(vectors))
    close(merged_values, torch.full_like(values, float(values.mean())))


@pytest.mark.parametrize(("shape", "common", "of_task"), [((20, 20), 17, 1), ((20, 31), 17, 1), ((40, 30), 24, 2)])
def test_iso_cts_in_dense_float64(shape, common, of_task):
    # 20 * 0.8 = 16, and round(4 / 3) = 1 a task leaves 17; 30 * 0.8 = 24, and 6 / 3 = 2 a task leave 24
    vectors = draw(3, *shape)
    left, values, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    lefts, all_values, rights = [left[:, :common]], [values[:common]], [right[:common]]
    outside = torch.eye(shape[0]).double() - lefts[0] @ lefts[0].T
    for vector in vectors:
        task_left, task_values, task_right = torch.linalg.svd(outside @ vector, full_matrices=False)
        lefts.append(task_left[:, :of_task])
        all_values.append(task_values[:of_task])
        rights.append(task_right[:of_task])
    wanted = torch.cat(all_values).mean() * whitened(torch.cat(lefts, 1)) @ whitened(torch.cat(rights).T).T
    close(merge(vectors, subspaces="common_and_task"), wanted)


def test_iso_cts_with_everything_common_is_iso_c():
    vectors = draw(3, 10, 12)
    close(merge(vectors, subspaces="common_and_task", common_share=1.0), merge(vectors))


def test_iso_cts_with_nothing_common_has_every_tasks_first_directions():
    vectors = draw(3, 9, 9)
    lefts, values, rights = torch.linalg.svd(vectors)
    wanted = whitened(torch.cat(list(lefts[:, :, :3]), 1)) @ whitened(torch.cat(list(rights[:, :3])).T).T
    close(merge(vectors, subspaces="common_and_task", common_share=0.0), wanted * values[:, :3].mean())


def test_directions_without_a_task_vector_stay_without():
    # A row nobody changed, as an embedding nobody used, stays that of the base.
    vectors = draw(2, 6, 5)
    vectors[:, 3] = 0
    close(merge(vectors)[3], torch.zeros(5))
    rank_one = [torch.outer(draw(6), draw(5, seed=1))] * 2
    close(merge(rank_one), 2 * rank_one[0])
    for subspaces in ("common", "common_and_task"):
        close(merge(torch.zeros(3, 6, 5), subspaces=subspaces), torch.zeros(6, 5))


def test_kernels_are_matrices_of_outputs_by_everything_else():
    vectors = draw(2, 6, 3, 2, 2)
    close(merge(vectors), merge(vectors.reshape(2, 6, 12), base=torch.zeros(6, 12).double()).reshape(6, 3, 2, 2))


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (1, 7)])
def test_vectors_are_averaged(shape):
    vectors = draw(3, *shape)
    close(merge(vectors, scale=2.0), 2 * vectors.mean(0))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"common_share": 1.5}, r"common_share must be in \[0, 1\], got 1.5"),
        ({"subspaces": "task"}, "expected one of common, common_and_task"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        make_method("isotropic", parameters)
