"""A search on tiny real members: it finds a known optimum, goes on after a kill, and never opens the test split."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_zoo.candidates import CandidateTable
from hf_zoo.data.texts import train_tokenizer
from hf_zoo.errors import DataError, MergeError, RecipeError
from hf_zoo.files import weights_digest
from hf_zoo.merge import main
from hf_zoo.merging import run_merge
from hf_zoo.planning import plan_merge
from hf_zoo.population import Manifest
from hf_zoo.recipe.grid import canonical, digest
from hf_zoo.recipe.loader import build_recipe, load_recipe
from hf_zoo.recipe.schema import DataSpec, FinetuneRecipe, MergeRecipe, ObjectiveSpec, TokenizerSpec
from hf_zoo.recipe.search import RangeSpec, SearchSpec, apply_settings
from hf_zoo.sampling import Space, num_candidates, sample
from hf_zoo.search import Bench, search

BODY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NAMES = ("bad", "good")


def write_data(folder):
    """Twenty texts a split, as many of one class as of the other."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"a {NAMES[i % 2]} b", NAMES[i % 2]] for i in range(20))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["a b bad good"] * 5, TokenizerSpec(vocab_size=60), 16)


@pytest.fixture
def zoo(tmp_path, tokenizer):
    """A base that says `bad` to everything, a member that says `good` to everything, and one like the base."""
    data = write_data(tmp_path / "data")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, id2label=dict(enumerate(NAMES)), **BODY
    )
    model = transformers.BertForSequenceClassification(config)
    for name, bias in (("base", (4.0, 0.0)), ("up", (0.0, 4.0)), ("still", (4.0, 0.0))):
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(bias))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        recipe = FinetuneRecipe(
            name="zoo",
            objective=ObjectiveSpec(name="sequence_classification"),
            parent=str(tmp_path / "base"),
            task="tone",
            data=DataSpec(path=str(data), validation_split="validation", max_length=16),
        )
        Manifest(
            name=name,
            status="finished",
            objective="sequence_classification",
            task="tone",
            recipe=canonical(recipe, spelled_out=True),
            digest=digest(recipe),
            auto_class="AutoModelForSequenceClassification",
            sha256=weights_digest(tmp_path / name),
        ).write(tmp_path / name)
    return tmp_path


def recipe_of(zoo, over, **changes):
    """A merge of the two members by task arithmetic; `spec` are further keys of its search."""
    spec = changes.pop("spec", {})
    plain = {
        "name": "m",
        "members": [str(zoo / "up"), str(zoo / "still")],
        "base": str(zoo / "base"),
        "output": str(zoo / "merges"),
        "method": "task_arithmetic",
        "search": {"over": over, **spec},
    }
    return build_recipe(plain | changes, MergeRecipe, "test")


@pytest.fixture
def by_loss(monkeypatch):
    """Score candidates by minus their loss.

    With scale s the merged biases are (4 - 4s, 4s): both classes are alike at s = 1/2, where the loss on a balanced set
    is smallest, log 2, and it grows with the distance like a parabola.
    """
    monkeypatch.setattr("hf_zoo.trials.main_score", lambda metrics: -metrics["loss"])


def values_of(table):
    return [record["values"] for record in table]


