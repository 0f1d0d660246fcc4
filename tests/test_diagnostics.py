"""Diagnostics of a merge against closed forms and dense numpy, and what its card shows of them."""

import csv
import json
import random
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_zoo.analysis import effective
from hf_zoo.analysis.angles import conflict_row, cosine_row, relate, relate_all, total_of
from hf_zoo.analysis.effective import RUN_ENTRIES, effective_weights, histogram, weight_row
from hf_zoo.analysis.groups import groups_of
from hf_zoo.analysis.mismatch import MemberLoss, alphas_of, base_curvature, gradient_mismatch, mismatch_rows
from hf_zoo.analysis.sweep import area_under, at_scale, sweep
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.curvature.members import measure_member
from hf_zoo.data.texts import train_tokenizer
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.files import weights_digest
from hf_zoo.hub.cards import render_card, write_card
from hf_zoo.ingredients import open_ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.merging import run_merge
from hf_zoo.methods.base import make_method
from hf_zoo.places import Places
from hf_zoo.population import Manifest
from hf_zoo.recipe.diagnostics import DiagnosticsSpec
from hf_zoo.recipe.grid import canonical, digest
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import DataSpec, FinetuneRecipe, MergeRecipe, ObjectiveSpec, TokenizerSpec
from hf_zoo.recipe.statistics import StatisticsSpec
from hf_zoo.shards import TensorInfo
from hf_zoo.streaming import merge_in_memory
from hf_zoo.trials import CHOOSING_SPLIT, Trial
from hf_zoo.varying import Merger, Part

SHAPES = {"a.weight": (7, 5), "b.weight": (300, 1000), "b.bias": (300,)}  # one longer than a piece
WORDS = {"tone": ("bad", "good"), "topic": ("sea", "wood", "sky")}


