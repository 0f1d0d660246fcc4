"""Singular directions against LAPACK's own decomposition."""

import pytest
import torch

from hf_zoo.matrices import directions, matrix_shape, nearest_orthogonal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((5, 3), (5, 3)),
        ((5, 3, 2, 2), (5, 12)),
        ((5, 1, 2, 2), (5, 4)),
        ((1, 7, 3), (7, 3)),
        ((1, 1, 7), None),
        ((7,), None),
        ((), None),
        ((0, 7), None),
    ],
)
def test_which_tensors_are_matrices(shape, wanted):
    assert matrix_shape(shape) == wanted


@pytest.mark.parametrize("shape", [(9, 9), (20, 7), (7, 20), (1, 5)])
@pytest.mark.parametrize("factor", [1.0, 1e-200, 1e200])
def test_directions_are_singular_vectors(shape, factor):
    matrix = draw(*shape) * factor
    found = directions(matrix)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.values / factor, values / factor, rtol=1e-10, atol=0)
    torch.testing.assert_close((found.left * (found.values / factor)) @ found.right, matrix / factor)
    one = torch.eye(min(shape), dtype=torch.float64)
    # eps times the condition number squared, which is below 1e4
    torch.testing.assert_close(found.left.T @ found.left, one, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.right @ found.right.T, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 9), (20, 7), (7, 20)])
def test_directions_of_zero_are_left_out(shape):
    matrix = draw(shape[0], 3) @ draw(3, shape[1], seed=1)
    found = directions(matrix)
    assert (found.left.shape, found.right.shape) == ((shape[0], 3), (3, shape[1]))
    torch.testing.assert_close((found.left * found.values) @ found.right, matrix)
    nothing = directions(torch.zeros(shape, dtype=torch.float64))
    assert (nothing.left.shape, nothing.right.shape) == ((shape[0], 0), (0, shape[1]))
    assert nearest_orthogonal(nothing.left).shape == (shape[0], 0)
    assert nearest_orthogonal(nothing.right).shape == (0, shape[1])


def test_the_nearest_orthogonal_matrix_is_procrustes_solution():
    matrix = draw(9, 4)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(nearest_orthogonal(matrix), left @ right)
    # It keeps what is orthogonal already.
    torch.testing.assert_close(nearest_orthogonal(left), left)


def test_directions_far_apart_in_size():
    left, right = torch.linalg.qr(draw(8, 8))[0], torch.linalg.qr(draw(8, 8, seed=1))[0]
    values = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-8], dtype=torch.float64)
    found = directions(left @ torch.diag(values) @ right)
    assert len(found.values) == 6  # below 1e-6 counts as zero
    # eps * (1e5)^2 = 2e-6 in the last one
    torch.testing.assert_close(found.left @ found.right, left[:, :6] @ right[:6], rtol=0, atol=1e-5)