def test_a_grid_finds_the_optimum_and_the_merge_is_made_with_it(zoo, by_loss):
    outcome = run_merge(recipe_of(zoo, {"parameters.scale": {"low": 0, "high": 1, "num": 5}}))
    lines = [json.loads(line) for line in (zoo / "merges" / "m-search" / "search.jsonl").read_text().splitlines()]
    assert values_of(lines[1:]) == [{"parameters.scale": value} for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for record in lines[1:]:
        margin = torch.tensor([8 * record["values"]["parameters.scale"] - 4])
        loss = torch.nn.functional.softplus(torch.cat([margin, -margin])).mean()
        assert record["score"] == pytest.approx(-float(loss), abs=1e-6)  # float32 logits
        assert record["scores"] == {"tone": record["score"]}
    manifest = outcome.manifest
    assert manifest.method["parameters"]["scale"] == pytest.approx(0.5)
    assert manifest.recipe["search"] is None
    report = manifest.method["report"]["search"]
    assert (report["sampler"], report["candidates"], report["chosen"]) == ("grid", 5, {"parameters.scale": 0.5})
    assert report["validation score"] == pytest.approx(-manifest.results[-1]["validation_loss"], abs=1e-6)
    assert "test_loss" in manifest.results[-1]  # measured like any merge, once the choice is made
    biases = load_file(outcome.folder / "model.safetensors")["classifier.bias"]
    torch.testing.assert_close(biases, torch.tensor([2.0, 2.0]))
    assert "parameters.scale" in (outcome.folder / "README.md").read_text()
    assert (outcome.folder / "search.jsonl").read_bytes() == (
        zoo / "merges" / "m-search" / "search.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_is_drawn_comes_near_the_optimum(zoo, by_loss, sampler):
    spec = {"sampler": sampler, "num_candidates": 25}
    found = search(recipe_of(zoo, {"parameters.scale": {"low": -1, "high": 3}}, spec=spec))
    assert len(found.records) == 25
    assert abs(found.recipe.parameters["scale"] - 0.5) < 0.15  # twenty-five draws of a range of 4


def test_cma_es_moves_weights_of_members_to_the_optimum(zoo, by_loss):
    over = {"parameters.weights": {"low": 0, "high": 2, "each": "member"}}
    spec = {"sampler": "cmaes", "num_candidates": 40}
    found = search(recipe_of(zoo, over, parameters={"scale": 1.0}, spec=spec))
    up, still = found.recipe.parameters["weights"]  # the second member is the base, and its weight changes nothing
    assert 0 <= still <= 2
    assert abs(up - 0.5) < 0.02
    assert found.recipe.parameters["scale"] == pytest.approx(1)


def test_the_best_recipe_makes_the_merge_again_to_the_byte(zoo, by_loss):
    over = {"parameters.scale": [0.25, 0.5], "rules.0.parameters.scale": [{"blocks": [0.2, 0.9]}, 1.0]}
    recipe = recipe_of(zoo, over, rules=[{"tensors": "blocks"}])
    outcome = run_merge(recipe)
    file = zoo / "merges" / "m-search" / "recipe.yaml"
    again = load_recipe(file, MergeRecipe, [f"output={zoo / 'again'}"])
    assert again.rules[0].parameters == {"scale": {"blocks": [0.2, 0.9]}}
    assert not run_merge(load_recipe(file, MergeRecipe)).made  # the same merge
    made = run_merge(again)
    assert weights_digest(made.folder) == weights_digest(outcome.folder)


@pytest.mark.parametrize("method", ["ties", "slerp", "dare", "average"])
def test_a_candidate_in_memory_has_the_bits_that_are_written(zoo, method):
    recipe = replace(recipe_of(zoo, {"method": ["ties"]}, method=method, evaluate=False, seed=3), search=None)
    tensors = Bench(plan_merge(recipe)).merge(recipe)
    written = load_file(run_merge(recipe).folder / "model.safetensors")
    torch.testing.assert_close(tensors, written, rtol=0, atol=0)


def test_methods_and_their_parameters_move_together(zoo, by_loss):
    over = {"which": [{"method": "average"}, {"method": "task_arithmetic", "parameters.scale": 0.25}]}
    found = search(recipe_of(zoo, over))
    # The mean of the biases (0, 4) and (4, 0) is (2, 2).
    assert found.recipe.method == "average"
    assert found.records[0]["score"] == pytest.approx(-0.6931, abs=1e-4)
    assert found.records[1]["score"] < -0.8
    assert run_merge(recipe_of(zoo, over)).manifest.method["name"] == "average"


def test_a_method_named_without_a_parameter_it_lacks_is_refused_before_anything_is_measured(zoo):
    over = {"method": ["task_arithmetic", "average"], "parameters.scale": [0.5]}
    with pytest.raises(RecipeError, match=r"parameters.scale: unknown key"):
        search(recipe_of(zoo, over))
    assert not (zoo / "merges").exists()


def test_the_test_split_is_not_read_until_the_choice_is_made(zoo, by_loss):
    (zoo / "data" / "test.csv").write_text('text,label\n"never closed,bad\n')
    recipe = recipe_of(zoo, {"parameters.scale": [0.25, 0.5]})
    assert search(recipe).recipe.parameters == {"scale": 0.5}
    with pytest.raises(DataError, match=r"data: cannot be read|is empty"):
        run_merge(recipe)
    (zoo / "data" / "test.csv").unlink()
    assert search(recipe).recipe.parameters == {"scale": 0.5}
    assert not (zoo / "merges" / "m").exists()


def test_other_test_data_changes_no_choice(zoo, by_loss):
    recipe = recipe_of(zoo, {"parameters.scale": {"low": 0, "high": 1}}, spec={"sampler": "tpe", "num_candidates": 12})
    table = search(recipe).table.read_bytes()
    (zoo / "data" / "test.csv").write_text("text,label\n" + "a good b,bad\n" * 20)
    assert search(build_recipe(as_plain(recipe, zoo / "other"), MergeRecipe, "test")).table.read_bytes() == table


def as_plain(recipe, output):
    return canonical(recipe, spelled_out=True) | {"output": str(output)}


def test_made_again_nothing_is_measured_and_more_candidates_go_on(zoo, by_loss, monkeypatch):
    over = {"parameters.scale": {"low": 0, "high": 1}}
    whole = search(recipe_of(zoo, over, output=str(zoo / "whole"), spec={"sampler": "tpe", "num_candidates": 16}))
    first = search(recipe_of(zoo, over, spec={"sampler": "tpe", "num_candidates": 12}))
    assert first.records == whole.records[:12]
    more = search(recipe_of(zoo, over, spec={"sampler": "tpe", "num_candidates": 16}))
    assert more.table.read_bytes() == whole.table.read_bytes()

    def opened(*arguments):
        raise AssertionError("data was opened, and every candidate is known")

    monkeypatch.setattr("hf_zoo.search.open_trials", opened)
    assert search(recipe_of(zoo, over, spec={"sampler": "tpe", "num_candidates": 16})) == more
    with pytest.raises(MergeError, match=r"candidates for something else(.|\n)*search.seed: null -> 3"):
        search(recipe_of(zoo, over, spec={"sampler": "tpe", "num_candidates": 16, "seed": 3}))


RUN = """
import sys
import hf_zoo.trials
hf_zoo.trials.main_score = lambda metrics: -metrics["loss"]
from hf_zoo.recipe.loader import load_recipe
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.search import search
search(load_recipe(sys.argv[1], MergeRecipe))
"""


@pytest.mark.usefixtures("no_hang")
def test_killed_at_any_moment_it_goes_on_to_the_same_table(zoo, by_loss):
    over = {"parameters.scale": {"low": 0, "high": 1}, "parameters.weights": {"low": 0.1, "high": 1, "each": "member"}}
    recipe = recipe_of(zoo, over, spec={"sampler": "cmaes", "num_candidates": 24})
    file = zoo / "recipe.yaml"
    file.write_text(json.dumps(as_plain(recipe, zoo / "merges")))
    table = zoo / "merges" / "m-search" / "search.jsonl"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(file)], stderr=subprocess.PIPE)
    while not (table.is_file() and table.read_bytes().count(b"\n") > 4):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = table.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 25  # killed in the middle
    with table.open("ab") as file:
        file.write(b'{"values": {"parameters.sc')  # half a line
    found = search(recipe)
    assert found.table.read_bytes().startswith(whole)
    fresh = search(build_recipe(as_plain(recipe, zoo / "fresh"), MergeRecipe, "test"))
    assert fresh.table.read_bytes() == found.table.read_bytes()
    assert fresh.recipe.parameters == found.recipe.parameters


