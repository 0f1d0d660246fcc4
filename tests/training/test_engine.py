"""Populations: what is skipped, refused, marked as failed, kept."""

import json
import os

import pytest
import torch

from hf_zoo.errors import DataError, PopulationError, RecipeError
from hf_zoo.population import Member, Population
from hf_zoo.recipe.grid import expand
from hf_zoo.training.engine import check_space, train_population
from hf_zoo.training.estimate import Estimate, MemberEstimate, estimate
from runs import SMALL, Quiet, bytes_of, make_recipe


def test_a_population_has_the_grids_members_in_order(tmp_path):
    recipe = make_recipe("vit", tmp_path, vary={"seed": [0, 1], "training.learning_rate": [1e-3, 1e-2]})
    population = train_population(recipe, Quiet()).population
    assert [member.name for member in population] == [f"zoo-00{index}" for index in range(4)]
    assert [member.factors for member in population][1] == {"seed": 0, "training.learning_rate": 1e-2}
    assert len({member.manifest.sha256 for member in population}) == 4
    assert [member.name for member in population.where(learning_rate=1e-2)] == ["zoo-001", "zoo-003"]
    frame = Population.open(tmp_path / "zoo").to_dataframe()
    assert list(frame["seed"]) == [0, 0, 1, 1]
    assert frame["test_accuracy"].notna().all()


def test_finished_members_are_skipped_and_the_rest_is_trained(tmp_path):
    vary = {"seed": [0, 1, 2]}
    listener = Quiet()
    train_population(make_recipe("vit", tmp_path, vary=vary, members="1"), listener)
    assert listener.trained == ["zoo-001"]
    before = bytes_of(tmp_path / "zoo" / "zoo-001")
    listener = Quiet()
    train_population(make_recipe("vit", tmp_path, vary=vary), listener)
    assert listener.trained == ["zoo-000", "zoo-002"]
    assert bytes_of(tmp_path / "zoo" / "zoo-001") == before


def test_equal_recipes_make_equal_bytes_whatever_ran_before(tmp_path):
    vary = {"seed": [0, 1]}
    both = train_population(make_recipe("timm", tmp_path / "both", vary=vary), Quiet()).population
    torch.manual_seed(12345)  # nothing may depend on the global generators
    alone = train_population(make_recipe("timm", tmp_path / "alone", vary=vary, members="1"), Quiet()).population
    assert bytes_of(both.folder / "zoo-001") == bytes_of(alone.folder / "zoo-001")


def test_another_recipe_on_the_folder_is_refused_with_the_difference(tmp_path):
    train_population(make_recipe("vit", tmp_path), Quiet())
    before = bytes_of(tmp_path)
    changed = make_recipe("vit", tmp_path, training={"epochs": 3, "batch_size": 16})
    with pytest.raises(PopulationError, match=r"training\.epochs: 2 -> 3"):
        train_population(changed, Quiet())
    assert bytes_of(tmp_path) == before


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "thesis.tex").write_text("years of work")
    with pytest.raises(PopulationError, match="is not empty and no population"):
        train_population(make_recipe("vit", tmp_path), Quiet())
    assert bytes_of(tmp_path) == {"zoo/thesis.tex": b"years of work"}


def test_a_diverging_member_fails_alone(tmp_path):
    recipe = make_recipe("vit", tmp_path, vary={"training.learning_rate": [1e25, 1e-3]}, training={"epochs": 2, "batch_size": 16, "optimizer": "sgd"})  # fmt: skip
    listener = Quiet()
    outcome = train_population(recipe, listener)
    assert list(outcome.failures) == list(listener.failures) == ["zoo-000"]
    assert "lower training.learning_rate" in outcome.failures["zoo-000"]
    failed, finished = outcome.population
    assert (failed.manifest.status, finished.manifest.status) == ("failed", "finished")
    assert failed.manifest.failure == outcome.failures["zoo-000"]


