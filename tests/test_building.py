"""Models from recipes: initialisations, heads, parents, adapters, and what is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_zoo.building import Demands, build_model
from hf_zoo.errors import CheckpointError, ModelError
from hf_zoo.heads import head_names, trunk_names
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import PretrainRecipe

VIT = {
    "type": "vit",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
    },
}
BERT = {
    "type": "bert",
    "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
TIMM = {"type": "timm", "config": {"architecture": "resnet10t"}}
IMAGES = Demands(("a", "b", "c"), 3, (16, 16), 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
TEXTS = Demands(labels=("no", "yes"), num_outputs=2, vocab_size=50, pad_token_id=0, max_length=32)
TOKENS = Demands(vocab_size=50, pad_token_id=0, max_length=32)


def recipe(model, objective="image_classification", **keys):
    path = {"masked_lm": "docs", "sequence_classification": "docs-sentences"}.get(objective, "digits")
    mode = {"mode": "continued"} if objective == "masked_lm" and "parent" in keys else {}
    content = {"name": "m", "objective": {"name": objective, **mode}, "data": {"path": path}, "model": model, **keys}
    return build_recipe(content, PretrainRecipe, "test")


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(left, right):
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


@pytest.mark.parametrize(("model", "demands"), [(VIT, IMAGES), (TIMM, IMAGES)])
def test_trunk_and_head_depend_on_their_own_seeds_alone(model, demands):
    plain = state_of(build_model(recipe(model), demands, None).model)
    again = state_of(build_model(recipe(model), demands, None).model)
    other_head = build_model(recipe(model, seeds={"head": 7}), demands, None).model
    other_init = build_model(recipe(model, seeds={"init": 7}), demands, None).model
    assert changed(plain, again) == set()
    heads = set(head_names(other_head))
    assert changed(plain, state_of(other_head))
    assert changed(plain, state_of(other_head)) <= heads
    assert changed(plain, state_of(other_init))
    assert changed(plain, state_of(other_init)) <= set(trunk_names(other_init))


def test_building_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    build_model(recipe(VIT), IMAGES, None)
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scheme", "deviation"),
    [
        # Closed forms for the 16x16 query projection: fan in = fan out = 16.
        ("xavier_normal", (2 / 32) ** 0.5),
        ("xavier_uniform", (2 / 32) ** 0.5),
        ("kaiming_normal", (2 / 16) ** 0.5),
        # torch's kaiming_uniform_ has gain sqrt(2) by default too.
        ("kaiming_uniform", (2 / 16) ** 0.5),
        ("normal", 1.0),
        ("uniform", (1 / 12) ** 0.5),
    ],
)
def test_schemes_have_their_closed_form_spread(scheme, deviation):
    model = build_model(recipe({**VIT, "init": scheme}), IMAGES, None).model
    weights = [
        p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]
    drawn = torch.cat([weight.detach().flatten() for weight in weights])
    assert len(drawn) == 6 * 256
    # The standard error of a deviation from 1,536 draws is 2 %; four of them.
    assert drawn.std().item() == pytest.approx(deviation, rel=0.08)
    biases = [p for name, p in model.named_parameters() if name.endswith("q_proj.bias") or name == "classifier.bias"]
    for bias in biases:
        torch.testing.assert_close(bias.detach(), torch.full_like(bias, 0.01), rtol=0, atol=0)


def test_a_tied_decoder_keeps_the_embedding():
    model = build_model(recipe({**BERT, "init": "normal"}, "masked_lm"), TOKENS, None).model
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)  # the library's own, not N(0, 1)


def test_timm_nets_keep_timms_own_spread():
    # timm draws convolutions from N(0, sqrt(2 / fan_out)); the wrapper's generic scheme would be 0.02 everywhere.
    model = build_model(recipe(TIMM), IMAGES, None).model
    weight = model.timm_model.layer4[0].conv1.weight
    fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.fixture
def parents(tmp_path):
    """Folders of saved models: a ViT, a timm net, a masked language model."""
    built = {
        "vit": build_model(recipe(VIT), IMAGES, None).model,
        "timm": build_model(recipe(TIMM), IMAGES, None).model,
        "bert": build_model(recipe(BERT, "masked_lm"), TOKENS, None).model,
    }
    for name, model in built.items():
        model.save_pretrained(tmp_path / name)
    return {name: (tmp_path / name, state_of(model)) for name, model in built.items()}


FIVE = dataclasses.replace(IMAGES, labels=tuple("abcde"), num_outputs=5)


@pytest.mark.parametrize(
    ("parent", "objective", "demands", "head"),
    [
        ("vit", "image_classification", FIVE, {}),
        ("vit", "image_classification", FIVE, {"type": "mlp", "hidden": [12]}),
        ("timm", "image_classification", FIVE, {}),
        ("timm", "image_classification", FIVE, {"type": "mlp", "hidden": [12]}),
        ("bert", "sequence_classification", TEXTS, {}),
        ("bert", "sequence_classification", TEXTS, {"type": "mlp", "hidden": [12, 8]}),
    ],
)
def test_a_child_has_its_parents_trunk_and_a_fresh_head(parents, parent, objective, demands, head):
    folder, source = parents[parent]
    built = build_model(recipe({"head": head}, objective, parent=str(folder), seed=5), demands, folder)
    child = built.model.state_dict()
    loaded = 0
    for name in trunk_names(built.model):
        own = name.removeprefix("inner.")
        if own in source:
            torch.testing.assert_close(child[name], source[own], rtol=0, atol=0)
            loaded += 1
        else:
            assert ".pooler." in name  # a language model has none
    assert built.loading["loaded"] == loaded > 0
    assert built.loading["head"] == "fresh"
    assert built.model.config.num_labels == len(demands.labels)


def test_a_reused_head_comes_from_the_parent(parents):
    folder, source = parents["vit"]
    built = build_model(recipe({"head": {"reuse": True}}, parent=str(folder), seed=5), IMAGES, folder)
    assert changed(state_of(built.model), source) == set()
    assert built.loading["head"] == "parent"
    with pytest.raises(ModelError, match="does not fit"):
        build_model(recipe({"head": {"reuse": True}}, parent=str(folder)), FIVE, folder)


def test_a_child_of_a_child_with_a_multi_layer_head(parents, tmp_path):
    folder, source = parents["vit"]
    child = build_model(recipe({"head": {"type": "mlp", "hidden": [12]}}, parent=str(folder)), FIVE, folder).model
    child.save_pretrained(tmp_path / "child")
    grandchild = build_model(recipe({}, parent="child"), IMAGES, tmp_path / "child").model
    assert changed(state_of(grandchild), source) <= set(head_names(grandchild))


def test_a_frozen_encoder_trains_its_head_alone(parents):
    folder, _ = parents["vit"]
    model = build_model(recipe({"freeze_encoder": True}, parent=str(folder)), FIVE, folder).model
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(head_names(model))


def test_an_adapter_saves_what_the_parent_lacks(parents, tmp_path):
    folder, _ = parents["bert"]
    adapter = {"rank": 2, "target_modules": ["query", "value"]}
    model = build_model(
        recipe({"adapter": adapter}, "sequence_classification", parent=str(folder)), TEXTS, folder
    ).model
    model.save_pretrained(tmp_path / "adapter")
    saved = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any("classifier" in name for name in saved)
    assert any("pooler" in name for name in saved)
    assert not any("word_embeddings" in name for name in saved)


def broken(folder, kind):
    path = folder / "model.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("query.weight"))
        tensors[name][0, 0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["truncated", "nan"])
def test_damaged_parents_are_refused(parents, kind):
    folder, _ = parents["vit"]
    broken(folder, kind)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        build_model(recipe({}, parent=str(folder)), IMAGES, folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "vitt"}, "did you mean 'vit'"),
        ({"type": "vit", "config": {"hiden_size": 16}}, "did you mean 'hidden_size'"),
        (
            {"type": "vit", "config": {"hidden_act": "gleu"}},
            "vit cannot be built for image_classification: KeyError .gleu",
        ),
        ({"type": "timm", "config": {"architecture": "resnet10x"}}, "did you mean 'resnet10t'"),
        ({"type": "bert"}, "cannot be built for image_classification"),
    ],
)
def test_impossible_models_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        build_model(recipe(model), IMAGES, None)


def test_a_parent_of_another_architecture_is_refused(parents):
    folder, _ = parents["vit"]
    with pytest.raises(ModelError, match="model.type is 'bert', but the parent"):
        build_model(recipe({"type": "bert"}, "sequence_classification", parent=str(folder)), TEXTS, folder)
    wider = {"config": {"hidden_size": 32}}
    with pytest.raises(ModelError, match="does not fit the model"):
        build_model(recipe(wider, parent=str(folder)), IMAGES, folder)
