"""Blocks of several models stacked into new ones, checked tensor by tensor and by what the stock class computes."""

import pytest
import torch
import transformers

from hf_zoo.axes import SavedModel, block_stacks
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.stacking import names_after_blocks, stack_blocks

BODY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = {
    **BODY,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
VISION = {**BODY, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
GPT_NEO = {"vocab_size": 40, "hidden_size": 16, "num_layers": 4, "num_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
           "attention_types": [[["global", "local"], 2]], "window_size": 2}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "d_model": 16, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
}  # fmt: skip
OPT = TEXT | {"ffn_dim": 20, "word_embed_proj_dim": 16}


def save(folder, name, fields, seed):
    model_class = getattr(transformers, name)
    config = model_class.config_class(**fields)
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return SavedModel(CheckpointReader.open(folder, folder.name), model_class, config, folder)


@pytest.fixture
def make(tmp_path):
    """Save models a, b, ... of one class and return them by name."""

    def made(name, fields, count=2, more=()):
        models = {letter: save(tmp_path / letter, name, fields, place) for place, letter in enumerate("abc"[:count])}
        return models | {letter: save(tmp_path / letter, name, own, 9) for letter, own in more}

    return made


def one(model, start, stop, **more):
    return {"sources": [{"model": model, "layer_range": [start, stop]}], **more}


# class, fields, prefix of blocks, tensors of the first slice's model, tensors of the last one's
FAMILIES = [
    ("LlamaForCausalLM", GROUPED, "model.layers.", ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]),
    ("BertForSequenceClassification", TEXT, "bert.encoder.layer.", ["bert.embeddings.LayerNorm.bias"],
     ["bert.pooler.dense.weight", "classifier.bias"]),
    ("ViTForImageClassification", VISION, "vit.encoder.layer.", ["vit.embeddings.cls_token"],
     ["vit.layernorm.weight", "classifier.weight"]),
    ("GPTNeoForCausalLM", GPT_NEO, "transformer.h.", ["transformer.wpe.weight"], ["transformer.ln_f.weight"]),
    # Its last norm is defined before its blocks: the order of calls tells.
    ("OPTForCausalLM", OPT, "model.decoder.layers.", ["model.decoder.embed_positions.weight"],
     ["model.decoder.final_layer_norm.weight"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "prefix", "head", "tail"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_blocks_follow_one_another_and_load(make, name, fields, prefix, head, tail):
    models = make(name, fields)
    stacked = stack_blocks([one("a", 0, 3), one("b", 1, 4)], models)
    (member,) = stacked.members
    assert stacked.base is None
    blocks = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    for new, (model, old) in enumerate(blocks):
        own = {n: t for n, t in models[model].reader.items() if n.startswith(f"{prefix}{old}.")}
        assert own
        for tensor_name, tensor in own.items():
            new_name = tensor_name.replace(f"{prefix}{old}.", f"{prefix}{new}.", 1)
            assert torch.equal(member[new_name], tensor)
            assert torch.equal(member.piece(new_name, 2, 6), tensor.reshape(-1)[2:6])
    for names, model in ((head, "a"), (tail, "b")):
        for outside in names:
            assert torch.equal(member[outside], models[model].reader[outside])
            assert not torch.equal(models["a"].reader[outside], models["b"].reader[outside])
    outside = [n for n in models["a"].reader if not n.startswith(prefix)]
    assert len(member) == len(outside) + sum(
        len([n for n in models[m].reader if n.startswith(f"{prefix}{o}.")]) for m, o in blocks
    )
    config = type(stacked.config).from_dict(stacked.config.to_dict())
    loaded, info = models["a"].model_class.from_pretrained(
        None, config=config, state_dict=dict(member), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert loaded.config.num_hidden_layers == 6


def test_a_stack_of_its_own_blocks_is_the_model_itself(make):
    models = make("LlamaForCausalLM", GROUPED, 1)
    stacked = stack_blocks([one("a", 0, 1), one("a", 1, 4)], models)
    assert {name: tensor.tolist() for name, tensor in stacked.members[0].items()} == {
        name: tensor.tolist() for name, tensor in models["a"].reader.items()
    }
    assert stacked.config.to_dict() == models["a"].config.to_dict()


def test_kinds_of_blocks_go_with_them(make):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    fields = GROUPED | {"layer_types": kinds, "sliding_window": 4, "use_sliding_window": True}
    models = make("Qwen3ForCausalLM", fields, 1, [("b", fields | {"layer_types": kinds[::-1]})])
    stacked = stack_blocks([one("a", 1, 3), one("b", 0, 1)], models)
    assert stacked.changes == {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }


def test_slices_of_two_sources_make_two_members(make):
    models = make("LlamaForCausalLM", GROUPED, 3)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [1, 4]}]},
        {"sources": [{"model": "b", "layer_range": [3, 4]}, {"model": "c", "layer_range": [0, 1]}]},
    ]
    stacked = stack_blocks(slices, models)
    first, second = stacked.members
    up = "mlp.up_proj.weight"
    for member, wanted in ((first, "a0 a1 a2 b3"), (second, "b1 b2 b3 c0")):
        for new, (model, old) in enumerate(wanted.split()):
            assert torch.equal(member[f"model.layers.{new}.{up}"], models[model].reader[f"model.layers.{old}.{up}"])
    assert torch.equal(first["model.embed_tokens.weight"], models["a"].reader["model.embed_tokens.weight"])
    assert torch.equal(second["model.embed_tokens.weight"], models["b"].reader["model.embed_tokens.weight"])
    assert torch.equal(first["lm_head.weight"], models["b"].reader["lm_head.weight"])
    assert torch.equal(second["lm_head.weight"], models["c"].reader["lm_head.weight"])
    assert first.layout == second.layout
    assert first.source == "a[0:3] + b[3:4]"
    # As mergekit counts: a gradient begins anew with each slice, and ends with its only block.
    assert stacked.positions["model.embed_tokens.weight"] == (0, 0.0)
    assert [stacked.positions[f"model.layers.{new}.{up}"] for new in range(4)] == [
        (0, 0.0),
        (0, 0.5),
        (0, 1.0),
        (1, 1.0),
    ]
    assert stacked.positions["model.norm.weight"] == stacked.positions["lm_head.weight"] == (1, 0.0)


