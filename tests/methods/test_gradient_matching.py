"""Gradient matching on quadratics, where it must be the joint minimiser, and in all its limits."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, MergeError, RecipeError
from hf_zoo.inputs import PIECE_ENTRIES, MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.gradient_matching import GradientMatching

# D = entries, T = tasks
NUM_ENTRIES = 300


def reader(tensor, source):
    return CheckpointReader.of({"w": torch.as_tensor(tensor, dtype=torch.float64)}, source)


def merge(
    base_D, members_TD, fishers_TD, base_fisher_D=None, examples=1.0, base_examples=1.0, inputs=None, **parameters
):
    """Merge one-tensor models in float64; sizes are 1 unless given, so that Fishers are curvatures."""
    inputs = inputs or {}
    inputs = MergeInputs.of(
        [reader(member, f"m{i}") for i, member in enumerate(members_TD)],
        base=reader(base_D, "base"),
        fisher=[reader(fisher, f"m{i}") for i, fisher in enumerate(fishers_TD)],
        base_fisher=None if base_fisher_D is None else reader(base_fisher_D, "base"),
        compute_dtype=torch.float64,
        **inputs,
    )
    method = GradientMatching(examples=examples, base_examples=base_examples, **parameters)
    return dict(method.merge(inputs))["w"], inputs.report


def quadratics(num_tasks=3, seed=0):
    """Draw tasks 0.5 H_t (theta - c_t)^2, a base, and the members: minimisers of a task and the pull to the base."""
    draw = torch.Generator().manual_seed(seed)
    size = (num_tasks, NUM_ENTRIES)
    base_D, centers_TD = torch.randn(NUM_ENTRIES, generator=draw).double(), torch.randn(size, generator=draw).double()
    base_curvature_D = torch.rand(NUM_ENTRIES, generator=draw).double() + 0.1
    curvatures_TD = torch.rand(size, generator=draw).double() * 5
    members_TD = (curvatures_TD * centers_TD + base_curvature_D * base_D) / (curvatures_TD + base_curvature_D)
    return base_D, base_curvature_D, centers_TD, curvatures_TD, members_TD


def joint_minimiser(base_D, base_curvature_D, centers_TD, curvatures_TD, scales_T):
    scales_T1 = torch.tensor(scales_T, dtype=torch.float64)[:, None]
    pull = base_curvature_D * base_D + (scales_T1 * curvatures_TD * centers_TD).sum(0)
    return pull / (base_curvature_D + (scales_T1 * curvatures_TD).sum(0))


def close(actual, wanted, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_by_hand():
    # H_0 = 1, H = (1, 3): weights (1 + 1) / 5 and (1 + 3) / 5 of the task vectors 5 and 10
    close(merge([1.0], [[6.0], [11.0]], [[1.0], [3.0]], [1.0], ridge=0.0)[0], [1 + 2 / 5 * 5 + 4 / 5 * 10])
    # alpha = (0.5, 2): H = 1 + 0.5 + 6 = 7.5
    merged, _ = merge([1.0], [[6.0], [11.0]], [[1.0], [3.0]], [1.0], ridge=0.0, scale=(0.5, 2.0))
    close(merged, [1 + 0.5 * 2 / 7.5 * 5 + 2 * 4 / 7.5 * 10])


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0), (0.0, 0.3, 1.0)])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_it_is_the_joint_minimiser_of_quadratics(scales, ridge):
    base, base_curvature, centers, curvatures, members = quadratics()
    # Fishers are means over examples: the sizes bring the curvature back.
    sizes, base_size = (10.0, 200.0, 35.0), 50.0
    merged, _ = merge(
        base,
        members,
        curvatures / torch.tensor(sizes)[:, None],
        (base_curvature - ridge) / base_size,
        examples=sizes,
        base_examples=base_size,
        ridge=ridge,
        relative_ridge=False,
        scale=scales,
    )
    oracle = joint_minimiser(base, base_curvature, centers, curvatures, scales)
    close(merged, oracle)
    task_arithmetic = base + (torch.tensor(scales).double()[:, None] * (members - base)).sum(0)
    assert (task_arithmetic - oracle).abs().max() > 0.1


def test_the_default_ridge_changes_nothing_that_can_be_seen():
    base, base_curvature, centers, curvatures, members = quadratics()
    merged, _ = merge(base, members, curvatures, base_curvature)
    close(merged, joint_minimiser(base, base_curvature, centers, curvatures, (1.0, 1.0, 1.0)))


def test_without_task_curvature_it_is_task_arithmetic():
    base, base_curvature, _, curvatures, members = quadratics()
    scales = (1.0, 0.5, 2.0)
    wanted = base + (torch.tensor(scales).double()[:, None] * (members - base)).sum(0)
    close(merge(base, members, curvatures * 0, base_curvature, scale=scales)[0], wanted)
    # H_0 -> infinity, through the size of its training set
    close(merge(base, members, curvatures, base_curvature, base_examples=1e13, scale=scales)[0], wanted)


def test_without_base_curvature_it_is_the_fisher_average():
    base, base_curvature, _, curvatures, members = quadratics()
    scales = torch.tensor([1.0, 0.5, 2.0]).double()[:, None]
    wanted = (scales * curvatures * members).sum(0) / (scales * curvatures).sum(0)
    close(merge(base, members, curvatures, base_curvature * 0, ridge=0.0, scale=(1.0, 0.5, 2.0))[0], wanted)
    close(merge(base, members, curvatures, base_curvature, base_examples=0, scale=(1.0, 0.5, 2.0))[0], wanted)


def test_equal_curvatures_and_no_base_curvature_give_the_mean_by_scale():
    base, _, _, curvatures, members = quadratics()
    equal = curvatures[:1].expand(3, -1) + 0.1
    merged, _ = merge(base, members, equal, base * 0, ridge=0.0, scale=(1.0, 0.5, 2.0))
    close(merged, (members * torch.tensor([1.0, 0.5, 2.0]).double()[:, None]).sum(0) / 3.5)


@pytest.mark.parametrize("base_known", [True, False])
def test_one_task_alone_is_its_model(base_known):
    base, base_curvature, _, curvatures, members = quadratics(num_tasks=1)
    merged, _ = merge(base, members, curvatures, base_curvature if base_known else None, examples=7.0)
    close(merged, members[0], 1e-14)


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_a_common_factor_of_all_curvatures_changes_nothing(factor):
    base, base_curvature, _, curvatures, members = quadratics()
    for options in ({}, {"scale": (1.0, -0.3, 0.7)}):
        once, _ = merge(base, members, curvatures, base_curvature, **options)
        close(merge(base, members, curvatures * factor, base_curvature * factor, **options)[0], once, 1e-12)
    # an absolute ridge is a curvature too
    once, _ = merge(base, members, curvatures, base_curvature, ridge=0.3, relative_ridge=False)
    scaled, _ = merge(
        base, members, curvatures * factor, base_curvature * factor, ridge=0.3 * factor, relative_ridge=False
    )
    close(scaled, once, 1e-12)


@pytest.mark.parametrize("options", [{}, {"ridge": 0.0}, {"ridge": 1e-12, "relative_ridge": False}])
def test_entries_without_any_curvature_get_task_arithmetic_and_not_nan(options):
    # The first entry is an embedding nobody used: 0 / 0 without a guard.
    merged, _ = merge([1.0, 1.0], [[2.0, 6.0], [4.0, 11.0]], [[0.0, 1.0], [0.0, 3.0]], [0.0, 1.0], **options)
    close(merged, [1 + 1 + 3, 1 + 2 / 5 * 5 + 4 / 5 * 10])
    merged, _ = merge([1.0], [[2.0], [4.0]], [[0.0], [0.0]], [0.0], scale=(1.0, -1.0), **options)
    close(merged, [1 + 1 - 3])


def test_removing_a_task_gives_the_model_that_never_saw_it():
    # The base is the minimiser of 0.5 rest (theta - c)^2 + 0.5 H (theta - d)^2; the member is the base trained on the
    # second term again. Without that term the minimiser is c.
    draw = torch.Generator().manual_seed(1)
    rest, curvature = (torch.rand(2, NUM_ENTRIES, generator=draw).double() + 0.2).unbind(0)
    kept, removed = torch.randn(2, NUM_ENTRIES, generator=draw).double().unbind(0)
    base_curvature = rest + curvature
    base = (rest * kept + curvature * removed) / base_curvature
    member = (base_curvature * base + curvature * removed) / (base_curvature + curvature)
    merged, report = merge(base, [member], [curvature], base_curvature, scale=-1.0, ridge=0.0, floor=0.01)
    close(merged, kept)
    assert report["floored"] == {"entries": 0, "of": NUM_ENTRIES, "share": 0.0}
    # half of it
    merged, _ = merge(base, [member], [curvature], base_curvature, scale=-0.5, ridge=0.0, floor=0.01)
    close(merged, (rest * kept + 0.5 * curvature * removed) / (rest + 0.5 * curvature))


def test_the_three_ways_of_removal_by_hand():
    # H_0 = 1, H = (0.5, 4), task vectors 3 and 3, alpha = -1: the second entry's sum of curvatures is -3.
    arguments = ([1.0, 1.0], [[4.0, 4.0]], [[0.5, 4.0]], [1.0, 1.0])
    options = {"scale": -1.0, "ridge": 0.0}
    merged, report = merge(*arguments, **options)
    close(merged, [1 - 1.5 / 0.5 * 3, 1 - 5 / 0.1 * 3])
    assert report["floored"] == {"entries": 1, "of": 2, "share": 0.5}
    close(merge(*arguments, **options, floor=1.0)[0], [1 - 1.5 * 3, 1 - 5 * 3])
    merged, report = merge(*arguments, **options, removal="safe")
    close(merged, [1 - 1.5 * 3, 1 - 5 * 3])
    assert "floored" not in report
    close(merge(*arguments, **options, removal="plain")[0], [1 - 3.0, 1 - 3.0])


def test_additions_and_removals_together_by_hand():
    # H_0 = 2, H = (1, 3), task vectors 1 and 10, alpha = (-0.5, 1)
    arguments = ([0.0], [[1.0], [10.0]], [[1.0], [3.0]], [2.0])
    options = {"scale": (-0.5, 1.0), "ridge": 0.0}
    close(merge(*arguments, **options)[0], [(-0.5 * 3 * 1 + 5 * 10) / (2 - 0.5 + 3)])
    close(merge(*arguments, **options, removal="safe")[0], [(-0.5 * 3 * 1 + 5 * 10) / (2 + 3)])
    close(merge(*arguments, **options, removal="plain")[0], [5 * 10 / (2 + 3) - 0.5])


def test_removal_does_not_touch_additions():
    base, base_curvature, _, curvatures, members = quadratics()
    merges = [
        merge(base, members, curvatures, base_curvature, removal=removal)[0] for removal in ("floor", "safe", "plain")
    ]
    for other in merges[1:]:
        close(other, merges[0], 1e-15)


def test_exactness_with_full_matrices_reduces_to_the_diagonal_formula():
    # The derivation with full matrices: the same expression in the eigenbasis the curvatures share.
    draw = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw).double())[0]
    base_curvature, *curvatures = (torch.rand(3, 6, generator=draw).double() + 0.1).unbind(0)
    base, *centers = torch.randn(3, 6, generator=draw).double().unbind(0)
    full = [rotation.T @ torch.diag(curvature) @ rotation for curvature in (base_curvature, *curvatures)]
    oracle = torch.linalg.solve(sum(full), full[0] @ base + full[1] @ centers[0] + full[2] @ centers[1])
    members = [torch.linalg.solve(full[0] + h, full[0] @ base + h @ c) for h, c in zip(full[1:], centers, strict=True)]
    merged, _ = merge(
        rotation @ base, [rotation @ m for m in members], curvatures, base_curvature, ridge=0.0, scale=1.0
    )
    close(rotation.T @ merged, oracle)


def test_without_the_bases_fisher_the_members_stand_in_for_it():
    base, _, _, curvatures, members = quadratics()
    sizes = torch.tensor([10.0, 200.0, 35.0]).double()
    pooled = (sizes[:, None] * curvatures).sum(0) / sizes.sum()
    for base_size in (50.0, None):
        merged, report = merge(base, members, curvatures, examples=tuple(sizes.tolist()), base_examples=base_size)
        size = base_size or float(sizes.mean())
        wanted, given = merge(base, members, curvatures, pooled, examples=tuple(sizes.tolist()), base_examples=size)
        close(merged, wanted, 1e-12)
        assert report["base_fisher"] == "mean of the members'"
        assert report["base_examples"] == pytest.approx(size)
        assert given["base_fisher"] == "given"


def test_sizes_come_from_the_manifests_unless_given():
    base, base_curvature, _, curvatures, members = quadratics()
    known = {"num_examples": (10.0, 200.0, 35.0), "base_num_examples": 50.0}
    taken, _ = merge(base, members, curvatures, base_curvature, None, None, inputs=known)
    close(taken, merge(base, members, curvatures, base_curvature, (10.0, 200.0, 35.0), 50.0)[0], 1e-15)
    given, _ = merge(base, members, curvatures, base_curvature, 3.0, 2.0, inputs=known)
    close(given, merge(base, members, curvatures, base_curvature, 3.0, 2.0)[0], 1e-15)
    with pytest.raises(MergeError, match="needs the sizes of the members' training sets, .* give `examples`"):
        merge(base, members, curvatures, base_curvature, None)


def test_several_pieces_against_a_dense_float64_oracle():
    draw = torch.Generator().manual_seed(0)
    shape = (4, PIECE_ENTRIES // 100 + 7, 100)
    values, fishers = torch.randn(shape, generator=draw), torch.rand(shape, generator=draw) * 1e-5
    scales = torch.tensor([1.0, -0.2, 0.5])[:, None, None].double()
    h_0, h = 100 * fishers[0].double(), 30 * fishers[1:].double()
    vectors = values[1:].double() - values[0].double()
    bar = torch.maximum(h_0 + (scales * h).sum(0), 0.1 * h_0)
    oracle = values[0].double() + (scales * (h_0 + h) * vectors).sum(0) / bar
    inputs = MergeInputs.of(
        [CheckpointReader.of({"w": value}, f"m{i}") for i, value in enumerate(values[1:])],
        base=CheckpointReader.of({"w": values[0]}, "base"),
        fisher=[CheckpointReader.of({"w": fisher}, f"m{i}") for i, fisher in enumerate(fishers[1:])],
        base_fisher=CheckpointReader.of({"w": fishers[0]}, "base"),
    )
    method = GradientMatching(scale=(1.0, -0.2, 0.5), examples=30.0, base_examples=100.0)
    merged = dict(method.merge(inputs))["w"]
    # float32: a dozen operations, and removal divides by small differences
    torch.testing.assert_close(merged.double(), oracle, rtol=2e-5, atol=2e-6)
    assert inputs.report["floored"]["of"] == values[0].numel()


def test_buffers_have_no_fisher_and_get_the_mean_of_what_is_added():
    def models(values):
        return [CheckpointReader.of({"w": torch.ones(1), "running_var": torch.tensor([v])}, "m") for v in values]

    fishers = [CheckpointReader.of({"w": torch.ones(1)}, "m")] * 3
    inputs = MergeInputs.of(models([1.0, 7.0, 4.0]), base=models([2.0])[0], fisher=fishers)
    merged = dict(GradientMatching(scale=(1.0, -1.0, 0.5), examples=1.0).merge(inputs))
    assert merged["running_var"].item() == pytest.approx((1.0 + 0.5 * 4.0) / 1.5)
    merged = dict(GradientMatching(scale=-1.0, examples=1.0).merge(inputs))
    assert merged["running_var"].item() == pytest.approx(2.0)


def test_a_negative_fisher_of_the_base_is_refused():
    with pytest.raises(CheckpointError, match="base: tensor 'w' holds -1: a diagonal Fisher is"):
        merge([1.0], [[2.0]], [[1.0]], [-1.0])
    with pytest.raises(MergeError, match=r"base: the Fisher of 'w' is \[2\], the tensor \[1\]"):
        merge([1.0], [[2.0]], [[1.0]], [1.0, 1.0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"examples": -1.0}, "examples must be 0 or more and finite, got -1"),
        ({"examples": [1.0, -1.0]}, "examples must be 0 or more and finite, got -1"),
        ({"base_examples": -2.0}, "base_examples must be 0 or more"),
        ({"ridge": -1e-12}, "ridge must be 0 or more and finite"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\], got 0"),
        ({"removal": "none"}, "expected one of floor, safe, plain"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        make_method("gradient_matching", parameters)


def test_a_wrong_number_of_scales_or_sizes_is_refused():
    with pytest.raises(MergeError, match="gradient_matching: scale needs one value a member: got 2 for 1 members"):
        merge([1.0], [[2.0]], [[1.0]], [1.0], scale=(1.0, 1.0))
    with pytest.raises(MergeError, match="gradient_matching: examples needs one value a member: got 2 for 1 members"):
        merge([1.0], [[2.0]], [[1.0]], [1.0], examples=(1.0, 1.0))