def draw(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def reader(tensors, source):
    return CheckpointReader.of(tensors, source)


def make_inputs(count=3, with_fisher=False):
    base = draw(0)
    vectors = [draw(seed + 1, 0.1) for seed in range(count)]
    for vector in vectors:  # rows nobody, or not everybody, moved
        vector["b.weight"][:20] = 0
    vectors[0]["b.weight"][:40] = 0
    members = [reader({n: base[n] + vector[n] for n in SHAPES}, f"m{i}") for i, vector in enumerate(vectors)]
    others = {}
    if with_fisher:
        fishers = [{name: value.square() for name, value in draw(10 + i).items()} for i in range(count + 1)]
        others = {
            "fisher": tuple(reader(f, f"f{i}") for i, f in enumerate(fishers[1:])), "base_fisher": reader(fishers[0], "f"),
            "num_examples": (30.0, 10.0, 20.0)[:count], "base_num_examples": 50.0,
        }  # fmt: skip
    return MergeInputs.of(members, base=reader(base, "base"), **others)


def dense_vectors(inputs, name):
    base = inputs.base[name].double().numpy().ravel()
    # Differences of float32, as the merge takes them; then float64.
    return np.stack([(m[name] - inputs.base[name]).double().numpy().ravel() for m in inputs.members]), base


def merger_of(method, inputs, **parameters):
    made = make_method(method, parameters)
    return Merger(type(made), parameters, (Part(made, tuple(inputs.layout)),))


# -- task vectors


def test_cosines_and_conflicts_are_those_of_dense_vectors():
    inputs = make_inputs()
    relations = relate_all(inputs, list(SHAPES), num_threads=2)
    dense = {name: dense_vectors(inputs, name)[0] for name in SHAPES}
    dense["total"] = np.concatenate([dense[name] for name in SHAPES], 1)
    relations["total"] = total_of([relations[name] for name in SHAPES], 3)
    for name, vectors in dense.items():
        found, norms = relations[name], np.linalg.norm(vectors, axis=1)
        # float64 sums in another order
        np.testing.assert_allclose(found.cosines_KK, vectors @ vectors.T / np.outer(norms, norms), rtol=0, atol=1e-12)
        for i in range(3):
            for j in range(i + 1, 3):
                both = (vectors[i] != 0) & (vectors[j] != 0)
                opposed = np.sign(vectors[i][both]) != np.sign(vectors[j][both])
                assert float(found.conflicts_KK[i, j]) == pytest.approx(opposed.mean(), rel=1e-15)
                assert torch.equal(found.conflicts_KK, found.conflicts_KK.T)
        moved = (vectors != 0).sum(0) > 1
        mixed = (vectors > 0).any(0) & (vectors < 0).any(0)
        assert found.conflict == mixed.sum() / moved.sum()
        lost = 1 - np.abs(vectors.sum(0)).sum() / np.abs(vectors).sum()
        assert found.cancelled == pytest.approx(lost, abs=1e-12)
        pairs = found.cosines_KK[np.triu_indices(3, 1)].numpy()
        assert cosine_row(found) == pytest.approx({
            "mean": pairs.mean(),
            "smallest": pairs.min(),
            "largest": pairs.max(),
        })


def test_the_pass_gives_the_same_bits_for_any_number_of_threads():
    inputs = make_inputs()
    one, two = (relate_all(inputs, list(SHAPES), num_threads=threads) for threads in (1, 3))
    for name in SHAPES:
        assert torch.equal(one[name].gram_KK, two[name].gram_KK)
        assert one[name].added == two[name].added


def test_members_that_did_not_move_have_no_angle():
    base = draw(0)
    inputs = MergeInputs.of([reader(base, "a"), reader(base, "b")], base=reader(base, "base"))
    relations = relate(inputs.tensors("a.weight"))
    assert cosine_row(relations) == {"mean": 0, "smallest": 0, "largest": 0}
    assert conflict_row(relations) == {"conflict": 0, "cancelled": 0}
    alone = relate(MergeInputs.of([reader(base, "a")], base=reader(draw(1), "base")).tensors("a.weight"))
    assert cosine_row(alone) == {}


def test_opposite_vectors_cancel_and_equal_ones_do_not():
    base, vector = draw(0), draw(1)
    up, down = ({name: base[name] * 0 + sign * vector[name] for name in SHAPES} for sign in (1, -1))
    zero = reader({name: torch.zeros(shape) for name, shape in SHAPES.items()}, "base")
    opposite = relate(MergeInputs.of([reader(up, "a"), reader(down, "b")], base=zero).tensors("a.weight"))
    assert conflict_row(opposite) == {"conflict": 1, "cancelled": 1}
    assert float(opposite.cosines_KK[0, 1]) == pytest.approx(-1)
    equal = relate(MergeInputs.of([reader(up, "a"), reader(up, "b")], base=zero).tensors("a.weight"))
    assert conflict_row(equal) == {"conflict": 0, "cancelled": 0}


def test_groups_follow_the_network():
    names = [
        "head.w",
        "emb.w",
        "layer.1.w",
        "layer.0.w",
        "layer.10.w",
        *(f"layer.{i}.w" for i in range(2, 10)),
        "norm.w",
    ]
    ordered = ["emb.w", *(f"layer.{i}.w" for i in range(11)), "norm.w", "head.w"]
    groups = groups_of(Places(names, lambda: ordered, lambda: ["head.w"]), names)
    assert list(groups) == ["embeddings", *(f"layer.{i}" for i in range(11)), "rest", "heads"]
    assert groups["layer.10"] == ["layer.10.w"]
    flat = Places(["a.w", "b.w"], lambda: ["a.w", "b.w"], lambda: ["b.w"])
    assert groups_of(flat, ["a.w", "b.w"]) == {"rest": ["a.w"], "heads": ["b.w"]}


# -- effective weights


def test_effective_weights_of_gradient_matching_are_those_of_its_formula():
    inputs = make_inputs(with_fisher=True)
    inputs = inputs.only(["a.weight"])  # small enough to be looked at whole
    alphas = (0.5, 1.0, 2.0)
    merger = merger_of("gradient_matching", inputs, scale=alphas, ridge=0.3, relative_ridge=False)
    weights = effective_weights(merger, inputs)["a.weight"]
    fishers = np.stack([f["a.weight"].double().numpy().ravel() for f in inputs.fisher])
    tasks = fishers * np.array(inputs.num_examples)[:, None]
    of_base = inputs.base_fisher["a.weight"].double().numpy().ravel() * 50.0 + 0.3
    total = of_base + np.tensordot(alphas, tasks, 1)
    for place, alpha in enumerate(alphas):
        expected = alpha * (of_base + tasks[place]) / total
        # stored as float32; the difference quotient is exact for a linear merge but for rounding, 1e-16 / STEP
        np.testing.assert_allclose(weights.values[place], expected, rtol=1e-6)
    assert inputs.report == {}  # of the merge, not of this


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("task_arithmetic", {"scale": 0.7}, 0.7),
        ("average", {}, 1 / 3),
        ("average", {"weights": (1.0, 1.0, 2.0)}, (0.25, 0.25, 0.5)),
    ],
)
def test_effective_weights_of_linear_merges_are_their_factors(method, parameters, expected):
    inputs = make_inputs()
    weights = effective_weights(merger_of(method, inputs, **parameters), inputs)
    assert list(weights) == list(SHAPES)
    for place in range(3):
        factor = expected[place] if isinstance(expected, tuple) else expected
        row = weight_row(weights.values(), place)
        for key in ("mean", "q05", "median", "q95"):
            assert row[key] == pytest.approx(factor, rel=1e-5)
    if method == "task_arithmetic":  # of the large tensor a sample; entries nobody moved have no weight
        assert len(weights["b.weight"].values[1]) == 7 * RUN_ENTRIES


