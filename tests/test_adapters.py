"""Adapters read as whole models, against what peft itself makes of them."""

import json

import pytest
import torch
import transformers

from hf_zoo import AutoMergedModel
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, ModelError
from hf_zoo.population import Manifest

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = BODY | {"vocab_size": 40, "max_position_embeddings": 24}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1,
        "pad_token_id": 0}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}
# class of the base, class of the adapted model, its fields, LoRA's settings
KINDS = {
    "bert": ("BertForMaskedLM", "BertForSequenceClassification", TEXT, {"target_modules": "all-linear"}),
    "bert-rslora": (
        "BertModel",
        "BertForSequenceClassification",
        TEXT,
        {"target_modules": ["query", "value"], "use_rslora": True, "rank_pattern": {"layer.0.attention.self.query": 4},
         "alpha_pattern": {"value": 16}},
    ),
    "bert-embedding": ("BertModel", "BertForSequenceClassification", TEXT,
                       {"target_modules": ["word_embeddings", "query"]}),
    "vit": (
        "ViTForImageClassification",
        "ViTForImageClassification",
        BODY | {"image_size": 8, "patch_size": 4, "num_channels": 1},
        {"target_modules": ["q_proj", "v_proj", "fc1"]},
    ),
    "gpt2": ("GPT2Model", "GPT2ForSequenceClassification", GPT2,
             {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "resnet": ("ResNetForImageClassification", "ResNetForImageClassification", RESNET,
               {"target_modules": ["convolution"]}),
}  # fmt: skip


def head_of(model):
    return "score" if hasattr(model, "score") else "classifier"


def save_adapter(folder, kind, seed=1, num_labels=3, fresh=()):
    """Save a base in `folder/base` and an adapter in `folder/SEED`; return the state dict peft makes of them."""
    from peft import LoraConfig, get_peft_model

    base_class, model_class, fields, settings = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind.partition("-")[0], **fields)
    torch.manual_seed(0)
    if not (folder / "base").exists():
        getattr(transformers, base_class)(config).save_pretrained(folder / "base")
    model = getattr(transformers, model_class).from_pretrained(
        folder / "base", num_labels=num_labels, ignore_mismatched_sizes=True
    )
    fresh = fresh or ([head_of(model), "pooler"] if base_class == "BertForMaskedLM" else [head_of(model)])
    torch.manual_seed(seed)
    excluded = rf".*({'|'.join(fresh)}).*"
    lora = LoraConfig(r=2, lora_alpha=8, modules_to_save=fresh, exclude_modules=excluded, **settings)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder / str(seed))
    Manifest(
        name=f"zoo-{seed}",
        status="finished",
        library="peft",
        architecture=model_class,
        dataset={"labels": ["a", "b", "c"][:num_labels]},
    ).write(folder / str(seed))
    return adapted.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_reads_as_the_model_peft_merges_it_to(tmp_path, kind):
    merged = save_adapter(tmp_path, kind)
    merged.save_pretrained(tmp_path / "oracle")
    oracle = CheckpointReader.open(tmp_path / "oracle")
    reader = CheckpointReader.open(tmp_path / "1", "org/adapter")
    assert set(reader) == set(oracle)
    for name in oracle:
        torch.testing.assert_close(reader[name], oracle[name])  # one float32 product and sum
        assert reader.shape(name) == oracle.shape(name)
        assert reader.dtype(name) == oracle.dtype(name)


def test_the_mean_of_adapters_is_that_of_their_weights(tmp_path):
    states = [save_adapter(tmp_path, "bert", seed).state_dict() for seed in (1, 2)]
    model = AutoMergedModel.from_pretrained([tmp_path / "1", tmp_path / "2"])
    assert type(model) is transformers.BertForSequenceClassification
    assert tuple(model.config.id2label.values()) == ("a", "b", "c")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_a_part_that_was_drawn_and_not_saved_is_named(tmp_path):
    save_adapter(tmp_path, "bert", fresh=["classifier"])  # a language model has no pooler
    with pytest.raises(CheckpointError, match=r"'bert\.pooler\.dense\.\w+' is neither in the adapter nor in its base"):
        CheckpointReader.open(tmp_path / "1")


def test_what_is_no_plain_lora_is_refused(tmp_path):
    save_adapter(tmp_path, "bert")
    path = tmp_path / "1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"org/a: an adapter of type LORA with use_dora; only plain LoRA"):
        CheckpointReader.open(tmp_path / "1", "org/a")


def test_a_base_that_is_gone_is_named(tmp_path):
    save_adapter(tmp_path, "bert")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"its base .*base is not there: move it back"):
        CheckpointReader.open(tmp_path / "1")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(tmp_path, "bert")
    config = transformers.BertConfig(**TEXT | {"hidden_size": 24})
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    reader = CheckpointReader.open(tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"the update is \[16, 16\], the weight \[24, 24\]"):
        reader["bert.encoder.layer.0.attention.self.query.weight"]
