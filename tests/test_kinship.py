"""Whether models come from one parent."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.ingredients import Ingredient
from hf_zoo.lineage import measure_kinship
from hf_zoo.population import Manifest, Parent, Reference

SHAPES = {"one": (40, 30), "two": (20, 20), "norm": (40,)}


def weights(seed, near=None, noise=0.0):
    draw = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items() if len(shape) > 1}
    made["norm"] = torch.ones(40)
    return made if near is None else {name: near[name] + noise * made[name] for name in SHAPES}


def ingredient(name, parent=None):
    parents = () if parent is None else (Parent(repo="org/p", sha256=parent),)
    manifest = Manifest(name=name, parents=parents)
    return Ingredient(Reference(name), None, manifest)


def kinship(tensors, base=None, parents=None):
    readers = [CheckpointReader.of(one, f"m{i}") for i, one in enumerate(tensors)]
    models = [ingredient(f"m{i}", (parents or [None] * len(tensors))[i]) for i in range(len(tensors))]
    root = None if base is None else (ingredient("base"), CheckpointReader.of(base, "base"))
    return measure_kinship(models, readers, readers[0].layout, root)


def test_children_of_one_parent_are_kin():
    parent = weights(0)
    children = [weights(seed, parent, 0.1) for seed in (1, 2, 3)]
    found = kinship(children)
    assert len(found.cosines) == 3
    # two children p + 0.1 a, p + 0.1 b: cosine 1 / 1.01
    assert all(abs(cosine - 1 / 1.01) < 0.01 for cosine in found.cosines.values())
    assert found.strangers == []


def test_unrelated_models_are_named_with_their_cosine():
    found = kinship([weights(1), weights(2)], parents=["a" * 64, "b" * 64])
    (told,) = found.strangers
    assert told.startswith("m0 and m1: their manifests name different parents, and the cosine of their weights is ")
    assert abs(found.cosines["m0", "m1"]) < 0.1  # 1,600 entries: the standard deviation is 1/40


def test_with_a_base_each_member_is_compared_with_it():
    parent = weights(0)
    found = kinship([weights(1, parent, 0.1), weights(2)], base=parent)
    assert set(found.cosines) == {("m0", "base"), ("m1", "base")}
    assert [told.partition(":")[0] for told in found.strangers] == ["m1 and base"]


@pytest.mark.parametrize("base", [None, {"other": torch.ones(3, 3)}])
def test_models_without_a_matrix_in_common_say_nothing(base):
    tensors = [{"norm": torch.ones(4)}, {"norm": torch.zeros(4)}]
    assert kinship(tensors, base).strangers == []


def test_models_of_one_name_do_not_hide_each_other():
    parent = weights(0)
    tensors = [weights(1, parent, 0.1), weights(2), weights(3, parent, 0.1)]
    readers = [CheckpointReader.of(one, f"runs/{i}/final") for i, one in enumerate(tensors)]
    found = measure_kinship([ingredient("final")] * 3, readers, readers[0].layout)
    assert [told.partition(":")[0] for told in found.strangers] == [
        "final (1) and final (2)",
        "final (2) and final (3)",
    ]


def test_a_base_called_like_a_member_is_told_apart_from_it():
    parent = weights(0)
    readers = [CheckpointReader.of(one, "m0") for one in (weights(1, parent, 0.1), parent)]
    found = measure_kinship([ingredient("m0")], readers[:1], readers[0].layout, (ingredient("m0"), readers[1]))
    assert list(found.cosines) == [("m0 (1)", "m0 (2)")]
