"""`AutoMergedModel`: merges on the fly and merges loaded back are stock models with the right weights."""

import json
import shutil

import pytest
import torch
import transformers

from hf_zoo import AutoMergedModel
from hf_zoo.errors import CheckpointError, MergeError, PopulationError, RecipeError
from hf_zoo.methods.average import Average
from hf_zoo.population import Manifest

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = BODY | {"vocab_size": 40, "max_position_embeddings": 24}
FAMILIES = {
    "bert": ("BertForSequenceClassification", TEXT),
    "vit": ("ViTForImageClassification", BODY | {"image_size": 8, "patch_size": 4, "num_channels": 1}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
    ),
}


def save_member(folder, family, seed, **fields):
    architecture, config = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(family, **config, **fields))
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture
def pair(tmp_path):
    """Two members of a family, their folders, and the plain mean of their state dicts."""

    def made(family, **fields):
        models = [save_member(tmp_path / f"{family}-{seed}", family, seed, **fields) for seed in (1, 2)]
        states = [model.state_dict() for model in models]
        mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
        return [tmp_path / f"{family}-{seed}" for seed in (1, 2)], mean

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_an_average_is_the_stock_model_of_the_mean(pair, family):
    folders, mean = pair(family)
    merged = AutoMergedModel.from_pretrained(folders)
    assert type(merged).__name__ == FAMILIES[family][0]
    assert not merged.training
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, mean[name])


def test_a_merge_saved_again_is_a_stock_repo(pair, tmp_path):
    folders, mean = pair("vit")
    AutoMergedModel.from_pretrained(folders).save_pretrained(tmp_path / "saved")
    loaded, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values())
    torch.testing.assert_close(
        loaded.state_dict()["vit.layers.0.attention.q_proj.weight"], mean["vit.layers.0.attention.q_proj.weight"]
    )


def test_hyper_parameters_and_the_method_s_own_from_pretrained(pair):
    folders, _ = pair("bert")
    first = transformers.BertForSequenceClassification.from_pretrained(folders[0]).state_dict()
    for merged in (
        AutoMergedModel.from_pretrained(folders, weights=[1.0, 0.0]),
        Average.from_pretrained(folders, weights=[1.0, 0.0]),
    ):
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, first[name])
    with pytest.raises(RecipeError, match=r"method 'average': 1 mistake\n  - parameters\.weight: unknown key"):
        AutoMergedModel.from_pretrained(folders, weight=[1.0, 0.0])


def test_a_greedy_soup_takes_a_score(pair):
    folders, _ = pair("bert")
    wanted = transformers.BertForSequenceClassification.from_pretrained(folders[1]).state_dict()

    def score(tensors):
        return -sum(float((tensors[name] - wanted[name]).square().sum()) for name in tensors)

    merged = AutoMergedModel.from_pretrained(folders, "greedy_soup", score=score)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    with pytest.raises(MergeError, match="greedy_soup needs a score on held-out data"):
        AutoMergedModel.from_pretrained(folders, "greedy_soup")


def test_trunks_of_different_heads_merge_alone(tmp_path):
    models = [save_member(tmp_path / f"{n}", "bert", n, num_labels=n) for n in (2, 3)]
    folders = [tmp_path / "2", tmp_path / "3"]
    with pytest.raises(MergeError, match=r"different classes .*merge the trunks alone \(`auto_class=\"AutoModel\"`\)"):
        AutoMergedModel.from_pretrained(folders)
    trunk = AutoMergedModel.from_pretrained(folders, auto_class="AutoModel")
    assert type(trunk) is transformers.BertModel
    states = [model.bert.state_dict() for model in models]
    for name, tensor in trunk.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_members_keep_or_change_their_type(pair):
    folders, _ = pair("bert")
    assert AutoMergedModel.from_pretrained(folders).dtype == torch.float32
    assert AutoMergedModel.from_pretrained(folders, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(MergeError, match=r"dtype 'bfloat15' \(did you mean 'bfloat16'\?\)"):
        AutoMergedModel.from_pretrained(folders, dtype="bfloat15")


def test_one_text_loads_that_model(pair):
    folders, _ = pair("vit")
    stock = transformers.ViTForImageClassification.from_pretrained(folders[0]).state_dict()
    for name, tensor in AutoMergedModel.from_pretrained(str(folders[0])).state_dict().items():
        torch.testing.assert_close(tensor, stock[name], rtol=0, atol=0)
    with pytest.raises(MergeError, match="is one model: put the members into a list"):
        AutoMergedModel.from_pretrained(str(folders[0]), "greedy_soup")


def test_two_vocabularies_are_refused(pair):
    folders, _ = pair("bert")
    for index, folder in enumerate(folders):
        vocabulary = {"[UNK]": 0, f"word{index}": 1}
        content = {"model": {"type": "WordPiece", "vocab": vocabulary}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="have different vocabularies"):
        AutoMergedModel.from_pretrained(folders)


def test_two_architectures_are_refused(pair):
    with pytest.raises(MergeError, match=r"bert-1 is a BertModel and .*vit-2 a ViTModel: merge models of one kind"):
        AutoMergedModel.from_pretrained([pair("bert")[0][0], pair("vit")[0][1]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "truncated or not safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights: expected one of"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_a_member_that_is_not_whole_is_refused(pair, damage, message):
    folders, _ = pair("bert")
    damage(folders[1])
    with pytest.raises((CheckpointError, PopulationError), match=message):
        AutoMergedModel.from_pretrained(folders)


def test_an_unfinished_member_is_refused(pair):
    folders, _ = pair("bert")
    Manifest(name="zoo-000", status="training").write(folders[0])
    with pytest.raises(PopulationError, match=r"training has not finished \(training\)"):
        AutoMergedModel.from_pretrained(folders)


def test_a_merge_of_no_weights_and_local_members_says_why_it_cannot_be_made_again(tmp_path):
    from hf_zoo.population import Parent

    (tmp_path / "merge").mkdir()
    parents = tuple(Parent(repo=f"zoo-{i}", role="member") for i in range(2))
    manifest = Manifest(name="m", kind="merge", status="finished", parents=parents, method={"name": "average"})
    manifest.write(tmp_path / "merge")
    with pytest.raises(PopulationError, match="made from zoo-0, which was never on a Hub"):
        AutoMergedModel.from_pretrained(str(tmp_path / "merge"))


def test_it_is_not_made_by_hand():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoMergedModel()
