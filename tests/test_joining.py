"""What models must have in common to be merged, what becomes of the rest, and what a plain merge imports."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_zoo.auto import AutoMergedModel
from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.files import weights_digest
from hf_zoo.merging import run_merge
from hf_zoo.population import Manifest
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import MergeRecipe

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
CONFIG = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **BODY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A masked language model, and two classifiers near it."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(CONFIG)
    base.save_pretrained(root / "base")
    for index in (1, 2):
        torch.manual_seed(index)
        model = transformers.BertForSequenceClassification(CONFIG)
        model.bert.load_state_dict(base.bert.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn(parameter.shape))
        model.save_pretrained(root / f"m{index}")
    return {name: root / name for name in ("base", "m1", "m2")}


def merge(tmp_path, folders, names=("m1", "m2"), **options):
    content = {"name": "merged", "output": str(tmp_path / "out"), "evaluate": False} | options
    content["members"] = [str(folders[name]) if name in folders else str(name) for name in names]
    if "base" in content:
        content["base"] = str(folders[content["base"]])
    return run_merge(build_recipe(content, MergeRecipe, "test"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def copy_with(folder, target, change):
    """Save a model again with its tensors changed."""
    target.mkdir()
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_a_head_the_base_lacks_is_averaged_and_not_differenced(folders, tmp_path):
    outcome = merge(tmp_path, folders, method="task_arithmetic", parameters={"scale": 0.7}, base="base")
    base, one, two, merged = (weights(folder) for folder in (*folders.values(), outcome.folder))
    torch.testing.assert_close(merged["classifier.weight"], (one["classifier.weight"] + two["classifier.weight"]) / 2)
    name = "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(merged[name], base[name] + 0.7 * (one[name] + two[name] - 2 * base[name]))
    report = outcome.manifest.method["report"]["averaged, as the base lacks or never trained them"]
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"} == set(
        report
    )


def test_a_head_the_members_began_anew_is_averaged_though_the_base_has_one(folders, tmp_path):
    children = []
    for name in ("m1", "m2"):
        child = copy_with(folders[name], tmp_path / f"child-{name}", lambda tensors: None)
        Manifest(name=child.name, status="finished", loading={"fresh": ["classifier"]}).write(child)
        children.append(child)
    outcome = merge(
        tmp_path, {"base": folders["m1"]}, children, method="task_arithmetic", base="base", parameters={"scale": 1.0}
    )
    one, two = weights(folders["m1"]), weights(folders["m2"])
    merged = weights(outcome.folder)
    torch.testing.assert_close(merged["classifier.weight"], (one["classifier.weight"] + two["classifier.weight"]) / 2)
    name = "bert.pooler.dense.weight"  # base + (one - base) + (two - base), the base being `one`
    torch.testing.assert_close(merged[name], two[name])


def test_a_base_of_another_size_is_refused(folders, tmp_path):
    def widen(tensors):
        tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(41, 16)

    other = copy_with(folders["base"], tmp_path / "wide", widen)
    with pytest.raises(MergeError, match=r"word_embeddings.weight' is \[41, 16\] in the base and \[40, 16\]"):
        merge(tmp_path, {**folders, "wide": other}, method="task_arithmetic", base="wide")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extras", ["refuse", "keep", "drop"])
def test_tensors_only_some_members_have(extras, folders, tmp_path):
    def add(tensors):
        tensors["extra.weight"] = torch.ones(4)

    more = copy_with(folders["m2"], tmp_path / "more", add)
    if extras == "refuse":
        with pytest.raises(MergeError, match=r"m1 lacks 'extra.weight'"):
            merge(tmp_path, folders, ("m1", more), extras=extras)
        return
    outcome = merge(tmp_path, folders, ("m1", more), extras=extras)
    merged = weights(outcome.folder)
    assert ("extra.weight" in merged) == (extras == "keep")
    if extras == "keep":
        torch.testing.assert_close(merged["extra.weight"], torch.ones(4))
        assert outcome.manifest.method["report"]["of some members only"] == {"extra.weight": [1]}


def test_rules_of_a_recipe_reach_the_weights(folders, tmp_path):
    rules = [{"tensors": "heads", "keep": 1}, {"tensors": "embeddings", "keep": "base"}]
    outcome = merge(tmp_path, folders, base="base", rules=rules)
    base, one, two, merged = (weights(folder) for folder in (*folders.values(), outcome.folder))
    torch.testing.assert_close(merged["classifier.weight"], two["classifier.weight"], rtol=0, atol=0)
    name = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(merged[name], base[name], rtol=0, atol=0)
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(merged[name], (one[name] + two[name]) / 2)
    assert [part["method"] for part in outcome.manifest.method["parts"]] == ["passthrough", "average", "passthrough"]


def test_a_merge_of_strangers_warns_or_is_refused_with_numbers(folders, tmp_path, caplog):
    torch.manual_seed(99)
    stranger = tmp_path / "stranger"
    transformers.BertForSequenceClassification(CONFIG).save_pretrained(stranger)
    with pytest.raises(MergeError, match=r"m1 and stranger: the cosine of their weights is -?0\.\d{3}"):
        merge(tmp_path, folders, ("m1", stranger), lineage="refuse")
    assert not (tmp_path / "out").exists()
    outcome = merge(tmp_path, folders, ("m1", stranger))
    assert "do not seem to come from one" in caplog.text
    assert len(outcome.manifest.method["report"]["lineage"]) == 1
    kin = merge(tmp_path, folders, name="kin")
    assert kin.manifest.method["report"]["smallest cosine of weights"] > 0.9


def test_a_merge_of_weights_imports_no_more_than_torch(folders, tmp_path):
    recipe = {
        "name": "merged", "output": str(tmp_path), "members": [str(folders["m1"]), str(folders["m2"])],
        "base": str(folders["base"]), "method": "ties", "evaluate": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = (
        "import sys; from hf_zoo.merge import main; status = main(sys.argv[1:]); "
        "heavy = ('transformers', 'datasets', 'evaluate', 'accelerate', 'peft', 'timm', 'pandas', 'matplotlib'); "
        "print(status, [name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "0 []"
    assert len(weights(tmp_path / "merged")) == len(weights(folders["m1"]))


def named(folder, target, **changes):
    """Save a model again with its config changed."""
    copy_with(folder, target, lambda tensors: None)
    content = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_a_head_for_other_classes_is_averaged_though_it_has_the_shape(folders, tmp_path):
    base = named(folders["m1"], tmp_path / "nli", id2label={"0": "yes", "1": "no", "2": "maybe"})
    members = {name: named(folders[name], tmp_path / name, id2label={"0": "a", "1": "b", "2": "c"}) for name in
               ("m1", "m2")}  # fmt: skip
    outcome = merge(tmp_path, members | {"base": base}, method="task_arithmetic", base="base")
    one, two, merged = (weights(folder) for folder in (*members.values(), outcome.folder))
    torch.testing.assert_close(merged["classifier.weight"], (one["classifier.weight"] + two["classifier.weight"]) / 2)
    reported = outcome.manifest.method["report"]["averaged, as the base lacks or never trained them"]
    assert set(reported) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "is quantized \\(gptq\\): its tensors are codes",
        ),
        (None, "config.json cannot be read"),
    ],
)
def test_a_config_that_weights_cannot_be_read_by_is_refused(config, message, folders, tmp_path):
    other = named(folders["m2"], tmp_path / "other", **(config or {}))
    if config is None:
        (other / "config.json").write_text("{oops")
    with pytest.raises(MergeError, match=message):
        merge(tmp_path, folders, ("m1", other))
    assert not (tmp_path / "out").exists()


def test_weights_of_one_byte_are_refused_by_name(folders, tmp_path):
    def shrink(tensors):
        tensors["classifier.weight"] = tensors["classifier.weight"].to(torch.float8_e4m3fn)

    other = copy_with(folders["m2"], tmp_path / "small", shrink)
    with pytest.raises(MergeError, match=r"small: tensor 'classifier\.weight' in model\.safetensors is float8_e4m3fn"):
        merge(tmp_path, folders, ("m1", other))


def test_what_a_trainer_left_behind_is_not_carried_over(folders, tmp_path):
    first = copy_with(folders["m1"], tmp_path / "first", lambda tensors: None)
    for name in ("eval_results.json", "training_args.json", "trainer_state.json", "preprocessor_config.json"):
        (first / name).write_text("{}")
    outcome = merge(tmp_path, folders, (first, "m2"))
    left = {path.name for path in outcome.folder.glob("*.json")}
    assert left == {"config.json", "preprocessor_config.json", "zoo.json"}


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(folders, tmp_path):
    with pytest.raises(MergeError, match="device: 'cuda:77' cannot be used on this machine"):
        merge(tmp_path, folders, device="cuda:77")
    with pytest.raises(RecipeError, match="num_threads: must be 1 or more"):
        merge(tmp_path, folders, num_threads=0)
    assert not (tmp_path / "out").exists()


def with_fisher(folder, target, of=None):
    """Save a model again with a Fisher that says it was measured on some model's weights."""
    copy_with(folder, target, lambda tensors: None)
    (target / "statistics").mkdir()
    fisher = {name: tensor.square() for name, tensor in weights(target).items() if tensor.is_floating_point()}
    save_file(fisher, target / "statistics" / "fisher.safetensors")
    (target / "statistics" / "fisher.json").write_text(json.dumps({"model_sha256": weights_digest(of or target)}))
    return target


