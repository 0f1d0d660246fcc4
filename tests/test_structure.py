"""Trunk and head of many families, with no table of architectures: every name is that of the file on disk."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import ModelError
from hf_zoo.heads import head_names, trunk_names
from hf_zoo.structure import Structure, class_of

TEXT = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}
DISTIL = {"vocab_size": 40, "max_position_embeddings": 24, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2}
LLAMA = {**BODY, "vocab_size": 40, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TIMM = {"architecture": "resnet10t", "num_labels": 3, "model_args": {"in_chans": 1}}
POOLER = ["pooler.dense.weight", "pooler.dense.bias"]
CLASSIFIER = ["classifier.weight", "classifier.bias"]

# class, model type, config, tensors of its head on disk, what a bare trunk has besides
FAMILIES = [
    ("BertForSequenceClassification", "bert", TEXT | BODY, CLASSIFIER, []),
    (
        "BertForMaskedLM",
        "bert",
        TEXT | BODY,
        ["cls.predictions.bias"]
        + [
            f"cls.predictions.transform.{part}.{kind}"
            for part in ("dense", "LayerNorm")
            for kind in ("weight", "bias")
        ],
        POOLER,
    ),
    (
        "RobertaForSequenceClassification",
        "roberta",
        TEXT | BODY,
        [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")],
        POOLER,
    ),
    (
        "DistilBertForSequenceClassification",
        "distilbert",
        DISTIL,
        [f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")],
        [],
    ),
    ("ViTForImageClassification", "vit", BODY | VISION, CLASSIFIER, POOLER),
    ("DeiTForImageClassification", "deit", BODY | VISION, CLASSIFIER, POOLER),
    ("Dinov2ForImageClassification", "dinov2", BODY | VISION, CLASSIFIER, []),
    ("SwinForImageClassification", "swin", SWIN, CLASSIFIER, []),
    ("ResNetForImageClassification", "resnet", RESNET, ["classifier.1.weight", "classifier.1.bias"], []),
    ("GPT2ForSequenceClassification", "gpt2", GPT2, ["score.weight"], []),
    ("GPT2LMHeadModel", "gpt2", GPT2, [], []),
    ("LlamaForCausalLM", "llama", LLAMA, ["lm_head.weight"], []),
    (
        "TimmWrapperForImageClassification",
        "timm_wrapper",
        TIMM,
        ["timm_model.fc.weight", "timm_model.fc.bias"],
        [],
    ),
]


def save_model(folder, architecture, model_type, fields):
    config = transformers.AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("architecture", "model_type", "fields", "head", "absent"), FAMILIES, ids=[family[0] for family in FAMILIES]
)
def test_trunk_and_head_make_up_the_file_and_the_trunk_loads_alone(
    tmp_path, architecture, model_type, fields, head, absent
):
    model = save_model(tmp_path / "model", architecture, model_type, fields)
    structure = Structure.read(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    assert sorted(structure.head) == sorted(head)
    assert set(structure.trunk) | set(structure.head) == on_disk
    assert not set(structure.trunk) & set(structure.head)
    assert sorted(structure.absent) == sorted(absent)
    assert structure.architecture == architecture
    assert getattr(transformers, structure.auto_class).from_pretrained(tmp_path / "model").__class__ is type(model)

    reader = CheckpointReader.open(tmp_path / "model")
    (tmp_path / "trunk").mkdir()
    structure.trunk_config.save_pretrained(tmp_path / "trunk")
    tensors = {alone: reader[name] for name, alone in structure.trunk.items()}
    save_file(tensors, tmp_path / "trunk" / "model.safetensors", metadata={"format": "pt"})
    trunk, info = transformers.AutoModel.from_pretrained(tmp_path / "trunk", output_loading_info=True)
    assert type(trunk).__name__ == structure.trunk_architecture
    assert sorted(info["missing_keys"]) == sorted(absent)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    wanted = model.state_dict()
    prefix = "" if model_type == "timm_wrapper" else f"{model.base_model_prefix}."
    for name, tensor in trunk.state_dict().items():
        if name not in absent:
            torch.testing.assert_close(tensor, wanted[prefix + name], rtol=0, atol=0)


def test_names_in_memory_split_a_tied_model(tmp_path):
    model = save_model(tmp_path, "GPT2LMHeadModel", "gpt2", GPT2)
    assert head_names(model) == ["lm_head.weight"]
    assert len(trunk_names(model)) == len(model.state_dict()) - 1
    timm = save_model(tmp_path, "TimmWrapperForImageClassification", "timm_wrapper", TIMM)
    assert head_names(timm) == ["timm_model.fc.weight", "timm_model.fc.bias"]


def test_a_trunk_alone_has_no_head(tmp_path):
    save_model(tmp_path, "ViTModel", "vit", BODY | VISION)
    structure = Structure.read(tmp_path)
    assert structure.head == ()
    assert structure.auto_class == "AutoModel"
    assert all(name == alone for name, alone in structure.trunk.items())


@pytest.mark.parametrize("model_type", ["vit", "bert"])
def test_a_perceptron_head_of_ours_is_told_apart(tmp_path, model_type):
    from hf_zoo.models import mlp_head

    fields = {"vit": BODY | VISION, "bert": TEXT | BODY}[model_type]
    name = {"vit": "MlpHeadForImageClassification", "bert": "MlpHeadForSequenceClassification"}[model_type]
    config = mlp_head.MlpHeadConfig(classifier={"model_type": model_type} | fields, hidden=[6], num_labels=3)
    getattr(mlp_head, name)(config).save_pretrained(tmp_path)
    structure = Structure.read(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    assert set(structure.trunk) | set(structure.head) == on_disk
    assert len(structure.head) == 4
    assert all(head.startswith("inner.classifier.") for head in structure.head)
    assert structure.trunk_architecture == {"vit": "ViTModel", "bert": "BertModel"}[model_type]
    assert all(
        alone.startswith(("embeddings.", "encoder.", "layernorm.", "pooler.", "layers."))
        for alone in structure.trunk.values()
    )


def test_the_trunk_config_carries_no_labels(tmp_path):
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    save_model(tmp_path / "model", "BertForSequenceClassification", "bert", TEXT | BODY | labels)
    Structure.read(tmp_path / "model").trunk_config.save_pretrained(tmp_path / "trunk")
    content = json.loads((tmp_path / "trunk" / "config.json").read_text())
    assert content["architectures"] == ["BertModel"]
    assert "id2label" not in content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ('{"model_type": "bert"}', "`architectures` is missing"),
        (
            '{"model_type": "bert", "architectures": ["BertForMaskedLN"]}',
            r"class 'BertForMaskedLN' is not in transformers \(did you mean 'BertForMaskedLM'\?\)",
        ),
        (
            '{"model_type": "x", "architectures": ["X"], "auto_map": {"AutoConfig": "evil.XConfig"}}',
            r"code of its own \(evil\.XConfig\), which is not executed",
        ),
    ],
)
def test_a_class_that_is_not_known_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        class_of(tmp_path)