def test_effective_weights_show_what_a_method_selects():
    inputs = make_inputs().only(["a.weight"])
    weights = effective_weights(merger_of("magmax", inputs), inputs)["a.weight"]
    vectors, _ = dense_vectors(inputs, "a.weight")
    for place in range(3):
        wins = np.abs(vectors).argmax(0) == place
        np.testing.assert_allclose(weights.values[place], wins.astype(float), atol=1e-6)


def test_effective_weights_of_an_elected_mean_are_those_of_its_formula():
    inputs = make_inputs().only(["a.weight"])
    weights = effective_weights(merger_of("ties", inputs, density=1.0, scale=0.8), inputs)["a.weight"]
    vectors, _ = dense_vectors(inputs, "a.weight")
    agree = np.sign(vectors) == np.sign(vectors.sum(0))
    for place in range(3):
        np.testing.assert_allclose(weights.values[place], 0.8 * agree[place] / agree.sum(0), rtol=1e-5, atol=1e-6)


def test_a_step_over_a_threshold_is_no_weight(monkeypatch):
    monkeypatch.setattr(effective, "STEP", 2.0**-8)  # so that some of the sampled entries cross it
    inputs = make_inputs().only(["b.weight"])
    weights = effective_weights(merger_of("ties", inputs, density=0.2, scale=1.0), inputs)["b.weight"]
    for values in weights.values:
        assert -1e-5 < values.min()
        assert values.max() < 1 + 1e-5  # alone, or a share of a mean


def test_large_tensors_count_more_in_means_quantiles_and_histogram():
    inputs = make_inputs()
    members = {"a.weight": 0.25, "b.weight": 0.75, "b.bias": 0.75}
    made = {n: make_method("task_arithmetic", {"scale": s}) for n, s in members.items()}
    parts = tuple(Part(method, (name,)) for name, method in made.items())
    weights = effective_weights(Merger(type(parts[0].method), {}, parts), inputs)
    sizes = {name: np.prod(shape) for name, shape in SHAPES.items()}
    mean = sum(members[name] * size for name, size in sizes.items()) / sum(sizes.values())
    row = weight_row(weights.values(), 0)
    assert row["mean"] == pytest.approx(mean, rel=1e-5)
    assert row["q05"] == pytest.approx(0.75, rel=1e-5)  # 35 of 300,335 entries are below
    shown = histogram(list(weights.values()), ["x", "y", "z"])
    assert len(shown["edges"]) == len(shown["shares"]["x"]) + 1
    assert sum(shown["shares"]["x"]) == pytest.approx(1)
    centre = np.searchsorted(shown["edges"], 0.75) - 1
    assert shown["shares"]["x"][centre] == pytest.approx(300_300 / 300_335, abs=1e-5)


def test_matrix_methods_are_left_out():
    inputs = make_inputs()
    assert effective_weights(merger_of("isotropic", inputs), inputs) == {}


# -- mismatch


@dataclass(frozen=True)
class Quadratic:
    """(theta - centre)^T A (theta - centre) / 2 over all tensors, A diagonal."""

    centre: dict
    curvature: dict

    def gradient(self, tensors):
        return {name: self.curvature[name] * (tensors[name] - self.centre[name]) for name in self.centre}