def test_the_base_has_a_stack_of_its_own(make):
    models = make("LlamaForCausalLM", GROUPED, 3)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "c", "layer_range": [0, 2]}]},
        {"sources": [{"model": "c", "layer_range": [2, 4]}, {"model": "b", "layer_range": [2, 4]}]},
    ]
    stacked = stack_blocks(slices, models, base="c")
    (member,) = stacked.members
    assert dict(stacked.base).keys() == dict(models["c"].reader).keys()
    assert all(torch.equal(stacked.base[name], models["c"].reader[name]) for name in stacked.base)
    assert torch.equal(
        member["model.layers.1.mlp.up_proj.weight"], models["a"].reader["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(
        member["model.layers.2.mlp.up_proj.weight"], models["b"].reader["model.layers.2.mlp.up_proj.weight"]
    )
    with pytest.raises(MergeError, match=r"slices\[1\]: the base a is none of its sources"):
        stack_blocks(slices, models, base="a")
    swapped = stack_blocks([slices[0], {**slices[1], "base_model": "b"}], models, base="c")
    assert torch.equal(swapped.base["lm_head.weight"], models["b"].reader["lm_head.weight"])
    assert torch.equal(swapped.members[0]["lm_head.weight"], models["c"].reader["lm_head.weight"])


def test_one_of_two_stacks_is_named(make):
    models = make("BartForConditionalGeneration", SEQ2SEQ)
    with pytest.raises(
        MergeError, match="several stacks of blocks: say which with one of encoder_layers, decoder_layers"
    ):
        stack_blocks([one("a", 0, 2)], models)
    stacked = stack_blocks([one("a", 0, 2), one("b", 0, 2)], models, stack="decoder_layers")
    assert stacked.changes == {"decoder_layers": 4}
    (member,) = stacked.members
    name = "model.{}.layers.{}.fc1.weight"
    assert torch.equal(member[name.format("decoder", 3)], models["b"].reader[name.format("decoder", 1)])
    assert torch.equal(member[name.format("encoder", 2)], models["a"].reader[name.format("encoder", 2)])
    by_common_name = stack_blocks([one("a", 0, 1)], models, stack="num_hidden_layers")
    assert by_common_name.changes == {"encoder_layers": 1}
    with pytest.raises(MergeError, match=r"counted by 'decoder_layer' \(did you mean 'decoder_layers'\?\)"):
        stack_blocks([one("a", 0, 1)], models, stack="decoder_layer")


def test_what_comes_after_the_blocks_without_running_the_model():
    """Multiple choice wants an axis more than the inputs made here have: the order of definition is left."""
    config = transformers.BertConfig(**TEXT)
    model = SavedModel(CheckpointReader.of({}, "m"), transformers.BertForMultipleChoice, config)
    (stack,) = block_stacks(model.model_class, config)
    assert names_after_blocks(model, stack) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "there is none"),
        ([one("z", 0, 2)], r"slices\[0\].sources\[0\]: no model 'z'"),
        ([one("a", 0, 5)], r"layer_range \[0, 5\] of a, which has blocks 0 to 3"),
        ([one("a", 2, 2)], r"layer_range \[2, 2\] of a"),
        (
            [one("a", 0, 2), {"sources": [{"model": "a", "layer_range": 3}]}],
            r"slices\[1\].*expected \[first, behind the last\], got 3",
        ),
        ([{"source": []}], r"slices\[0\]: expected `sources`"),
        (
            [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]}],
            r"different numbers of blocks \(a 2, b 3\)",
        ),
        (
            [
                one("a", 0, 2),
                {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]},
            ],
            "as many sources to merge as the others, got 1, 2",
        ),
        ([one("a", 0, 2), one("wide", 0, 2)], "of another shape .* the models differ in width"),
    ],
)
def test_slices_that_cannot_be_stacked_are_refused(make, slices, message):
    models = make("LlamaForCausalLM", GROUPED, 2, [("wide", GROUPED | {"hidden_size": 32, "head_dim": 16})])
    with pytest.raises(MergeError, match=message):
        stack_blocks(slices, models)


def test_blocks_whose_kind_follows_from_their_number_are_refused(make):
    """Every second block of this model has experts, whatever block comes to stand there."""
    fields = GROUPED | {
        "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False,
    }  # fmt: skip
    models = make("JambaForCausalLM", fields, 1)
    even = stack_blocks([one("a", 0, 2), one("a", 2, 4), one("a", 0, 2)], models)
    assert even.changes["num_hidden_layers"] == 6
    with pytest.raises(MergeError, match="the kind of a block follows from its number"):
        stack_blocks([one("a", 0, 2), one("a", 1, 4)], models)


def test_models_of_stages_are_refused(make):
    fields = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
              "window_size": 2}  # fmt: skip
    models = make("SwinForImageClassification", fields, 1)
    with pytest.raises(MergeError, match="its config has no number that counts its blocks"):
        stack_blocks([one("a", 0, 1)], models)
