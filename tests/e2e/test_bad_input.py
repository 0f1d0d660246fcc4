"""Mistakes of a person, at the command line: one message that helps, status 2, and nothing written or lost."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import environment, tree
from safetensors.torch import load_file, save_file

VIT_MEMBER = "runs/zoo-vit/zoo-vit-000"
BERT_MEMBER = "runs/zoo-bert/zoo-bert-000"
SST_MEMBER = "runs/zoo-sst/zoo-sst-000"
SECRET = "hf_" + "s3cretAbCdEfGhIjKlMnOpQrStUvWxYz01"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.lerning_rate=1e-3"], ["vit.yaml: 1 mistake", "training.lerning_rate", "'learning_rate'"]),
        (["training.epochs=many"], ["vit.yaml: 1 mistake", "training.epochs", "'many'", "whole number"]),
        (["training.learning_rate=-1"], ["vit.yaml: 1 mistake", "training.learning_rate", "-1"]),
        (["objective=regression"], ["objective", "'regression'", "image_classification"]),
        (
            ["training.epochs=many", "modell.type=vit", "vary.sed=[0]", "publish.private=maybe"],
            ["vit.yaml: 4 mistakes", "training.epochs", "'model'", "vary.sed", "'seed'", "publish.private"],
        ),
        (["vary.seed=[]"], ["vit.yaml: 1 mistake", "vary.seed", "empty"]),
        (["members=7"], ["members", "7", "1 member"]),
        (["name=my zoo"], ["name", "a Hub refuses 'my zoo'"]),
        (["name=zoo--vit"], ["name", "a Hub refuses 'zoo--vit'", "no `--`"]),
        ([f"name={'z' * 95}"], ["name", "longer than 96"]),
        (["publish.namespace=or/g"], ["publish.namespace", "'or/g'", "user or organisation"]),
        (["data.path=docs"], ["data.path", "needs images", "digits"]),
        (["data.label=labl", "name=new"], ["digits", "no column 'labl'", "data.label", "'label'"]),
        (["data.image=picture", "name=new"], ["digits", "no column 'picture'", "data.image", "image"]),
        (["data.path=./nowhere", "name=new"], ["./nowhere", "no such file or folder"]),
        (["data.path=digts.parquet", "name=new"], ["digts.parquet", "no such file or folder"]),
        (["data.train_split=trian", "name=new"], ["digits", "no split 'trian'", "data.train_split", "'train'"]),
        (["model.type=vti", "name=new"], ["model.type", "unknown model 'vti'", "'vit'"]),
        (["model.config.hiden_size=8", "name=new"], ["model.config.hiden_size", "'hidden_size'"]),
        (["model.config.hidden_act=gleu", "name=new"], ["vit cannot be built", "'gleu'"]),
        (["model.config.hidden_size=wide", "name=new"], ["model.config", "'hidden_size'", "'wide'"]),
        (["model.config.num_attention_heads=0", "name=new"], ["vit cannot be built", "by zero"]),
        (["model.config.patch_size=16", "name=new"], ["vit cannot read the samples of digits", "(8 x 8)"]),
        (
            ["model={type: timm, config: {architecture: vit_tiny_patch16_224}}", "name=new"],
            ["timm cannot read the samples of digits", "224", "data.image_size"],
        ),
        (["training.report_to=wandbb", "name=new"], ["training.report_to", "'wandbb'", "did you mean 'wandb'"]),
        (
            ["model={type: timm, config: {architecture: resnet10x}}", "name=new"],
            ["model.config.architecture", "unknown timm model 'resnet10x'", "did you mean"],
        ),
        (["training.arguments={lerning_rate: 1}", "name=new"], ["training.arguments.lerning_rate", "no such field"]),
        (["snapshots.best=validation_acuracy", "name=new"], ["snapshots.best", "'validation_accuracy'"]),
        (["output=vit.yaml"], ["vit.yaml/zoo-vit cannot be a folder", "vit.yaml is a file"]),
    ],
)
def test_a_mistaken_recipe_is_refused(refused, overrides, said):
    message = refused("pretrain", "vit.yaml", *overrides)
    assert [words for words in said if words not in message] == [], message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["the recipe is missing"]),
        (["vti.yaml"], ["vti.yaml"]),
        (["broken.yaml"], ["broken.yaml"]),
        (["list.yaml"], ["list.yaml", "mapping"]),
        (["vit.yaml", "--dryrun"], ["--dryrun", "--dry-run"]),
        (["vit.yaml", "--seed=3"], ["--seed=3", "seed=3"]),
        (["sst.yaml"], ["parent"]),
    ],
)
def test_a_mistaken_command_is_refused(refused, work, arguments, said):
    (work / "broken.yaml").write_text("name: [zoo\n")
    (work / "list.yaml").write_text("- name: zoo\n")
    (work / "sst.yaml").write_text("name: zoo\nobjective: sequence_classification\n")
    message = refused("finetune", *arguments)
    assert [words for words in said if words not in message] == [], message


@pytest.mark.parametrize("key", ["training.arguments={hub_token: SECRET}", "publish.token=SECRET", "token=SECRET"])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(refused, key):
    message = refused("pretrain", "vit.yaml", key.replace("SECRET", SECRET))
    assert "token" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "unreachable"]
)
def test_a_hub_dataset_without_a_hub_is_refused(work, tmp_path, variables):
    before = tree(work)
    command = [sys.executable, "-m", "hf_zoo.pretrain", "vit.yaml", "data.path=org/images", "name=new"]
    run = subprocess.run(
        command,
        env=environment(tmp_path / "home", **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: org/images: no such file or folder, and it cannot be loaded")
    assert "need no network" in run.stderr
    assert "Traceback" not in run.stderr
    assert tree(work) == before


def spoil_truncated(member):
    weights = member / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["model.safetensors", "truncated"]


def spoil_headless(member):
    (member / "model.safetensors").write_bytes(b"\x00" * 100)
    return ["model.safetensors"]


def spoil_with_nan(member):
    weights = load_file(member / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.output.dense.weight"))
    weights[name][0, :3] = torch.nan
    save_file(weights, member / "model.safetensors", metadata={"format": "pt"})
    return [name, "3 NaN of"]


def spoil_without_weights(member):
    (member / "model.safetensors").unlink()
    return ["no weights"]


def spoil_config(member):
    (member / "config.json").write_text('{"model_type": "bert"')
    return ["config.json"]


def spoil_manifest(member):
    (member / "zoo.json").write_text('{"name": ')
    return ["zoo.json", "cannot be read"]


def spoil_by_another_version(member):
    manifest = json.loads((member / "zoo.json").read_text())
    (member / "zoo.json").write_text(json.dumps(manifest | {"schema": 99}))
    return ["zoo.json", "schema 99", "update hf_zoo"]


def spoil_unfinished(member):
    manifest = json.loads((member / "zoo.json").read_text())
    (member / "zoo.json").write_text(json.dumps(manifest | {"status": "training"}))
    return ["has not finished", "training"]


SPOILT = {
    "truncated": spoil_truncated,
    "headless": spoil_headless,
    "nan": spoil_with_nan,
    "no weights": spoil_without_weights,
    "config": spoil_config,
    "manifest": spoil_manifest,
    "newer": spoil_by_another_version,
    "unfinished": spoil_unfinished,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_damaged_parent_is_refused(refused, work, spoil):
    said = spoil(work / BERT_MEMBER)
    message = refused("finetune", "sst.yaml", "name=new")
    assert [words for words in ["zoo-bert-000", *said] if words not in message] == [], message


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_damaged_member_is_not_merged(refused, work, spoil):
    said = spoil(work / SST_MEMBER)
    message = refused(
        "merge", "merge.yaml", "tasks=[]", "population=", f"members=[{SST_MEMBER},runs/zoo-sst/zoo-sst-001]"
    )
    assert [words for words in ["zoo-sst-000", *said] if words not in message] == [], message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parent=runs/zoo-bert/zoo-bert-007"], ["parent runs/zoo-bert/zoo-bert-007", "no such folder", "org/name"]),
        ([f"parent={BERT_MEMBER}@epoch-017"], ["no snapshot 'epoch-017'", "did you mean 'epoch-001'"]),
        ([f"parent={VIT_MEMBER}"], [VIT_MEMBER, "tokenizer"]),
        (["model.type=vit"], ["model.type is 'vit'", BERT_MEMBER, "'bert'"]),
        (["model.config.hidden_size=32"], [BERT_MEMBER, "does not fit", "parent (", "model ("]),
        (["data.max_length=4096"], ["data.max_length is 4096", "32 tokens"]),
        (
            [f"parent={SST_MEMBER}", "data.path=docs-pairs", "task=mnli", "model.head.reuse=true"],
            [SST_MEMBER, "model.head.reuse", "labels"],
        ),
        (
            ["model.adapter={target_modules: [qery]}"],
            ["model.adapter.target_modules", "'qery'", "did you mean 'query'"],
        ),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(refused, overrides, said):
    message = refused("finetune", "sst.yaml", "name=new", *overrides)
    assert [words for words in said if words not in message] == [], message


def test_a_folder_of_another_recipe_is_refused_with_the_difference(refused, work):
    message = refused("pretrain", "vit.yaml", "vary.seed=[0,1]", "training.learning_rate=0.5")
    assert "runs/zoo-vit was made from another recipe" in message
    assert "training.learning_rate: (not set) -> 0.5" in message
    (work / "runs" / "notes").mkdir()
    (work / "runs" / "notes" / "thesis.tex").write_text("years of work")
    assert "is not empty and no population" in refused("pretrain", "vit.yaml", "name=notes")


def test_a_damaged_population_is_refused(refused, work):
    (work / "runs/zoo-vit/population.json").write_text('{"name": "zoo-vit"')
    assert "population.json" in refused("pretrain", "vit.yaml", "vary.seed=[0,1]")
    assert "population.json" in refused("listing", "runs/zoo-vit")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tasks=[sts,mnli]"], ["zoo-sst", "no member for task 'sts'", "did you mean 'sst'", "sst (2)"]),
        (["tasks=[ner]"], ["no member for task 'ner'", "it has sst (2)"]),
        (["method=avrage"], ["merge.yaml", "method", "unknown method 'avrage'", "'average'", "greedy_soup"]),
        (["parameters.wieghts=[1,2]"], ["wieghts", "weights"]),
        (["population=runs/nothing"], ["population runs/nothing", "no folder runs/nothing here"]),
        (["where.sed=3"], ["no factor 'sed'", "seed"]),
        (["tasks=[]", "population=", f"members=[{SST_MEMBER},{VIT_MEMBER}]"], [SST_MEMBER, VIT_MEMBER, "one kind"]),
        (["tasks=[]", "population=", f"members=[{SST_MEMBER},runs/none]"], ["runs/none", "no folder runs/none here"]),
        (["tasks=[]", "population=", f"members=[{SST_MEMBER},{SST_MEMBER}@epoch-9]"], ["no snapshot 'epoch-9'"]),
        (["data.sst.path=./nowhere"], ["./nowhere", "no such file or folder"]),
        (["data.mnli.path=docs-pairs"], ["data.mnli", "sst"]),
        (["name=a merge"], ["name", "a Hub refuses 'a merge'"]),
        (["publish.namespace=-org"], ["publish.namespace", "'-org'"]),
    ],
)
def test_a_mistaken_merge_is_refused(refused, overrides, said):
    message = refused("merge", "merge.yaml", *overrides)
    assert [words for words in said if words not in message] == [], message


def test_a_folder_of_another_merge_is_refused(refused, work):
    shutil.copytree(work / SST_MEMBER, work / "runs/merges/mine")
    assert "runs/merges/mine" in refused("merge", "merge.yaml", "name=mine")
    shutil.rmtree(work / "runs/merges/mine")
    (work / "runs/merges/mine").mkdir()
    assert "exists and is no merge" in refused("merge", "merge.yaml", "name=mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/zoo-vti"], ["population runs/zoo-vti", "no folder runs/zoo-vti here"]),
        (["runs/zoo-vit/zoo-vit-000"], ["no population.json"]),
        (["runs/zoo-vit", "sede=3"], ["no factor 'sede'", "seed"]),
        (["runs/zoo-vit", "seed"], ["expected factor=value", "'seed'"]),
        (["runs/zoo-vit", "--cvs"], ["--cvs", "--csv"]),
        (["runs/zoo-vit", "runs/zoo-sst"], ["expected factor=value"]),
        (["--csv"], ["POPULATION"]),
    ],
)
def test_a_mistaken_listing_is_refused(refused, arguments, said):
    message = refused("listing", *arguments)
    assert [words for words in said if words not in message] == [], message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sevre", "hub"], ["'sevre'", "serve FOLDER"]),
        (["serve"], ["one FOLDER"]),
        (["serve", "hub", "--port", "http"], ["--port", "'http'"]),
        (["serve", "hub", "--prot", "80"], ["--prot", "--port"]),
        (["serve", "hub", "--port"], ["--port needs a value"]),
        (["serve", "hub", "--tokens", "none.yaml"], ["--tokens none.yaml"]),
        (["serve", "vit.yaml"], ["vit.yaml"]),
    ],
)
def test_a_mistaken_hub_is_refused(refused, arguments, said):
    message = refused("serving", *arguments)
    assert [words for words in said if words not in message] == [], message
