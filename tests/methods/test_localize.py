"""Localize-and-Stitch without data: by hand, against a dense oracle, at its limits."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method


def inputs_of(base, *vectors):
    """Return inputs with one tensor a key; members are the base plus task vectors."""
    members = [{name: base[name] + vector[name] for name in base} for vector in vectors]
    readers = [CheckpointReader.of(tensors, f"member-{i}") for i, tensors in enumerate(members)]
    return MergeInputs.of(readers, base=CheckpointReader.of(base, "base"))


def run(inputs, **parameters):
    return dict(make_method("localize", parameters).merge(inputs))


def test_by_hand():
    # 6 entries, half of them kept: the three largest of each; the first entry lies in both regions.
    base = {"a": torch.tensor([1.0, 1.0, 1.0, 1.0]), "b": torch.tensor([0.0, 0.0])}
    first = {"a": torch.tensor([4.0, -3.0, 1.0, 0.5]), "b": torch.tensor([2.0, 0.25])}
    second = {"a": torch.tensor([2.0, 0.5, -6.0, 0.25]), "b": torch.tensor([1.0, 8.0])}
    merged = run(inputs_of(base, first, second), density=0.5)
    torch.testing.assert_close(merged["a"], torch.tensor([1 + 3.0, 1 - 3.0, 1 - 6.0, 1.0]))
    torch.testing.assert_close(merged["b"], torch.tensor([2.0, 8.0]))


@pytest.mark.parametrize("density", [0.05, (0.5, 0.01, 0.2)])
def test_against_a_dense_oracle(density):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 30), "b": (7,), "c": (300, 500)}  # c is cut into several pieces
    base, *vectors = [{n: torch.randn(s, generator=draw) for n, s in shapes.items()} for _ in range(4)]
    inputs = inputs_of(base, *vectors)
    flat = torch.stack([
        torch.cat([(member[n] - base[n]).double().flatten() for n in shapes]) for member in inputs.members
    ])
    count = flat.shape[1]
    densities = density if isinstance(density, tuple) else (density,) * 3
    masks = torch.zeros_like(flat)
    for mask, vector, share in zip(masks, flat, densities, strict=True):
        mask[vector.abs().topk(int(share * count)).indices] = 1
    stitched = (masks * flat).sum(0) / masks.sum(0).clamp(min=1)
    merged = run(inputs, density=density, scale=0.5)
    wanted = torch.cat([base[n].double().flatten() for n in shapes]) + 0.5 * stitched
    found = torch.cat([merged[n].double().flatten() for n in shapes])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_all_entries_of_one_member_are_that_member():
    draw = torch.Generator().manual_seed(1)
    base, vector = ({"a": torch.randn(9, generator=draw)} for _ in range(2))
    inputs = inputs_of(base, vector)
    torch.testing.assert_close(run(inputs, density=1.0)["a"], inputs.members[0]["a"])


def test_entries_that_were_never_trained_are_in_no_region():
    base = {"a": torch.zeros(4)}
    merged = run(
        inputs_of(base, {"a": torch.tensor([2.0, 0, 0, 0])}, {"a": torch.tensor([0, 4.0, 0, 0])}), density=1.0
    )
    assert merged["a"].tolist() == [2.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"density": 1.5}, {"scale": float("inf")}])
def test_hyper_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        make_method("localize", wrong)


def test_one_density_a_member():
    inputs = inputs_of({"a": torch.zeros(2)}, {"a": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(MergeError, match="localize: density needs one value a member: got 3 for 2"):
        make_method("localize", {"density": [0.1, 0.1, 0.1]}).check(inputs)