@dataclass(frozen=True)
class Softmax:
    """Cross-entropy of a linear softmax model, summed, by autograd."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def gradient(self, tensors):
        weight = tensors["w"].clone().requires_grad_()
        torch.nn.functional.cross_entropy(self.inputs @ weight.T, self.labels, reduction="sum").backward()
        return {"w": weight.grad}


def places_of(names):
    return Places(names, lambda: list(names), lambda: [])


def test_mismatch_of_quadratics_has_a_closed_form():
    inputs = make_inputs()
    names, alphas = list(SHAPES), (1.0, 0.5, 2.0)
    curvatures = [{n: v.abs().double() for n, v in draw(20 + t).items()} for t in range(3)]
    losses = [Quadratic({n: v.double() for n, v in draw(30 + t).items()}, curvatures[t]) for t in range(3)]
    merged = reader(draw(40), "merge")
    found = gradient_mismatch(losses, alphas, merged, inputs.members)
    expected = {
        n: sum(
            a * h[n] * (merged[n].double() - m[n].double())
            for a, h, m in zip(alphas, curvatures, inputs.members, strict=True)
        )
        for n in names
    }
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    of_base = {n: v.abs() + 1 for n, v in draw(50).items()}
    rows = mismatch_rows(found, places_of(names), of_base.get)
    flat = torch.cat([expected[n].ravel() for n in names])
    scale = torch.cat([of_base[n].ravel().double() for n in names])
    assert rows[-1]["group"] == "total"
    assert rows[-1]["norm"] == pytest.approx(float(flat.norm()), rel=1e-12)
    assert rows[-1]["scaled"] == pytest.approx(float((flat / scale).norm()), rel=1e-7)
    assert rows[-1]["natural"] == pytest.approx(float((flat / scale.sqrt()).norm()), rel=1e-7)


def test_gradient_matching_ends_where_the_scaled_mismatch_corrects_task_arithmetic():
    """On quadratics theta* - (theta_0 + sum alpha_t Delta_t) is exactly -H_0^-1 times the mismatch at theta*."""
    inputs = replace(make_inputs(with_fisher=True), dtype=torch.float64)
    inputs = MergeInputs.of(
        inputs.members, dtype=torch.float64, base=inputs.base, fisher=inputs.fisher, base_fisher=inputs.base_fisher,
        num_examples=inputs.num_examples, base_num_examples=50.0, compute_dtype=torch.float64,
    )  # fmt: skip
    alphas = (1.0, 0.5, 2.0)
    method = make_method("gradient_matching", {"scale": alphas, "ridge": 0.1, "relative_ridge": False})
    assert alphas_of(method, inputs) == alphas
    merged = merge_in_memory(Merger(type(method), {}, (Part(method, tuple(SHAPES)),)), inputs)
    curvature = base_curvature(method, inputs)
    losses = []
    for fisher, size, member in zip(inputs.fisher, inputs.num_examples, inputs.members, strict=True):
        h = {n: fisher[n].double() * size for n in SHAPES}
        # the minimum of l_t + |theta - theta_0|^2_{H_0} / 2 is theta_t, so its own is H_t^-1 H_0 Delta_t further
        delta = {n: member[n].double() - inputs.base[n].double() for n in SHAPES}
        losses.append(Quadratic({n: member[n].double() + curvature(n) / h[n] * delta[n] for n in SHAPES}, h))
    found = gradient_mismatch(losses, alphas, reader(merged, "merge"), inputs.members)
    for name in SHAPES:
        vectors = [member[name].double() - inputs.base[name].double() for member in inputs.members]
        arithmetic = inputs.base[name].double() + sum(a * v for a, v in zip(alphas, vectors, strict=True))
        correction = -found[name] / curvature(name)
        torch.testing.assert_close(merged[name], arithmetic + correction, rtol=1e-9, atol=1e-9)


def test_mismatch_of_softmax_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    theta, own = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = Softmax(x, y)
    found = gradient_mismatch([loss], [0.7], reader({"w": theta}, "merge"), [reader({"w": own}, "own")])["w"]
    # sum_n (p_n - e_n) x_n^T: the labels cancel in the difference
    expected = 0.7 * ((x @ theta.T).softmax(-1) - (x @ own.T).softmax(-1)).T @ x
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    at_home = gradient_mismatch([loss], [0.7], reader({"w": own}, "merge"), [reader({"w": own}, "own")])["w"]
    assert torch.equal(at_home, torch.zeros_like(at_home))


def test_entries_without_gradient_need_no_curvature_and_others_do():
    mismatch = {"w": torch.tensor([0.0, 3.0], dtype=torch.float64)}
    norms = [
        mismatch_rows(mismatch, places_of(["w"]), lambda _, c=c: torch.tensor(c))[-1] for c in ([0, 2.0], [1, 0.0])
    ]
    assert [(row["norm"], row["scaled"]) for row in norms] == [(3.0, 1.5), (3.0, None)]
    assert [row["natural"] for row in norms] == [pytest.approx(np.sqrt(9 / 2)), None]


def test_alphas_are_what_task_vectors_are_multiplied_by():
    inputs = make_inputs()

    def alphas(method, **parameters):
        return alphas_of(make_method(method, parameters), inputs)

    assert alphas("average") == pytest.approx((1 / 3,) * 3)
    assert alphas("average", weights=(1.0, 1.0, 2.0)) == (0.25, 0.25, 0.5)
    assert alphas("task_arithmetic", scale=0.4) == (0.4,) * 3
    assert alphas("task_arithmetic", scale=0.5, weights=(1.0, 2.0, -1.0)) == (0.5, 1.0, -0.5)
    assert alphas("gradient_matching", scale=(1.0, 0.5, -1.0)) == (1.0, 0.5, -1.0)


# -- sweep


def test_the_area_is_that_of_the_function():
    scales = np.linspace(0.1, 1.5, 15)
    assert area_under(scales, 3 * scales + 1) == pytest.approx(3 * 0.8 + 1)  # linear: exact
    assert area_under(scales, scales**2) == pytest.approx(np.trapezoid(scales**2, scales) / 1.4)
    assert area_under([0.0, 1.0, 3.0], [1.0, 1.0, 0.0]) == pytest.approx((1 + 1) / 3)


def test_a_sweep_scores_every_task_and_their_mean():
    found = sweep((0.5, 1.0, 1.5), lambda scale: {"a": scale, "b": 1 - scale})
    assert [row["area"] for row in found["areas"]] == pytest.approx([1.0, 0.0, 0.5])
    assert [row["task"] for row in found["areas"]] == ["a", "b", "all tasks"]
    assert {"scale": 1.5, "task": "b", "score": -0.5} in found["rows"]
    broken = sweep((0.5, 1.0), lambda scale: {"a": -np.inf if scale > 0.7 else 0.2})
    assert [row["score"] for row in broken["rows"]] == [0.2, None]
    assert broken["areas"] == [{"task": "a", "area": None, "lowest": None, "highest": 0.2}]


@pytest.mark.parametrize(
    ("written", "expected"),
    [(None, 0.5), (0.3, 0.5), (-1, -0.5), ([1.0, -2.0], [0.5, -1.0]), ({"blocks": [1, 3], "heads": 2}, {"blocks": [0.5, 1.5], "heads": 1.0})],
)  # fmt: skip
def test_what_a_scale_becomes_in_a_sweep(written, expected):
    assert at_scale(written, 0.5) == expected


# -- the merge job


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and two children of it for two tasks, with data; returns the folder."""
    root, dice = tmp_path_factory.mktemp("world"), random.Random(0)
    for task, names in WORDS.items():
        (root / task).mkdir()
        for split, count in (("train", 24), ("validation", 12), ("test", 12)):
            with (root / task / f"{split}.csv").open("w", newline="") as file:
                rows = [(dice.choice("abc") + " " + (word := dice.choice(names)), word) for _ in range(count)]
                csv.writer(file).writerows([("text", "label"), *rows])
    words = [*"abc", *WORDS["tone"], *WORDS["topic"]]
    tokenizer = train_tokenizer([" ".join(words)] * 5, TokenizerSpec(vocab_size=60), 16)
    body = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **body)
    base = transformers.BertModel(config)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, (task, names) in enumerate(WORDS.items()):
        own = transformers.BertConfig.from_dict(config.to_dict())
        own.id2label, own.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        torch.manual_seed(seed + 1)
        model = transformers.BertForSequenceClassification(own)
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        folder = root / f"m-{task}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe = FinetuneRecipe(
            name="zoo",
            objective=ObjectiveSpec(name="sequence_classification"),
            parent=str(root / "base"),
            task=task,
            data=DataSpec(path=str(root / task), validation_split="validation", max_length=16),
        )
        Manifest(
            name=folder.name,
            status="finished",
            objective="sequence_classification",
            task=task,
            recipe=canonical(recipe, spelled_out=True),
            digest=digest(recipe),
            auto_class="AutoModelForSequenceClassification",
            architecture="BertForSequenceClassification",
            model_type="bert",
            sha256=weights_digest(folder),
        ).write(folder)
    return root