def test_equal_draws_are_measured_once(zoo, by_loss, monkeypatch):
    import hf_zoo.search

    calls = []
    score = hf_zoo.search.Bench.score
    monkeypatch.setattr(hf_zoo.search.Bench, "score", lambda *given: calls.append(given) or score(*given))
    found = search(recipe_of(zoo, {"parameters.scale": [0.25, 0.5]}, spec={"sampler": "random", "num_candidates": 12}))
    assert len(found.records) == 12
    assert len(calls) == 2


def test_a_candidate_that_cannot_be_made_stands_in_the_table_with_its_reason(zoo, by_loss):
    over = {"parameters.weights": {"low": -0.5, "high": 1, "num": 2, "each": "member"}}
    found = search(recipe_of(zoo, over, method="average", base=None))
    assert [("score" in record) for record in found.records] == [False, True, True, True]
    assert "weights must be finite and their sum above 0, got [-0.5, -0.5]" in found.records[0]["failed"]
    assert found.report["of them failed"] == 1
    assert found.best == found.records[3]


def test_where_no_candidate_can_be_made_the_first_reason_is_told(zoo):
    tensors = load_file(zoo / "up" / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, zoo / "up" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MergeError, match=r"none of 2 candidates could be made: .*'classifier.bias'.* holds 1 NaN of 2"
    ):
        search(recipe_of(zoo, {"parameters.scale": [0.25, 0.5]}))


