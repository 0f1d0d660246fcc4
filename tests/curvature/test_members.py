"""Statistics of trained members: files, names, resuming, the verb, the card."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_zoo.cli import main
from hf_zoo.curvature.fisher import DiagonalFisher
from hf_zoo.curvature.gram import GramMatrices
from hf_zoo.curvature.members import STATE_FOLDER, load_whole, measure_member, open_examples, own_data
from hf_zoo.curvature.saved import fisher_on_disk, gram_on_disk, open_statistics
from hf_zoo.errors import CheckpointError, RecipeError
from hf_zoo.evaluation import objective_of
from hf_zoo.files import weights_digest
from hf_zoo.hub.contents import folder_files
from hf_zoo.hub.publish import snapshot_manifest
from hf_zoo.population import Manifest, Member
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import FinetuneRecipe, PretrainRecipe
from hf_zoo.recipe.statistics import StatisticsSpec
from hf_zoo.training.engine import train_population

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
RECIPES = {
    "vit": {
        "model": {"type": "vit", "config": {**SMALL, "patch_size": 4}},
        "data": {"path": "digits", "num_train": 48, "num_eval": 16},
        "objective": "image_classification",
        "statistics": {"kinds": ["fisher", "gram"], "batch_size": 16},
    },
    "bert": {
        "model": {"type": "bert", "config": SMALL},
        "data": {"path": "docs", "num_train": 12, "num_eval": 8, "max_length": 32},
        "tokenizer": {"vocab_size": 300},
        "objective": "masked_lm",
    },
}
BOTH = StatisticsSpec(kinds=("fisher", "gram"), batch_size=16)


class Quiet:
    def begin(self, *_):
        pass

    member = step = finished = failed = begin


def train(kind, output, **keys):
    content = {
        "name": f"zoo-{kind}",
        "output": str(output),
        "training": {"epochs": 1, "batch_size": 16},
        **RECIPES[kind],
    }
    recipe = build_recipe(content | keys, PretrainRecipe, "test")
    train_population(recipe, Quiet())
    return output / f"zoo-{kind}" / f"zoo-{kind}-000"


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return {kind: train(kind, output) for kind in RECIPES}


@pytest.fixture
def vit(members, tmp_path):
    return shutil.copytree(members["vit"], tmp_path / "zoo-vit-000")


@pytest.fixture
def bert(members, tmp_path):
    return shutil.copytree(members["bert"], tmp_path / "zoo-bert-000")


def test_training_leaves_statistics_under_the_names_of_the_weights(vit):
    weights = load_file(vit / "model.safetensors")
    fisher, gram = (load_file(vit / f"statistics/{kind}.safetensors") for kind in ("fisher", "gram"))
    # ViT's modules are called otherwise than its tensors on disk; a Fisher for each of them.
    assert {name: value.shape for name, value in fisher.items()} == {name: v.shape for name, v in weights.items()}
    assert {value.dtype for value in fisher.values()} == {torch.float32}
    linear = [name for name, value in weights.items() if value.ndim == 2 and "embeddings" not in name]
    assert {name: value.shape for name, value in gram.items()} == {
        name: (weights[name].shape[1],) * 2 for name in linear
    }
    description = json.loads((vit / "statistics/fisher.json").read_text())
    assert description["estimator"] == "exact"
    assert description["num_examples"] == 48
    assert description["model_sha256"] == weights_digest(vit) == Manifest.read(vit).sha256
    assert description["trace"] == pytest.approx(sum(float(value.double().sum()) for value in fisher.values()))
    assert description["tensors"]["classifier.bias"]["max"] == pytest.approx(float(fisher["classifier.bias"].max()))
    assert description["dataset"]["path"] == "digits"
    assert not (vit / STATE_FOLDER).exists()


def test_what_is_written_is_the_mean_over_the_training_split(vit):
    member = Member.open(vit)
    model, objective = load_whole(member), objective_of(member)
    examples = open_examples(member, model, own_data(member), objective, BOTH)
    fisher = DiagonalFisher(model, objective.name, dtype=torch.float64)
    gram = GramMatrices(model, dtype=torch.float64)
    for index in range(48):
        batch = examples.collator([examples.table[index]])
        fisher.add(batch)
        gram.add(batch)
    expected = fisher_on_disk(model, fisher.mean())
    reader = open_statistics(vit, "fisher")
    assert set(reader) == set(expected)
    for name, value in expected.items():
        assert float((reader[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-12, name
    expected, _, left_out = gram_on_disk(model, gram.mean(), gram.rows)
    assert left_out == []
    reader = open_statistics(vit, "gram")
    for name, value in expected.items():
        assert float((reader[name] - value).norm()) <= 1e-5 * float(value.norm()), name


def test_manifest_and_card_list_them_and_they_are_published(vit):
    manifest = Manifest.read(vit)
    assert [entry["file"] for entry in manifest.statistics] == [
        "statistics/fisher.safetensors",
        "statistics/gram.safetensors",
    ]
    card = (vit / "README.md").read_text()
    assert "## Statistics" in card
    assert "| `statistics/fisher.safetensors` | fisher | exact | 48 |" in card
    files, left_out = folder_files(vit)
    assert {f"statistics/{kind}.{suffix}" for kind in ("fisher", "gram") for suffix in ("json", "safetensors")} <= set(
        files
    )
    assert left_out == ()
    # They are of the last state, so a snapshot's own revision does not claim them.
    assert snapshot_manifest(manifest, manifest.snapshots[0]).statistics == ()
    # What is measured changes no weight: a recipe without it is the same population.
    assert "statistics" not in manifest.recipe


def test_a_masked_language_model_is_sampled_and_ties_once(bert):
    measure_member(bert, BOTH)
    weights, fisher = load_file(bert / "model.safetensors"), load_file(bert / "statistics/fisher.safetensors")
    assert set(fisher) == set(weights)
    assert "cls.predictions.decoder.weight" not in fisher
    description = json.loads((bert / "statistics/fisher.json").read_text())
    assert (description["estimator"], description["num_samples_per_example"]) == ("sampled", 1)
    assert "sum over its predicted tokens" in description["example"]
    assert Manifest.read(bert).statistics[0]["kind"] == "fisher"
    assert "## Statistics" in (bert / "README.md").read_text()


def killed_after(member, kind, examples, spec):
    """Measure in a process that is killed when it has seen so many examples."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def report(which, done, total):
            if which == kind and done >= examples:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            measure_member(member, spec, report=report, save_every_seconds=0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_killed_measurement_goes_on_to_the_same_bytes(bert, tmp_path, kind):
    other = shutil.copytree(bert, tmp_path / "other")
    spec = StatisticsSpec(kinds=(kind,), batch_size=3, num_samples=2)
    measure_member(other, spec)
    killed_after(bert, kind, 9, spec)
    assert len(list((bert / STATE_FOLDER / kind).glob("state-*"))) == 1
    assert not (bert / "statistics").exists()
    seen = []
    measure_member(bert, spec, report=lambda which, done, total: seen.append(done))
    assert seen[0] == 9  # the batches before were in the saved state
    assert not (bert / STATE_FOLDER).exists()
    for suffix in ("safetensors", "json"):
        name = f"statistics/{kind}.{suffix}"
        assert (bert / name).read_bytes() == (other / name).read_bytes()


def test_a_state_of_another_measurement_is_not_gone_on_from(bert, tmp_path):
    other = shutil.copytree(bert, tmp_path / "other")
    killed_after(bert, "fisher", 6, StatisticsSpec(batch_size=3))
    spec = StatisticsSpec(batch_size=3, seed=1)
    for folder in (bert, other):
        measure_member(folder, spec)
    name = "statistics/fisher.safetensors"
    assert (bert / name).read_bytes() == (other / name).read_bytes()


def test_what_is_there_is_not_measured_again(vit):
    def never(*_):
        raise AssertionError

    before = (vit / "statistics/fisher.safetensors").stat().st_mtime_ns
    measure_member(vit, BOTH, report=never)
    assert (vit / "statistics/fisher.safetensors").stat().st_mtime_ns == before
    # A damaged file is.
    content = bytearray((vit / "statistics/fisher.safetensors").read_bytes())
    content[-1] ^= 255
    (vit / "statistics/fisher.safetensors").write_bytes(content)
    seen = []
    measure_member(vit, BOTH, report=lambda kind, done, total: seen.append(kind))
    assert set(seen) == {"fisher"}


def test_statistics_of_other_weights_are_refused(vit):
    assert open_statistics(vit, "fisher") is not None
    weights = bytearray((vit / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (vit / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="was measured on other weights"):
        open_statistics(vit, "fisher")
    shutil.rmtree(vit / "statistics")
    assert open_statistics(vit, "fisher") is None


def test_the_verb_measures_a_population(members, tmp_path, capsys):
    population = tmp_path / "zoo-vit"
    shutil.copytree(members["vit"].parent, population)
    assert main(["curvature", str(population), "estimator=sampled", "max_examples=10", "num_samples=3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["member", "statistic", "estimator", "examples", "trace", "zeros"]
    assert out.splitlines()[2].split()[:4] == ["zoo-vit-000", "fisher", "sampled", "10"]
    entry = Manifest.read(population / "zoo-vit-000").statistics[0]
    assert (entry["estimator"], entry["num_examples"], entry["num_samples_per_example"]) == ("sampled", 10, 3)
    assert main(["curvature", str(population), "--dry-run"]) == 0
    assert "fisher, gram" in capsys.readouterr().out


def test_the_verb_reads_recipes_and_writes_elsewhere(vit, tmp_path, capsys):
    recipe = tmp_path / "measure.yaml"
    recipe.write_text(
        f"members: ['{vit}']\nkinds: [gram]\ndata: digits\noutput: {tmp_path / 'out'}\nmax_examples: 8\n"
    )
    before = Manifest.read(vit)
    assert main(["curvature", str(recipe), "batch_size=4"]) == 0
    assert "gram" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/zoo-vit-000/statistics/gram.json").read_text())["num_examples"] == 8
    assert Manifest.read(vit) == before


def test_a_snapshot_has_statistics_of_its_own(vit, capsys):
    name = Manifest.read(vit).snapshots[0].name
    assert main(["curvature", f"{vit}@{name}", "max_examples=8"]) == 0
    assert "fisher" in capsys.readouterr().out
    description = json.loads((vit / "snapshots" / name / "statistics/fisher.json").read_text())
    assert description["model_sha256"] == Manifest.read(vit).snapshots[0].sha256
    assert Manifest.read(vit).statistics[0]["num_examples"] == 48


def test_an_adapter_is_measured_as_the_whole_model_it_makes(tmp_path):
    data = {"path": "docs-sentences", "num_train": 24, "num_eval": 8, "max_length": 32}
    common = {"output": str(tmp_path), "training": {"epochs": 1, "batch_size": 8}, "data": data}
    task = {"objective": "sequence_classification", **common}
    parent = {"name": "parent", "model": {"type": "bert", "config": SMALL}, "tokenizer": {"vocab_size": 300}, **task}
    train_population(build_recipe(parent, PretrainRecipe, "test"), Quiet())
    child = {"name": "child", "parent": str(tmp_path / "parent/parent-000"), "model": {"adapter": {"rank": 2}}, **task}
    train_population(build_recipe(child, FinetuneRecipe, "test"), Quiet())
    folder = tmp_path / "child/child-000"
    assert (folder / "adapter_model.safetensors").is_file()
    measure_member(folder, BOTH)
    reader, whole = open_statistics(folder, "fisher"), Member.open(folder).tensors()
    assert set(reader) == set(whole)
    assert all(reader.shape(name) == whole.shape(name) for name in reader)
    # As the adapted model that `Member.load` returns computes it, tensor for tensor outside the adapter's layers.
    member = Member.open(folder)
    examples = open_examples(member, load_whole(member), own_data(member), objective_of(member), BOTH)
    fisher = DiagonalFisher(member.load(), "sequence_classification")
    for indices in examples.batches:
        fisher.add(examples.collator([examples.table[int(index)] for index in indices]))
    for name, value in fisher.mean().items():
        if "LayerNorm" in name:
            assert float((reader[name] - value).norm()) <= 1e-4 * float(value.norm()), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["kinds=[hessian]"], "kinds"),
        (["estimator=exact", "per_example=false"], "per_example: false is unbiased for sampled labels alone"),
        (["max_examples=0"], "max_examples: must be 1 or more"),
        (["sead=1"], "did you mean 'seed'"),
    ],
)
def test_mistakes_on_the_command_line_are_told(vit, keys, message, capsys):
    assert main(["curvature", str(vit), *keys]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective": "contrastive", "statistics": {"kinds": ["fisher"]}}, "has no Fisher information"),
        ({"statistics": {"batch_size": 0}}, "statistics.batch_size"),
        ({"vary": {"statistics.seed": [0, 1]}}, "belongs to the population"),
    ],
)
def test_a_training_recipes_statistics_are_checked_beforehand(tmp_path, keys, message):
    content = {"name": "zoo", "output": str(tmp_path), **RECIPES["vit"], **keys}
    with pytest.raises(RecipeError, match=message):
        build_recipe(content, PretrainRecipe, "test")
