"""PCB-merging against numbers worked out by hand and a dense float64 oracle."""

import math

import pytest
import torch
from vectors import around, draw, merge_all, merge_values

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.methods.base import make_method


def oracle(base, vectors, density, scale):
    """Write down the paper's formulas on whole vectors, (K, n), in float64."""
    vectors = vectors.double()
    count = len(vectors)

    def norm(values):
        return (values - values.min()) / (values.max() - values.min())

    kept = []
    for vector in vectors:
        inter = sum(norm(vector * other).softmax(0) for other in vectors)
        balance = (count * norm(vector * vector)).softmax(0) * inter
        least = balance.sort(descending=True).values[max(1, int(density * len(vector))) - 1]
        kept.append(torch.where(balance >= least, balance, 0))
    kept = torch.stack(kept)
    total = (kept * vectors * torch.tensor(scale, dtype=torch.float64)[:, None]).sum(0)
    return base.double() + torch.where(kept.sum(0) > 0, total / kept.sum(0), 0)


def test_two_tasks_by_hand():
    # Each task has one entry; products between them are all zero, so that their softmax is even.
    base, vectors = torch.zeros(2), torch.tensor([[2.0, 0.0], [0.0, -4.0]])
    # Of task 0: intra exp(2) : 1, inter (exp(1) : 1) / (1 + e) + 1/2 each. Everything kept, the first entry's mean is
    # 2 b_00 / (b_00 + b_10), where b_00 is task 0's balance there and b_10 that of task 1, which has nothing there.
    e = math.e
    large = e**2 / (1 + e**2) * (e / (1 + e) + 0.5)
    small = 1 / (1 + e**2) * (1 / (1 + e) + 0.5)
    part = large / (large + small)
    merged = merge_values("pcb", base, list(vectors), density=1.0)
    torch.testing.assert_close(merged, torch.tensor([2 * part, -4 * part]))
    # Half is kept: each task keeps its own entry.
    torch.testing.assert_close(merge_values("pcb", base, list(vectors), density=0.5), torch.tensor([2.0, -4.0]))
    merged = merge_values("pcb", base, list(vectors), density=0.5, scale=[0.5, 2.0])
    torch.testing.assert_close(merged, torch.tensor([1.0, -8.0]))


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_several_pieces_against_float64(density):
    base, vectors = draw(200_001), draw(3, 200_001, seed=1)
    scale = (1.0, 0.5, 1.5)
    merged = merge_values("pcb", base, around(base, vectors), density=density, scale=scale)
    wanted = oracle(base, vectors, density, scale)
    # An entry at a threshold may fall on either side of it by a rounding; everything else agrees.
    wrong = (merged.double() - wanted).abs() > 1e-4
    assert int(wrong.sum()) <= 12


def test_the_competition_is_over_the_whole_model():
    base, vectors = draw(60), draw(2, 60, seed=1)
    members = around(base, vectors)
    whole = merge_values("pcb", base, members)
    cut = merge_all("pcb", {"a": base[:10], "b": base[10:]}, [{"a": m[:10], "b": m[10:]} for m in members])
    torch.testing.assert_close(torch.cat([cut["a"], cut["b"]]), whole)


def test_a_single_member_keeps_its_largest():
    merged = merge_values("pcb", torch.zeros(4), [torch.tensor([1.0, -4.0, 3.0, 2.0])], density=0.5)
    torch.testing.assert_close(merged, torch.tensor([0.0, -4.0, 3.0, 0.0]))


def test_wrong_values_are_refused():
    with pytest.raises(RecipeError, match=r"pcb: density must lie in \(0, 1\]"):
        make_method("pcb", {"density": 1.2})
    with pytest.raises(MergeError, match="pcb: scale needs one value a member: got 2 for 1"):
        merge_values("pcb", [1.0], [[2.0]], scale=[1.0, 2.0])