def test_statistics_of_other_weights_are_refused(folders, tmp_path):
    right = with_fisher(folders["m1"], tmp_path / "right")
    stale = with_fisher(folders["m2"], tmp_path / "stale", of=folders["m1"])
    with pytest.raises(MergeError, match="stale: its fisher statistics were measured on other weights"):
        merge(tmp_path, folders, (right, stale), method="fisher")
    again = with_fisher(folders["m2"], tmp_path / "again")
    assert merge(tmp_path, folders, (right, again), method="fisher").made


def test_a_token_put_on_top_is_not_mixed_with_anothers(folders, tmp_path):
    models = []
    for name, token in (("m1", "<question>"), ("m2", "<answer>"), ("m2", "<question>")):
        model = copy_with(folders[name], tmp_path / f"{name}{token[1:-1]}", lambda tensors: None)
        special = [{"id": 0, "content": "[UNK]"}] * (len(models) > 0)  # told twice, in the vocabulary as well
        added = [*special, {"id": 1, "content": token}]
        tokenizer = {"model": {"type": "WordLevel", "vocab": {"[UNK]": 0}}, "added_tokens": added}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        models.append(model)
    with pytest.raises(MergeError, match="different vocabularies"):
        merge(tmp_path, folders, models[:2])
    assert merge(tmp_path, folders, (models[0], models[2])).made


