"""WUDI-Merging against autograd, its closed form and cases worked out by hand."""

import functools

import pytest
import torch
from vectors import draw_normal as draw
from vectors import merge_vectors

from hf_zoo.errors import RecipeError
from hf_zoo.methods.base import make_method
from hf_zoo.methods.wudi import Wudi

merge = functools.partial(merge_vectors, Wudi)


def interference(merged, vectors):
    """The paper's loss."""
    return sum(((merged - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors)


def close(actual, wanted, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def test_the_first_step_by_hand():
    # Adam's first step is the learning rate against the gradient's sign. t = (3, 1), t_1 = (1, 0), t_2 = (2, 1):
    # the gradient is 2 ((t - t_1) t_1^T t_1 + (t - t_2) t_2^T t_2 / 5) = 2 ((2, 0) + (0.8, 0.4)).
    close(merge([[[1.0, 0.0]] * 2, [[2.0, 1.0]] * 2], num_iterations=1, learning_rate=0.1), [[2.9, 0.9]] * 2, 1e-7)


def test_adam_on_the_papers_loss_by_autograd():
    vectors = draw(3, 6, 8)
    parameter = vectors.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    for _ in range(25):
        optimizer.zero_grad()
        interference(parameter, vectors).backward()
        optimizer.step()
    wanted = parameter.detach()
    assert (wanted - vectors.sum(0)).abs().max() > 0.3
    close(merge(vectors, num_iterations=25, learning_rate=0.03), wanted, 1e-8)
    # float32: 25 steps of about 1e-7
    close(merge(vectors, num_iterations=25, learning_rate=0.03, dtype=torch.float32).double(), wanted, 1e-4)
    turned = merge(vectors.transpose(1, 2), num_iterations=25, learning_rate=0.03, inputs_first=True)
    close(turned, wanted.T, 1e-8)


def test_many_steps_reach_the_minimum():
    vectors = draw(3, 10, 6)
    grams = torch.stack([vector.T @ vector / vector.square().sum() for vector in vectors])
    minimiser = (vectors @ grams).sum(0) @ torch.linalg.inv(grams.sum(0))
    merged = merge(vectors, num_iterations=3000, learning_rate=0.01)
    close(merged, minimiser, 5e-3)  # Adam at a fixed rate stays within about a step of it
    assert interference(minimiser, vectors) <= interference(merged, vectors) < interference(vectors.sum(0), vectors)


def test_tasks_on_different_inputs_are_added():
    first, second = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    first[:, 0], second[:, 1:] = draw(2), draw(2, 2, seed=1)
    # rounding of a gradient of zero, over Adam's 1e-8
    close(merge([first, second], learning_rate=0.1), first + second, 1e-6)


def test_one_task_alone_is_its_model_and_tasks_without_a_vector_do_not_matter():
    vectors = draw(2, 5, 4)
    close(merge(vectors[:1], learning_rate=0.1), vectors[0], 1e-6)
    options = {"learning_rate": 0.01, "num_iterations": 50}
    close(merge([*vectors, torch.zeros(5, 4)], **options), merge(vectors, **options))
    close(merge(torch.zeros(2, 5, 4)), torch.zeros(5, 4))


def test_kernels_are_matrices_and_vectors_are_averaged():
    vectors, options = draw(2, 6, 3, 2, 2), {"learning_rate": 0.01, "num_iterations": 20}
    flat = merge(vectors.reshape(2, 6, 12), base=torch.zeros(6, 12).double(), **options)
    close(merge(vectors, **options), flat.reshape(6, 3, 2, 2), 1e-8)
    close(merge(draw(3, 7), scale=2.0), 2 * draw(3, 7).mean(0))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_iterations": -1}, "num_iterations must be 0 or more, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        make_method("wudi", parameters)
