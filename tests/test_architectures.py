"""Any architecture: two members of a class merge into what that class loads, with every tensor right.

The table below belongs to these tests alone; the library reads names and parts off the models themselves.
"""

import ast
import copy
import functools
from pathlib import Path

import pytest
import torch
import transformers

from hf_zoo import AutoMergedModel
from hf_zoo.heads import head_names
from hf_zoo.merging import run_merge
from hf_zoo.population import Manifest
from hf_zoo.recipe.schema import MergeRecipe

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = {**TOKENS, **BODY, "max_position_embeddings": 24}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**GROUPED, "moe_intermediate_size": 12, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
VISION = {**BODY, **IMAGE}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 1}
THREE = {"num_labels": 3}
DISTIL = {"vocab_size": 40, "max_position_embeddings": 24, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2}
GPT2 = {**TOKENS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {**TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
SEQ2SEQ = {
    **TOKENS,
    **dict.fromkeys(["encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"], 2),
    "d_model": 16,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 24,
    "decoder_start_token_id": 2,
}
AUDIO = {
    **BODY,
    "vocab_size": 40,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 1,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
SEGFORMER = {
    "num_channels": 1,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
EFFICIENT = {
    "image_size": 8,
    "num_channels": 1,
    "width_coefficient": 0.2,
    "hidden_dim": 16,
    "kernel_sizes": [3, 3],
    "in_channels": [16, 16],
    "out_channels": [16, 16],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
}
PAIR = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
BERT_PAIR = {
    "encoder": {"model_type": "bert", **TEXT},
    "decoder": {"model_type": "bert", **TEXT, "is_decoder": True, "add_cross_attention": True},
}
CAPTION = {
    "encoder": {"model_type": "vit", **VISION},
    "decoder": {"model_type": "gpt2", **GPT2, "add_cross_attention": True},
}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}

ARCHITECTURES = {
    "BertModel": TEXT,
    "BertForMaskedLM": TEXT,
    "BertForPreTraining": TEXT,
    "BertForQuestionAnswering": TEXT,
    "BertForSequenceClassification": TEXT | THREE,
    "BertForTokenClassification": TEXT | THREE,
    "BertForMultipleChoice": TEXT,
    "BertLMHeadModel": TEXT | {"is_decoder": True},
    "RobertaModel": TEXT,
    "RobertaForMaskedLM": TEXT,
    "RobertaForSequenceClassification": TEXT | THREE,
    "XLMRobertaForTokenClassification": TEXT | THREE,
    "ElectraForPreTraining": TEXT | {"embedding_size": 12},
    "ElectraForMaskedLM": TEXT | {"embedding_size": 12},
    "ElectraForSequenceClassification": TEXT | THREE,
    "AlbertForMaskedLM": TEXT | {"embedding_size": 12},
    "AlbertForPreTraining": TEXT | {"embedding_size": 12},
    "DebertaForMaskedLM": TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2ForSequenceClassification": TEXT | THREE | {"relative_attention": True},
    "DebertaV2ForMaskedLM": TEXT | {"relative_attention": True, "legacy": False},
    "MPNetForMaskedLM": TEXT,
    "ModernBertForMaskedLM": TEXT,
    "ModernBertForSequenceClassification": TEXT | THREE,
    "DistilBertForMaskedLM": DISTIL,
    "DistilBertForSequenceClassification": DISTIL | THREE,
    "GPT2Model": GPT2,
    "GPT2LMHeadModel": GPT2,
    "GPT2ForSequenceClassification": GPT2 | THREE,
    "GPTNeoForCausalLM": TOKENS
    | {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": TEXT,
    "OPTForCausalLM": TEXT | {"ffn_dim": 20, "word_embed_proj_dim": 12},
    "LlamaForCausalLM": GROUPED,
    "LlamaForSequenceClassification": GROUPED | THREE,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": GROUPED,
    "Gemma3ForConditionalGeneration": {"text_config": GROUPED, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Olmo2ForCausalLM": GROUPED,
    "Phi3ForCausalLM": GROUPED,
    "SmolLM3ForCausalLM": GROUPED,
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": EXPERTS,
    "MambaForCausalLM": TEXT | {"state_size": 4, "expand": 2, "conv_kernel": 2},
    "T5Model": T5,
    "T5EncoderModel": T5,
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": SEQ2SEQ,
    "BartForSequenceClassification": SEQ2SEQ | THREE,
    "BartForCausalLM": SEQ2SEQ,
    "MarianMTModel": SEQ2SEQ | {"decoder_vocab_size": 40},
    "WhisperForConditionalGeneration": WHISPER,
    "WhisperForAudioClassification": WHISPER | THREE,
    "Wav2Vec2ForCTC": AUDIO,
    "Wav2Vec2ForSequenceClassification": AUDIO | THREE,
    "ViTModel": VISION,
    "ViTForImageClassification": VISION | THREE,
    "ViTForMaskedImageModeling": VISION | {"encoder_stride": 4},
    "ViTMAEForPreTraining": VISION
    | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    | {"decoder_intermediate_size": 20},
    "BeitForImageClassification": VISION | THREE | {"use_relative_position_bias": True},
    "BeitForMaskedImageModeling": VISION | {"vocab_size": 40, "use_mask_token": True},
    "Dinov2ForImageClassification": VISION | THREE,
    "DeiTForImageClassification": VISION | THREE,
    "DeiTForImageClassificationWithTeacher": VISION | THREE,
    "SwinForImageClassification": SWIN | THREE,
    "ConvNextForImageClassification": STAGES | THREE | {"num_stages": 2},
    "ResNetForImageClassification": STAGES | THREE | {"embedding_size": 8, "layer_type": "basic"},
    "MobileNetV2ForImageClassification": THREE | {"image_size": 8, "num_channels": 1, "depth_multiplier": 0.1},
    "EfficientNetForImageClassification": EFFICIENT | THREE,
    "SegformerForSemanticSegmentation": SEGFORMER | THREE,
    "SegformerForImageClassification": SEGFORMER | THREE,
    "CLIPModel": PAIR,
    "CLIPVisionModel": VISION,
    "CLIPForImageClassification": PAIR | THREE,
    "SiglipModel": PAIR,
    "SiglipForImageClassification": PAIR | THREE,
    "TimesformerForVideoClassification": VISION | THREE | {"num_frames": 2},
    "TimmWrapperForImageClassification": {"architecture": "resnet10t", "model_args": {"in_chans": 1}} | THREE,
    "VisionEncoderDecoderModel": CAPTION,
    "EncoderDecoderModel": BERT_PAIR,
}
# The trunk is what AutoModel loads, but where that would draw a part anew, or there is none.
OTHER_TRUNKS = {
    "T5EncoderModel": "T5EncoderModel",
    "CLIPForImageClassification": "CLIPVisionModel",
    "SiglipForImageClassification": "SiglipVisionModel",
    "VisionEncoderDecoderModel": "VisionEncoderDecoderModel",
    "EncoderDecoderModel": "EncoderDecoderModel",
}
# Merged by mergekit 0.1.5 into something their class does not load, or not with these weights.
NOT_BY_MERGEKIT = """
    BertModel BertForMaskedLM BertForPreTraining BertForQuestionAnswering RobertaModel GPTNeoXForCausalLM
    T5ForConditionalGeneration WhisperForConditionalGeneration Wav2Vec2ForCTC ViTForImageClassification
    BeitForImageClassification Dinov2ForImageClassification ConvNextForImageClassification ResNetForImageClassification
    MobileNetV2ForImageClassification EfficientNetForImageClassification SegformerForSemanticSegmentation CLIPModel
    VisionEncoderDecoderModel
""".split()
LABELLED = [name for name, fields in ARCHITECTURES.items() if "num_labels" in fields]
PACKAGE = Path(__file__).parent.parent / "hf_zoo"
FLOAT32_ROUNDING = {"rtol": torch.finfo(torch.float32).eps, "atol": 0}  # two members: one sum and one halving


def build(name, seed, **fields):
    """Return a tiny model of a class with every tensor that is saved drawn by the seed, buffers too."""
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**copy.deepcopy(ARCHITECTURES[name] | fields))).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key in (model._keys_to_ignore_on_save or ()):
                continue  # computed, such as sine positions
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
            elif key.endswith("num_batches_tracked"):
                tensor.fill_(100 + seed)
    return model


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Two saved members of a class and the models they were saved from, made once a class."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        models = [build(name, seed) for seed in (1, 2)]
        for seed, model in enumerate(models):
            model.save_pretrained(folder / str(seed))
        return [str(folder / str(seed)) for seed in range(2)], models

    return made


def ties(model):
    """Return the groups of names that share memory."""
    groups = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def check_mean(merged, models, absent=()):
    """Every tensor is the mean of the two models', integers the first's; those `absent` from them are passed over."""
    first, second = (model.state_dict() for model in models)
    found = {name: tensor for name, tensor in merged.state_dict().items() if name not in absent}
    assert len(found) > 10
    for name, tensor in found.items():
        wanted = first[name]
        if wanted.is_floating_point():
            wanted = ((first[name].double() + second[name].double()) / 2).to(wanted.dtype)
        assert tensor.dtype == wanted.dtype
        torch.testing.assert_close(tensor, wanted, **FLOAT32_ROUNDING, msg=lambda text, name=name: f"{name}: {text}")


def test_the_table_holds_what_it_promises():
    assert len(ARCHITECTURES) >= 56
    assert len(NOT_BY_MERGEKIT) == 19
    assert set(NOT_BY_MERGEKIT) <= set(ARCHITECTURES)


def test_the_library_names_none_of_them():
    said = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, field, None) for field in ("id", "attr", "name", "value")]
            said |= {name: path.name for name in names if isinstance(name, str)}
    assert len(said) > 1000
    assert not {name: said[name] for name in ARCHITECTURES if name in said}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merge_on_disk_loads_in_the_stock_class(name, members, tmp_path):
    folders, models = members(name)
    recipe = MergeRecipe(name="merge", members=tuple(folders), output=str(tmp_path), evaluate=False)
    outcome = run_merge(recipe)
    merged, info = getattr(transformers, name).from_pretrained(outcome.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert set(merged.state_dict()) == set(models[0].state_dict())
    check_mean(merged, models)
    assert ties(merged) == ties(models[0])
    assert outcome.manifest.architecture == name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merge_in_memory_has_the_same_weights(name, members):
    folders, models = members(name)
    merged = AutoMergedModel.from_pretrained(folders)
    assert type(merged) is type(models[0])
    assert not merged.training
    check_mean(merged, models)
    assert ties(merged) == ties(models[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_trunk_alone_is_the_mean_of_the_trunks(name, members):
    folders, models = members(name)
    trunk = AutoMergedModel.from_pretrained(folders, auto_class="AutoModel")
    stock_class = getattr(transformers, OTHER_TRUNKS.get(name, "AutoModel"))
    loaded = [stock_class.from_pretrained(folder, output_loading_info=True) for folder in folders]
    stock = [model for model, _ in loaded]
    assert type(trunk) is type(stock[0])
    check_mean(trunk, stock, absent=loaded[0][1]["missing_keys"])
    if type(trunk) is type(models[0]):
        check_mean(trunk, models)


@pytest.mark.parametrize("name", LABELLED)
def test_two_tasks_share_a_trunk_and_keep_their_heads(name, tmp_path):
    # Not two labels: BART's config does not write them, and a BART saved with two does not load.
    models = {f"task-{count}": build(name, count, num_labels=count) for count in (3, 4)}
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
        Manifest(name=task, task=task, status="finished").write(tmp_path / task)
    folders = tuple(str(tmp_path / task) for task in models)
    outcome = run_merge(MergeRecipe(name="merge", members=folders, output=str(tmp_path), evaluate=False))
    trunk_class = getattr(transformers, outcome.manifest.architecture)
    trunk, info = trunk_class.from_pretrained(outcome.folder, output_loading_info=True)
    absent = info.pop("missing_keys")
    assert not any(info.values()), info
    stock = [trunk_class.from_pretrained(folder, output_loading_info=True) for folder in folders]
    assert absent == stock[0][1]["missing_keys"]
    check_mean(trunk, [model for model, _ in stock], absent)
    for task, member in models.items():
        model, info = type(member).from_pretrained(outcome.folder, subfolder=task, output_loading_info=True)
        assert not any(info.values()), info
        prefix = next((f"{part}." for part, module in model.named_modules() if type(module) is trunk_class), "")
        inside = {prefix + key: tensor for key, tensor in trunk.state_dict().items() if key not in absent}
        wanted = {key: inside.get(key, tensor) for key, tensor in member.state_dict().items()}
        assert head_names(member) == [key for key in wanted if key not in inside] != []
        torch.testing.assert_close(dict(model.state_dict()), wanted, rtol=0, atol=0)