def test_mistakes_in_data_or_model_leave_nothing_behind(tmp_path):
    with pytest.raises(RecipeError, match="TrainingArguments has no such field"):
        train_population(make_recipe("vit", tmp_path, training={"arguments": {"lerning_rate": 1}}), Quiet())
    with pytest.raises(DataError, match="no column 'labl'"):
        train_population(make_recipe("vit", tmp_path, data={"path": "digits", "label": "labl"}), Quiet())
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_folder_do_not_train_the_same_member(tmp_path):
    recipe = make_recipe("vit", tmp_path)
    read, write = os.pipe()

    def start_another():
        if os.fork() == 0:
            other = Quiet()
            train_population(recipe, other)
            os.write(write, json.dumps(other.trained).encode())
            os._exit(0)
        os.wait()

    # While the first run is in its third step, a second one starts on the same folder.
    train_population(recipe, Quiet(3, start_another))
    assert json.loads(os.read(read, 1000)) == []
    assert Member.open(tmp_path / "zoo" / "zoo-000").manifest.status == "finished"
    assert not list((tmp_path / "zoo" / "zoo-000").glob(".lock"))


def snapshots_of(tmp_path, **spec):
    recipe = make_recipe("vit", tmp_path, snapshots=spec, training={"epochs": 4, "batch_size": 16})
    return train_population(recipe, Quiet()).population[0]


def test_the_schedule_is_what_is_kept(tmp_path):
    spaced = snapshots_of(tmp_path / "log", every_epochs=None, log_spaced=4, initial=False)
    # 24 steps: round(24 ** (i / 3)) for i = 0 ... 3.
    assert [snapshot.step for snapshot in spaced.manifest.snapshots] == [1, 3, 8, 24]
    last = snapshots_of(tmp_path / "last", keep_last=2)
    assert [snapshot.name for snapshot in last.manifest.snapshots] == ["epoch-003", "epoch-004"]
    assert sorted(path.name for path in (last.folder / "snapshots").iterdir()) == ["epoch-003", "epoch-004"]


def test_the_best_snapshot_is_the_best_record(tmp_path):
    member = snapshots_of(tmp_path, every_epochs=2, best="validation_loss")
    records = member.manifest.results
    best = min(records, key=lambda record: record["validation_loss"])
    (kept,) = [snapshot for snapshot in member.manifest.snapshots if snapshot.name == "best"]
    assert (kept.step, kept.epoch) == (best["step"], best["epoch"])
    assert kept.metrics["validation_loss"] == best["validation_loss"]
    with pytest.raises(RecipeError, match="did you mean 'validation_loss'"):
        snapshots_of(tmp_path / "wrong", best="validation_los")


def test_records_and_snapshots_tell_the_same(tmp_path):
    member = train_population(make_recipe("vit", tmp_path), Quiet()).population[0]
    lines = [json.loads(line) for line in (member.folder / "results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert "running_loss" not in lines[0]
    assert tuple(lines) == member.manifest.results
    first = member.load(revision="epoch-000")
    table_loss = lines[0]["validation_loss"]
    # An untrained classifier of ten classes is close to chance: -log(1/10).
    assert table_loss == pytest.approx(2.3026, abs=0.15)
    assert type(first).__name__ == "ViTForImageClassification"
    assert not list(tmp_path.rglob("training_args.bin"))
    assert not (member.folder / ".training").exists()


def test_an_estimate_is_what_is_used(tmp_path):
    recipe = make_recipe("vit", tmp_path, vary={"seed": [0, 1]}, model={"type": "vit", "config": {**SMALL, "patch_size": 4, "hidden_size": 64, "intermediate_size": 256}})  # fmt: skip
    costs = estimate(expand(recipe))
    train_population(recipe, Quiet())
    for name, cost in costs.members.items():
        folder = tmp_path / "zoo" / name
        manifest = Member.open(folder).manifest
        assert cost.num_parameters == manifest.num_parameters
        assert cost.num_steps == manifest.results[-1]["step"]
        assert cost.num_snapshots == len(manifest.snapshots)
        seen = {}
        for path in folder.rglob("*.safetensors"):
            seen[path.stat().st_ino] = path.stat().st_size
        # Within the files' headers.
        assert sum(seen.values()) == pytest.approx(cost.num_bytes, rel=0.05)


def test_too_small_a_disk_is_told_beforehand(tmp_path):
    needed = Estimate({"zoo-000": MemberEstimate(1, 1, 1, 1, num_bytes=1 << 60)})
    with pytest.raises(PopulationError, match="make room"):
        check_space(needed, tmp_path / "zoo")