def test_without_a_validation_split_nothing_is_chosen(zoo):
    data = {"tone": {"path": str(zoo / "data"), "validation_fraction": 0}}
    with pytest.raises(MergeError, match="tone: its data has no validation split to choose by"):
        search(recipe_of(zoo, {"parameters.scale": [0.5]}, data=data))
    assert not (zoo / "merges").exists()


def test_a_hyper_parameter_out_of_range_is_refused_before_anything_is_measured(zoo):
    over = {"parameters.density": {"low": 0.5, "high": 1.5}}
    with pytest.raises(RecipeError, match=r"density"):
        search(recipe_of(zoo, over, method="ties", spec={"sampler": "random"}))
    over = {"parameters.weights": [[1, 1], [1, 1, 1]]}
    with pytest.raises(MergeError, match="got 3 for 2 members"):
        search(recipe_of(zoo, over))
    assert not (zoo / "merges").exists()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, r"search\.over: is empty"),
        ({"over": {"parameters.scale": []}}, r"search\.over\.parameters\.scale: is empty"),
        ({"over": {"parameters.scale": 0.5}}, r"expected a list of choices, or a range .*, got 0\.5"),
        ({"over": {"parameters.scale": {"low": 0, "high": 1}}}, r"scale\.num: is missing: a grid needs"),
        ({"over": {"parameters.scale": {"low": 0, "hihg": 1}}}, r"scale\.hihg: unknown key \(did you mean 'high'"),
        ({"over": {"parameters.scale": {"low": 1, "high": 0, "num": 3}}}, r"low must be below high, got 1 and 0"),
        (
            {"over": {"parameters.scale": {"low": 0, "high": 1, "log": True}}, "sampler": "tpe"},
            r"a logarithmic range lies above 0, got low 0",
        ),
        ({"over": {"data.tone.path": ["x"]}}, r"data\.tone\.path: cannot be searched: only method, parameters, rules"),
        ({"over": {"scale": [0.5]}}, r"over\.scale: is no path that can be searched"),
        ({"over": {"parameters": [{}]}}, r"name a hyper-parameter"),
        ({"over": {"rules.0.parameters.scale": [1]}}, r"expected rules\.N\.parameters\.NAME.*N below 0"),
        ({"over": {"method": ["ties"], "which": [{"method": "dare"}]}}, r"moves method, which search\.over\.method"),
        ({"over": {"parameters.scale": [1], "parameters.scale.heads": [1]}}, r"moves parameters\.scale\.heads, which"),
        ({"over": {"method": {"low": 0, "high": 1, "num": 2}}}, r"method: expected a list of choices, not a range"),
        ({"over": {"parameters.scale": [1]}, "sampler": "cmaes"}, r"cmaes moves numbers, not choices"),
        ({"over": {"parameters.scale": {"low": 0, "high": 1}}, "sampler": "cmaes"}, r"needs two numbers or more"),
        ({"over": {"parameters.scale": [1]}, "num_candidates": 5}, r"num_candidates: is for samplers that draw"),
        ({"over": {"parameters.scale": [1]}, "sampler": "genetic"}, r"sampler: expected one of grid, random, tpe"),
    ],
)  # fmt: skip
def test_mistakes_of_a_recipe_are_named(search, message):
    plain = {"members": ["a", "b"], "method": "task_arithmetic", "search": search}
    with pytest.raises(RecipeError, match=message):
        build_recipe(plain, MergeRecipe, "test")


def test_what_is_searched_can_be_overridden():
    plain = {"members": ["a", "b"], "search": {"over": {"parameters.scale": [1]}}}
    overrides = ["search.over.parameters.scale=[0.1,0.2]", "search.over.parameters.density={low: 0, high: 1, num: 2}"]
    recipe = build_recipe(plain, MergeRecipe, "test", overrides)
    assert recipe.search.over == {
        "parameters.scale": [0.1, 0.2],
        "parameters.density": {"low": 0, "high": 1, "num": 2},
    }


def test_a_recipe_without_a_search_keeps_its_digest():
    assert "search" not in canonical(MergeRecipe(members=("a",)))
    assert "joint" not in canonical(MergeRecipe(members=("a",)))


def test_points_of_a_range():
    assert RangeSpec(low=0, high=1, num=3).points() == [0, 0.5, 1]
    assert RangeSpec(low=1, high=100, num=3, log=True).points() == pytest.approx([1, 10, 100])
    assert RangeSpec(low=1, high=3, num=5, whole=True).points() == [1, 2, 3]
    assert all(isinstance(point, int) for point in RangeSpec(low=1, high=3, num=5, whole=True).points())