def merge(world, output, **changes):
    content = {
        "name": "merged", "output": str(output), "members": [str(world / "m-tone"), str(world / "m-topic")],
        "base": str(world / "base"), "method": "task_arithmetic", "parameters": {"scale": 0.5}, "seed": 3,
    }  # fmt: skip
    return run_merge(build_recipe(content | changes, MergeRecipe, "test"))


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    kinds = ["cosines", "conflicts", "effective_weights", "mismatch", "alpha_sweep"]
    diagnostics = {"kinds": kinds, "scales": [0.25, 0.5, 1.0], "max_examples": 10, "batch_size": 4}
    return merge(world, tmp_path_factory.mktemp("everything"), diagnostics=diagnostics)


def total(rows):
    return [row for row in rows if row["group"] == "total"]


def test_the_merge_job_measures_task_vectors_and_weights(everything, world):
    found = everything.manifest.diagnostics
    names = [open_ingredient(str(world / f"m-{task}")) for task in WORDS]
    base = CheckpointReader.open(world / "base")
    # The pooler is trained from the base here, so that everything in the trunk counts.
    vectors = np.stack([
        np.concatenate([(one.trunk[name] - base[name]).double().numpy().ravel() for name in base]) for one in names
    ])
    cosine = vectors[0] @ vectors[1] / np.prod(np.linalg.norm(vectors, axis=1))
    assert found["cosines"]["pairs"] == [
        {"first": "m-tone", "second": "m-topic", "cosine": pytest.approx(cosine, rel=1e-5)}
    ]
    opposed = np.mean((vectors[0] * vectors[1])[(vectors != 0).all(0)] < 0)
    assert found["conflicts"]["pairs"][0]["conflict"] == pytest.approx(opposed, rel=1e-5)
    groups = [row["group"] for row in found["cosines"]["groups"]]
    assert groups == ["embeddings", "encoder.layer.0", "encoder.layer.1", "rest", "total"]
    lengths = [row["length"] for row in found["cosines"]["lengths"]]
    assert lengths == pytest.approx(np.linalg.norm(vectors, axis=1), rel=1e-5)
    for row in total(found["effective_weights"]["groups"]):
        assert row["mean"] == pytest.approx(0.5, rel=1e-5)
    lines = [json.loads(line) for line in (everything.folder / "diagnostics.jsonl").read_text().splitlines()]
    for kind, rows in (("cosines", 1), ("conflicts", 1), ("effective_weights", 2)):
        assert sum(line["kind"] == kind for line in lines) == rows * len(list(base))
    assert json.loads(json.dumps(found)) == found