def test_a_misspelled_place_is_told(folders, tmp_path, caplog):
    merge(tmp_path, folders, parameters={"weights": [1, {"embedings": 3, "otherwise": 2}]})
    assert "these keys fit no tensor and have no effect: parameters.weights: 'embedings'" in caplog.text


def test_other_statistics_make_another_merge(folders, tmp_path):
    members = [copy_with(folders[name], tmp_path / name, lambda tensors: None) for name in ("m1", "m2")]

    def measure(scale):
        for seed, member in enumerate(members):
            draw = torch.Generator().manual_seed(seed)
            fisher = {name: scale * torch.rand(t.shape, generator=draw) for name, t in weights(member).items()}
            (member / "statistics").mkdir(exist_ok=True)
            save_file(fisher, member / "statistics" / "fisher.safetensors")

    measure(1.0)
    outcome = merge(tmp_path, folders, members, method="fisher")
    hashes = outcome.manifest.method["statistics"]
    assert {name: list(kinds) for name, kinds in hashes.items()} == {"m1": ["fisher"], "m2": ["fisher"]}
    assert not merge(tmp_path, folders, members, method="fisher").made
    measure(2.0)
    with pytest.raises(MergeError, match="the members' statistics are others than then"):
        merge(tmp_path, folders, members, method="fisher")


def test_a_merge_in_memory_that_overflows_is_refused(folders):
    members = [str(folders["m1"]), str(folders["m2"])]
    options = {"method": "task_arithmetic", "base": str(folders["base"]), "scale": 1e7, "dtype": "float16"}
    with pytest.raises(MergeError, match=r"tensor '.*' holds \d+ (NaN|infinite)"):
        AutoMergedModel.from_pretrained(members, **options)
