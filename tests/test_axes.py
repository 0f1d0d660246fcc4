"""Axes of tokens and classes, and stacks of blocks, of many families, with no table of architectures."""

import copy

import pytest
import torch
import transformers

from hf_zoo.axes import (
    BlockStack,
    SavedModel,
    block_stacks,
    depth_fractions,
    label_axes,
    resized_stack,
    shapes_on_disk,
    vocabulary_axes,
)
from hf_zoo.configs import changed_config, changed_content
from hf_zoo.errors import ModelError

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = {**TOKENS, **BODY, "max_position_embeddings": 24}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
VISION = {**BODY, "image_size": 8, "patch_size": 4, "num_channels": 1}
SEQ2SEQ = {
    **TOKENS,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "d_model": 16,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 24,
    "decoder_start_token_id": 2,
}
AUDIO = {
    **BODY,
    "vocab_size": 40,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [3, 3, 3],
    "conv_stride": [2, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
GPT_NEO = {
    **TOKENS,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 1,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 2,
}


def model_of(name, fields):
    model_class = getattr(transformers, name)
    return model_class, model_class.config_class(**copy.deepcopy(fields))


VOCABULARIES = [
    ("BertForSequenceClassification", TEXT, ["vocab_size"], {("bert.embeddings.word_embeddings.weight", 0)}),
    ("LlamaForCausalLM", GROUPED, ["vocab_size"], {("model.embed_tokens.weight", 0), ("lm_head.weight", 0)}),
    ("GPT2Model", {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2}, ["vocab_size"], {("wte.weight", 0)}),
    (
        "BartForConditionalGeneration",
        SEQ2SEQ,
        ["vocab_size"],
        {
            ("final_logits_bias", 1),  # a row vector: tokens along its second axis
            ("lm_head.weight", 0),
            ("model.shared.weight", 0),
            ("model.encoder.embed_tokens.weight", 0),
            ("model.decoder.embed_tokens.weight", 0),
        },
    ),
    (
        "MarianMTModel",
        SEQ2SEQ | {"decoder_vocab_size": 40},
        ["vocab_size", "decoder_vocab_size"],
        {
            ("final_logits_bias", 1),
            ("lm_head.weight", 0),
            ("model.shared.weight", 0),
            ("model.encoder.embed_tokens.weight", 0),
            ("model.decoder.embed_tokens.weight", 0),
        },
    ),
    (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
        ["text_config.vocab_size"],
        {("text_model.embeddings.token_embedding.weight", 0)},
    ),
    ("ViTModel", VISION, [], set()),
]


@pytest.mark.parametrize(("name", "fields", "keys", "axes"), VOCABULARIES, ids=[row[0] for row in VOCABULARIES])
def test_axes_of_tokens(name, fields, keys, axes):
    found = vocabulary_axes(*model_of(name, fields))
    assert list(found.keys) == keys
    assert found.size == (40 if keys else 0)
    assert {(axis.tensor, axis.dim) for axis in found.axes} == axes
    assert all(axis.size == 40 for axis in found.axes)


def test_a_type_of_token_is_no_token():
    assert not any("token_type" in axis.tensor for axis in vocabulary_axes(*model_of("BertModel", TEXT)).axes)


def test_vocabularies_of_two_sizes_are_refused():
    bert = {"model_type": "bert", **TEXT}
    fields = {"encoder": bert, "decoder": {**bert, "vocab_size": 50, "is_decoder": True, "add_cross_attention": True}}
    model_class, config = model_of("EncoderDecoderModel", fields)
    found = vocabulary_axes(model_class, config)
    # The text that is written decides, and its encoder's tokens are others.
    assert found.keys == ("decoder.vocab_size",)
    assert not any(axis.tensor.startswith("encoder") for axis in found.axes)
    pair = {"text_encoder": {"model_type": "t5", "vocab_size": 30}, "audio_encoder": {"model_type": "encodec"}}
    pair |= {"decoder": {"model_type": "musicgen_decoder", "vocab_size": 20}}
    config = transformers.MusicgenConfig(**pair)
    config.get_text_config = lambda *_, **__: (_ for _ in ()).throw(ValueError("several"))
    with pytest.raises(
        ModelError, match=r"several vocabularies \(text_encoder.vocab_size: 30, decoder.vocab_size: 20\)"
    ):
        vocabulary_axes(transformers.MusicgenForConditionalGeneration, config)


LABELS = [
    ("BertForSequenceClassification", TEXT, {"classifier.weight", "classifier.bias"}),
    ("RobertaForSequenceClassification", TEXT, {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
    ("LlamaForSequenceClassification", GROUPED, {"score.weight"}),
    ("ViTForImageClassification", VISION, {"classifier.weight", "classifier.bias"}),
    ("BertForMaskedLM", TEXT, set()),
]


@pytest.mark.parametrize(("name", "fields", "tensors"), LABELS, ids=[row[0] for row in LABELS])
def test_axes_of_classes(name, fields, tensors):
    found = label_axes(*model_of(name, fields | {"num_labels": 3}))
    assert {(axis.tensor, axis.dim, axis.size) for axis in found} == {(tensor, 0, 3) for tensor in tensors}


# class, config, key -> prefixes and lists
STACKS = [
    ("BertForMaskedLM", TEXT, {"num_hidden_layers": (["bert.encoder.layer."], [])}),
    ("GPT2LMHeadModel", {**TOKENS, "n_embd": 16, "n_layer": 3, "n_head": 2}, {"n_layer": (["transformer.h."], [])}),
    ("Qwen3ForCausalLM", GROUPED, {"num_hidden_layers": (["model.layers."], ["layer_types"])}),
    ("SmolLM3ForCausalLM", GROUPED, {"num_hidden_layers": (["model.layers."], ["no_rope_layers", "layer_types"])}),
    ("GPTNeoForCausalLM", GPT_NEO, {"num_layers": (["transformer.h."], ["attention_layers"])}),
    ("ViTForImageClassification", VISION, {"num_hidden_layers": (["vit.encoder.layer."], [])}),
    (
        "XLMForSequenceClassification",
        {"vocab_size": 40, "emb_dim": 16, "n_layers": 3, "n_heads": 2},
        {
            "n_layers": (
                [f"transformer.{part}." for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")],
                [],
            )
        },
    ),
    (
        "BartForConditionalGeneration",
        SEQ2SEQ,
        {"encoder_layers": (["model.encoder.layers."], []), "decoder_layers": (["model.decoder.layers."], [])},
    ),
    (
        "T5ForConditionalGeneration",
        {**TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 3, "num_heads": 2, "num_decoder_layers": 2},
        {"num_layers": (["encoder.block."], []), "num_decoder_layers": (["decoder.block."], [])},
    ),
    (
        # Both stacks are as deep as the convolutions, whose lists are as long as the layers.
        "Wav2Vec2ForCTC",
        AUDIO,
        {
            "num_hidden_layers": (["wav2vec2.encoder.layers."], []),
            "num_feat_extract_layers": (
                ["wav2vec2.feature_extractor.conv_layers."],
                ["conv_dim", "conv_stride", "conv_kernel"],
            ),
        },
    ),
    (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
        {
            "text_config.num_hidden_layers": (["text_model.encoder.layers."], []),
            "vision_config.num_hidden_layers": (["vision_model.encoder.layers."], []),
        },
    ),
    # Experts are numbered too, and as many as there are layers.
    (
        "MixtralForCausalLM",
        GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 1},
        {"num_hidden_layers": (["model.layers."], [])},
    ),
    ("SwinForImageClassification", SWIN, {}),
]


@pytest.mark.parametrize(("name", "fields", "wanted"), STACKS, ids=[row[0] for row in STACKS])
def test_stacks_of_blocks(name, fields, wanted):
    model_class, config = model_of(name, fields)
    stacks = block_stacks(model_class, config)
    found = {stack.key: (sorted(stack.prefixes), list(stack.lists)) for stack in stacks}
    assert found == {key: (sorted(prefixes), lists) for key, (prefixes, lists) in wanted.items()}
    assert all(stack.size == (2 if stack.key == "num_decoder_layers" else 3) for stack in stacks)


def test_one_block_is_a_stack_too():
    (stack,) = block_stacks(*model_of("BertModel", TEXT | {"num_hidden_layers": 1}))
    assert (stack.key, stack.size, stack.prefixes) == ("num_hidden_layers", 1, ("encoder.layer.",))


def test_names_are_those_on_disk(tmp_path):
    """transformers saves ViT under older names than its modules have."""
    model_class, config = model_of("ViTForImageClassification", VISION)
    model_class(config).save_pretrained(tmp_path)
    saved = SavedModel.open(tmp_path, "org/vit")
    assert (saved.source, saved.model_class, saved.folder) == ("org/vit", model_class, tmp_path)
    assert saved.config.num_hidden_layers == config.num_hidden_layers == 3
    reader = saved.reader
    shapes = shapes_on_disk(model_class, config)
    assert {name: reader.shape(name) for name in reader} == shapes
    (stack,) = block_stacks(model_class, config)
    blocks = {place[1] for name in reader if (place := stack.place(name))}
    assert blocks == {0, 1, 2}


def test_a_change_of_depth_goes_through_every_list():
    model_class, config = model_of("GPTNeoForCausalLM", GPT_NEO)
    (stack,) = block_stacks(model_class, config)
    # global, local, local
    changes = resized_stack(config, stack, [(config, number) for number in (0, 1, 1, 2, 0)])
    assert changes == {
        "num_layers": 5,
        "attention_layers": ["global", "local", "local", "local", "global"],
        "attention_types": [[["global", "local", "local", "local", "global"], 1]],
    }
    loaded = transformers.GPTNeoConfig.from_dict(changed_config(config, changes).to_dict())
    assert loaded.attention_layers == changes["attention_layers"]
    assert changed_config(config, {}).num_layers == 3


def test_numbers_of_blocks_follow_their_blocks():
    fields = GROUPED | {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [1],
    }
    model_class, config = model_of("Qwen3MoeForCausalLM", fields)
    (stack,) = block_stacks(model_class, config)
    changes = resized_stack(config, stack, [(config, number) for number in (0, 1, 1, 2)])
    assert changes["mlp_only_layers"] == [1, 2]
    shapes = shapes_on_disk(model_class, changed_config(config, changes))
    dense = {place[1] for name in shapes if (place := stack.place(name)) and place[2] == "mlp.up_proj.weight"}
    assert dense == {1, 2}


def test_content_changes_under_every_name_a_value_has():
    config = transformers.BartConfig(encoder_layers=6)
    content = {"encoder_layers": 6, "num_hidden_layers": 6, "decoder_layers": 6}
    changed = changed_content(content, {"encoder_layers": 2}, config)
    assert changed == {"encoder_layers": 2, "num_hidden_layers": 2, "decoder_layers": 6}
    assert content["encoder_layers"] == 6
    nested = transformers.CLIPConfig()
    assert changed_content({}, {"text_config.vocab_size": 9}, nested) == {"text_config": {"vocab_size": 9}}


def test_how_deep_tensors_lie():
    stacks = [BlockStack("n", 5, ("model.layers.",))]
    names = ["embed.weight", "model.layers.0.w", "model.layers.3.mlp.1.w", "model.layers.4.w", "model.norm.weight"]
    assert list(depth_fractions(stacks, names).values()) == [0.0, 0.0, 0.75, 1.0, 0.0]
    assert depth_fractions([BlockStack("n", 1, ("h.",))], ["h.0.w"]) == {"h.0.w": 1.0}


def test_how_deep_tensors_lie_without_a_single_stack():
    names = list(shapes_on_disk(*model_of("SwinForImageClassification", SWIN)))
    fractions = depth_fractions([], names)
    at = {
        "swin.embeddings.patch_embeddings.projection.weight": 0.0,
        "swin.encoder.layers.0.blocks.0.layernorm_before.weight": 0.0,
        "swin.encoder.layers.0.downsample.reduction.weight": 1 / 3,
        "swin.encoder.layers.1.blocks.0.layernorm_before.weight": 2 / 3,
        "swin.encoder.layers.1.blocks.1.layernorm_before.weight": 1.0,
    }
    assert {name: fractions[name] for name in at} == pytest.approx(at)
    assert depth_fractions([], ["a.weight"]) == {"a.weight": 0.0}


def test_nothing_is_allocated():
    """A model that would not fit into memory is looked at as quickly as a small one."""
    fields = GROUPED | {"hidden_size": 16384, "intermediate_size": 65536, "vocab_size": 300_000}
    model_class, config = model_of("LlamaForCausalLM", fields)
    before = torch.get_default_device()
    axes = vocabulary_axes(model_class, config).axes
    assert {axis.size for axis in axes} == {300_000}
    assert torch.get_default_device() == before