def stock_gradient(world, task, where, **options):
    """Return name -> gradient of a task's loss summed over its training split, by the stock class."""
    with (world / task / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(where, **options).eval()
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    torch.nn.functional.cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
    return {name: parameter.grad.double() for name, parameter in model.bert.named_parameters()}


def stock_mismatch(world, folder, alphas):
    total = {}
    for alpha, task in zip(alphas, WORDS, strict=True):
        here, there = (
            stock_gradient(world, task, folder, subfolder=task),
            stock_gradient(world, task, world / f"m-{task}"),
        )
        for name in here:
            total[name] = total.get(name, 0) + alpha * (here[name] - there[name])
    return total


def test_the_merge_job_measures_the_mismatch_of_the_losses(everything, world, tmp_path):
    outcome = merge(world, tmp_path, diagnostics={"kinds": ["mismatch"], "max_examples": None})
    found = outcome.manifest.diagnostics["mismatch"]
    expected = torch.cat([value.ravel() for value in stock_mismatch(world, outcome.folder, (0.5, 0.5)).values()])
    assert found["groups"][-1]["norm"] == pytest.approx(float(expected.norm()), rel=1e-4)  # float32, other batches
    assert (found["split"], found["curvature"]) == ("train", None)
    assert [(row["examples"], row["of"], row["alpha"]) for row in found["members"]] == [(24, 24, 0.5)] * 2
    sampled = everything.manifest.diagnostics["mismatch"]
    assert [(row["examples"], row["of"]) for row in sampled["members"]] == [(10, 24)] * 2


def test_members_with_fishers_have_a_mismatch_scaled_by_the_curvature(world, tmp_path):
    members = []
    for task in WORDS:
        members.append(tmp_path / f"m-{task}")
        shutil.copytree(world / f"m-{task}", members[-1])
        measure_member(members[-1], StatisticsSpec())
    outcome = merge(
        world, tmp_path / "out", members=[str(member) for member in members], method="gradient_matching",
        parameters={"scale": [0.5, 1.5], "examples": 24, "ridge": 0.01, "relative_ridge": False},
        diagnostics={"kinds": ["mismatch"], "max_examples": None},
    )  # fmt: skip
    found = outcome.manifest.diagnostics["mismatch"]
    assert [row["alpha"] for row in found["members"]] == [0.5, 1.5]
    fishers = [load_file(member / "statistics" / "fisher.safetensors") for member in members]
    squares = dict.fromkeys(("norm", "natural", "scaled"), 0.0)
    for name, value in stock_mismatch(world, outcome.folder, (0.5, 1.5)).items():
        curvature = 24 * sum(fisher[f"bert.{name}"].double() for fisher in fishers) / 2 + 0.01
        squares["norm"] += float(value.square().sum())
        squares["natural"] += float((value.square() / curvature).sum())
        squares["scaled"] += float((value / curvature).square().sum())
    for key, square in squares.items():
        assert found["groups"][-1][key] == pytest.approx(np.sqrt(square), rel=1e-3)
    assert found["curvature"] == "the mean of the members' Fishers"
    assert "| Tensors | Mismatch | Natural | Scaled |" in (outcome.folder / "README.md").read_text()


def test_a_sample_is_scaled_up_to_the_whole_split(world):
    member = open_ingredient(str(world / "m-topic"))
    spec = DiagnosticsSpec(max_examples=10, batch_size=4)
    loss = MemberLoss.open(member, None, trunk_alone=False, spec=spec, seed=3)
    found = loss.gradient(member.reader)
    assert set(found) == set(member.reader)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(member.folder).eval()
    for indices in loss.examples.batches:
        batch = loss.examples.collator([loss.examples.table[int(index)] for index in indices])
        model(**batch).loss.mul(len(indices)).backward()
    assert sum(map(len, loss.examples.batches)) == 10
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], 2.4 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradients_come_under_the_names_on_disk(tmp_path):
    """A ViT is saved under other names than its modules have; a step down its gradient lowers its loss."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    size = {"height": 8, "width": 8}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5], do_resize=False)
    processor.save_pretrained(tmp_path)
    recipe = {"objective": {"name": "image_classification"}, "data": {"path": "digits"}}
    Manifest(name="vit", status="finished", objective="image_classification", recipe=recipe).write(tmp_path)
    member = open_ingredient(str(tmp_path))
    loss = MemberLoss.open(member, None, trunk_alone=True, spec=DiagnosticsSpec(max_examples=20), seed=0)
    gradient = loss.gradient(member.trunk)
    assert {name: tuple(value.shape) for name, value in gradient.items()} == {
        name: member.trunk.shape(name) for name in member.trunk
    }

    def value(step):
        moved = {name: member.trunk[name] - step * gradient[name] for name in gradient}
        model = loss.model(reader(moved, "moved"))
        batches = [
            loss.examples.collator([loss.examples.table[int(i)] for i in part]) for part in loss.examples.batches
        ]
        with torch.no_grad():
            return sum(float(model(**batch).loss) * len(batch["labels"]) for batch in batches) * loss.num_examples / 20

    squared = sum(float(one.double().square().sum()) for one in gradient.values())
    step = 1e-3 / squared**0.5
    slope = (value(-step) - value(step)) / (2 * step)
    assert slope == pytest.approx(squared, rel=1e-2)  # a difference quotient in float32


def test_one_task_at_its_own_model_has_no_mismatch(world, tmp_path):
    members = [str(world / "m-tone")]
    outcome = merge(
        world, tmp_path, members=members, method="average", parameters={}, base=None, diagnostics="mismatch"
    )
    assert {row["norm"] for row in outcome.manifest.diagnostics["mismatch"]["groups"]} == {0.0}


def test_the_sweep_measures_merges_of_other_scales_on_the_validation_split(everything, world, tmp_path):
    found = everything.manifest.diagnostics["alpha_sweep"]
    assert (found["split"], found["axis"]) == ("validation", "scale")
    other = merge(world, tmp_path, parameters={"scale": 0.25}, diagnostics={"kinds": []})
    scores = {
        record["task"]: record["validation_accuracy"]
        for record in other.manifest.results
        if record["model"] == "merged"
    }
    rows = {row["task"]: row["score"] for row in found["rows"] if str(row["scale"]) == "0.25"}
    assert rows == pytest.approx({**scores, "all tasks": np.mean(list(scores.values()))}, rel=1e-5)
    at_recipe = {row["task"]: row["score"] for row in found["rows"] if str(row["scale"]) == "0.5"}
    assert at_recipe["tone"] == pytest.approx(
        next(
            r["validation_accuracy"]
            for r in everything.manifest.results
            if (r["task"], r["model"]) == ("tone", "merged")
        ),
        rel=1e-5,
    )


def test_the_sweep_never_looks_at_the_test_split(world, tmp_path, monkeypatch):
    splits = []
    measured = Trial._metrics
    monkeypatch.setattr(
        Trial, "_metrics", lambda self, model, split: splits.append(split) or measured(self, model, split)
    )
    merge(world, tmp_path, evaluate=False, diagnostics={"kinds": ["alpha_sweep"], "scales": [0.5, 1.0]})
    assert set(splits) == {CHOOSING_SPLIT}


def test_the_card_shows_tables_and_pictures_with_the_same_bytes(everything, tmp_path):
    folder, manifest = everything.folder, everything.manifest
    card = (folder / "README.md").read_text()
    assert card == render_card(manifest)
    pictures = ("task_vectors.png", "effective_weights.png", "gradient_mismatch.png", "alpha_sweep.png")
    headings = ("Task vectors", "Effective weights", "Gradient mismatch", "Robustness in the scale")
    for heading, picture in zip(headings, pictures, strict=True):
        assert f"### {heading}\n\n![{heading}]({picture})" in card
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    cosine = manifest.diagnostics["cosines"]["pairs"][0]["cosine"]
    assert f"| `m-tone` | `m-topic` | {cosine:.4g} |" in card
    area = manifest.diagnostics["alpha_sweep"]["areas"][-1]["area"]
    assert f"| all tasks | {area:.4g} |" in card
    manifest.write(tmp_path)
    write_card(tmp_path)
    for name in ("README.md", *pictures):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in pictures}
    write_card(tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in pictures} == before
    changed = manifest.replace(diagnostics={**manifest.diagnostics, "alpha_sweep": sweep_of_one_task()})
    write_card(tmp_path, manifest=changed)
    assert (tmp_path / "alpha_sweep.png").stat().st_mtime_ns > before["alpha_sweep.png"]
    assert (tmp_path / "task_vectors.png").stat().st_mtime_ns == before["task_vectors.png"]


def sweep_of_one_task():
    return {"split": "validation", "axis": "scale", **sweep((0.5, 1.0), lambda scale: {"$a_b$": scale})}


def test_by_default_only_what_needs_no_data_of_merges_with_a_base_that_are_evaluated():
    spec = DiagnosticsSpec()
    assert spec.wanted(evaluated=True, has_base=True) == ("cosines", "conflicts", "effective_weights")
    assert spec.wanted(evaluated=False, has_base=True) == spec.wanted(evaluated=True, has_base=False) == ()
    assert DiagnosticsSpec(kinds=("mismatch",)).wanted(evaluated=False, has_base=False) == ("mismatch",)


def test_the_job_measures_the_default_and_says_so_on_the_card(world, tmp_path):
    outcome = merge(world, tmp_path, num_eval=4)
    assert list(outcome.manifest.diagnostics) == ["cosines", "conflicts", "effective_weights"]
    pictures = sorted(path.name for path in outcome.folder.glob("*.png"))
    assert pictures == ["effective_weights.png", "task_vectors.png"]
    without = merge(world, tmp_path, name="without", evaluate=False)
    assert without.manifest.diagnostics == {}
    assert "## Diagnostics" not in (without.folder / "README.md").read_text()
    assert not list(without.folder.glob("*.png"))


def test_a_base_is_found_for_a_method_without_one(world, tmp_path):
    outcome = merge(world, tmp_path, method="average", parameters={}, evaluate=False, base=None, diagnostics="cosines")
    assert list(outcome.manifest.diagnostics) == ["cosines"]
    assert outcome.manifest.method["name"] == "average"
    assert [parent.role for parent in outcome.manifest.parents] == ["member", "member"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "average", "parameters": {}, "diagnostics": "alpha_sweep"}, "average has none"),
        ({"method": "isotropic", "diagnostics": "effective_weights"}, "does not merge entry by entry"),
        ({"diagnostics": {"kinds": ["mismatch"], "alphas": [1.0]}}, "got 1 for 2 members"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_merge(world, tmp_path, changes, message):
    with pytest.raises(MergeError, match=message):
        merge(world, tmp_path, evaluate=False, **changes)
    assert not (tmp_path / "merged").exists()


def test_losses_and_splits_are_checked_before_the_merge(world, tmp_path):
    members = []
    for task in WORDS:
        members.append(tmp_path / f"m-{task}")
        shutil.copytree(world / f"m-{task}", members[-1])
    manifest = Manifest.read(members[1])
    recipe = {**manifest.recipe, "objective": {"name": "contrastive"}}
    manifest.replace(objective="contrastive", recipe=recipe).write(members[1])
    changes = {"members": [str(member) for member in members], "evaluate": False}
    with pytest.raises(MergeError, match="m-topic: contrastive learning compares"):
        merge(world, tmp_path / "out", diagnostics="mismatch", **changes)
    (members[1] / "zoo.json").unlink()
    alone = {"members": [str(members[1])], "method": "average", "parameters": {}, "base": None, "evaluate": False}
    with pytest.raises(MergeError, match="m-topic: no manifest says what it learned"):
        merge(world, tmp_path / "out", diagnostics="mismatch", **alone)
    data = {task: {"path": str(world / task), "validation_fraction": 0.0} for task in WORDS}
    with pytest.raises(MergeError, match="its data has no validation split"):
        merge(world, tmp_path / "out", diagnostics="alpha_sweep", data=data)
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize(
    ("diagnostics", "message"),
    [("cosine", "cosines"), ({"scales": [1.0, 0.5]}, "ascending"), ({"scales": [0.5]}, "two or more"), ({"max_examples": 0}, "1 or more")],
)  # fmt: skip
def test_mistakes_in_the_recipe_are_named(world, tmp_path, diagnostics, message):
    with pytest.raises(RecipeError, match=message):
        merge(world, tmp_path, diagnostics=diagnostics)


def test_layouts_of_other_types_do_not_matter():
    """bfloat16 members: task vectors are taken in float32."""
    inputs = make_inputs(2)
    half = [reader({n: m[n].bfloat16() for n in SHAPES}, m.source) for m in inputs.members]
    found = relate(MergeInputs.of(half, base=inputs.base).tensors("a.weight"))
    vectors = [(m["a.weight"].float() - inputs.base["a.weight"]).double().ravel() for m in half]
    expected = float(vectors[0] @ vectors[1] / vectors[0].norm() / vectors[1].norm())
    assert float(found.cosines_KK[0, 1]) == pytest.approx(expected, abs=1e-12)
    assert TensorInfo.of(half[0]["a.weight"]).dtype == torch.bfloat16
