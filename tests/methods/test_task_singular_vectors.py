"""TSV-Merge against cases worked out by hand and the paper's algorithm in dense float64."""

import functools

import pytest
import torch
from vectors import draw_normal as draw
from vectors import merge_vectors

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method
from hf_zoo.methods.task_singular_vectors import TaskSingularVectors

merge = functools.partial(merge_vectors, TaskSingularVectors)


def close(actual, wanted, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def test_tasks_in_orthogonal_directions_are_added_by_hand():
    # Each of two tasks keeps one of its two directions: 3 of diag(3, 1) and 5 of diag(2, 5). They do not overlap.
    close(merge([[[3.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 5.0]]]), [[3.0, 0.0], [0.0, 5.0]])
    close(merge([[[3.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 5.0]]], scale=0.5), [[1.5, 0.0], [0.0, 2.5]])


def test_tasks_that_overlap_are_turned_apart_by_hand():
    # Left vectors (1, 0) and (cos, sin) 60 degrees apart: the nearest orthogonal pair lies 15 degrees outside both.
    angle = torch.tensor(torch.pi / 3, dtype=torch.float64)
    first, second = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    first[:, 0] = 2 * torch.tensor([1.0, 0.0])
    second[:, 1] = 3 * torch.stack([angle.cos(), angle.sin()])
    low, high = torch.tensor([-torch.pi / 12, 5 * torch.pi / 12], dtype=torch.float64)
    wanted = torch.stack([2 * torch.stack([low.cos(), low.sin()]), 3 * torch.stack([high.cos(), high.sin()])], 1)
    close(merge([first, second]), wanted)


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9)])
def test_the_papers_algorithm_in_dense_float64(shape):
    vectors = draw(3, *shape)
    kept = min(shape) // 3
    lefts, values, rights = torch.linalg.svd(vectors, full_matrices=False)
    left = torch.cat(list(lefts[:, :, :kept]), 1)
    right = torch.cat(list(rights[:, :kept]))

    def whitened(columns):  # X (X^T X)^(-1/2)
        squares, basis = torch.linalg.eigh(columns.T @ columns)
        return columns @ basis @ torch.diag(squares.rsqrt()) @ basis.T

    wanted = whitened(left) @ torch.diag(values[:, :kept].reshape(-1)) @ whitened(right.T).T
    close(merge(vectors), wanted)
    # in float32 the task vectors themselves are rounded
    close(merge(vectors, dtype=torch.float32).double(), wanted, 2e-5)


def test_kernels_are_matrices_of_outputs_by_everything_else():
    vectors = draw(2, 6, 3, 2, 2)
    close(merge(vectors), merge(vectors.reshape(2, 6, 12), base=torch.zeros(6, 12).double()).reshape(6, 3, 2, 2))


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (1, 7)])
def test_vectors_are_averaged(shape):
    vectors = draw(3, *shape)
    close(merge(vectors, scale=2.0), 2 * vectors.mean(0))


def test_one_task_alone_is_its_model():
    vectors = draw(1, 8, 5)
    close(merge(vectors), vectors[0])


def test_a_share_by_hand():
    diagonal = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])).double()
    close(merge([diagonal], share=0.6), torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0])))
    close(merge([diagonal], share=0.1), torch.diag(torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0])))


def test_tasks_without_a_vector_do_not_matter_but_for_their_number():
    vectors = draw(2, 9, 9)
    with_none = torch.cat([vectors, torch.zeros(1, 9, 9).double()])
    close(merge(with_none), merge(vectors, share=1 / 3))
    close(merge(torch.zeros(3, 4, 4)), torch.zeros(4, 4))


def test_equal_tasks_share_what_they_keep():
    # Twice the same directions: the nearest orthogonal pair does not exist among them; each gets half.
    vector = draw(8, 8)
    left, values, right = torch.linalg.svd(vector)
    close(merge([vector, vector]), left[:, :4] @ torch.diag(values[:4]) @ right[:4])


def test_more_tasks_than_singular_vectors_keep_one_each():
    merged = merge(draw(5, 2, 6))
    assert torch.linalg.matrix_rank(merged) == 2


@pytest.mark.parametrize("parameters", [{"share": 0.0}, {"share": 1.5}])
def test_a_share_out_of_range_is_refused(parameters):
    with pytest.raises(RecipeError, match=r"share must be in \(0, 1\], got"):
        make_method("task_singular_vectors", parameters)