def test_a_grid_of_lists_has_every_combination():
    spec = SearchSpec(over={"a": {"low": 0, "high": 1, "num": 2, "each": "member"}, "b": ["x", "y"]})
    space = Space.of(spec, 2)
    candidates = list(sample(space, spec, 0))
    assert len(candidates) == num_candidates(space, spec) == 8
    assert candidates[:3] == [{"a": [0, 0], "b": "x"}, {"a": [0, 0], "b": "y"}, {"a": [0, 1], "b": "x"}]


def test_draws_follow_the_seed_and_keep_to_their_ranges():
    over = {
        "a": {"low": 1, "high": 4, "whole": True},
        "b": {"low": 0.01, "high": 1, "log": True, "each": 2},
        "c": [[1], [2]],
    }

    def drawn(sampler, seed):
        spec = SearchSpec(over=over, sampler=sampler, num_candidates=15)
        sampling = sample(Space.of(spec, 3), spec, seed)
        found = [next(sampling)]
        while len(found) < 15:
            found.append(sampling.send(float(found[-1]["a"]) if len(found) % 4 else None))
        return found

    for sampler in ("random", "tpe"):
        first = drawn(sampler, 0)
        assert first == drawn(sampler, 0)
        assert first != drawn(sampler, 1)
        assert all(isinstance(one["a"], int) and 1 <= one["a"] <= 4 for one in first)
        assert all(len(one["b"]) == 2 and all(0.01 <= value <= 1 for value in one["b"]) for one in first)
        assert {tuple(one["c"]) for one in first} == {(1,), (2,)}


def test_paths_lead_through_mappings_lists_and_keys_with_dots():
    content = {"parameters": {"density": {"heads": 1.0}, "weights": [1, 2]}, "rules": [{"parameters": {}}]}
    settings = {r"parameters.density.attention\.output": 0.3, "parameters.weights.1": 5, "rules.0.parameters.t": 0.5}
    assert apply_settings(content, settings) == {
        "parameters": {"density": {"heads": 1.0, r"attention\.output": 0.3}, "weights": [1, 5]},
        "rules": [{"parameters": {"t": 0.5}}],
    }
    assert content["parameters"]["weights"] == [1, 2]
    with pytest.raises(ValueError, match=r"parameters.weights.2: '2' is no place in a list of 2"):
        apply_settings(content, {"parameters.weights.2": 1})
    with pytest.raises(ValueError, match=r"parameters.density.heads is 1.0, not a mapping"):
        apply_settings(content, {"parameters.density.heads.x": 1})


def test_a_table_refuses_what_is_none(tmp_path):
    (tmp_path / "t.jsonl").write_text("not a table\n")
    with pytest.raises(MergeError, match="not a table of candidates"):
        CandidateTable(tmp_path / "t.jsonl", {})
    (tmp_path / "t.jsonl").write_text('{"half a pur')
    table = CandidateTable(tmp_path / "t.jsonl", {"for": "a test"})
    table.append({"values": 1})
    assert (tmp_path / "t.jsonl").read_text() == '{"for": "a test"}\n{"values": 1}\n'


def test_the_verb_shows_the_candidates(zoo, capsys):
    file = zoo / "recipe.yaml"
    file.write_text(json.dumps(as_plain(recipe_of(zoo, {"parameters.scale": [0.1, 0.9]}), zoo / "merges")))
    assert main([str(file), "--dry-run"]) == 0
    assert "a grid of 2 candidates" in capsys.readouterr().out
    assert not (zoo / "merges").exists()
    assert main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "2 candidates" in shown
    assert str(zoo / "merges" / "m-search") in shown
    assert "scale" in shown


def test_a_loss_that_is_not_finite_is_null_in_the_table(tmp_path):
    table = CandidateTable(tmp_path / "t.jsonl", {"for": "a test"})
    record = {"results": {"sst": {"validation_accuracy": 0.5, "test_loss": float("nan")}}, "scores": [float("inf"), 1]}
    wanted = {"results": {"sst": {"validation_accuracy": 0.5, "test_loss": None}}, "scores": [None, 1]}
    assert table.append(record) == wanted
    assert CandidateTable(tmp_path / "t.jsonl", {"for": "a test"}).records == [wanted]
