"""A killed run, run again, is the run that was never killed: the same bytes in every file."""

import os
import signal

import pytest

from hf_zoo.population import Member
from hf_zoo.recipe.schema import FinetuneRecipe
from hf_zoo.training import callbacks
from hf_zoo.training.engine import train_population
from hf_zoo.training.preparing import known_tables
from runs import KINDS, Quiet, bytes_of, kill_at, make_recipe

# An epoch has 6 steps (of texts a few more). Kept are every fourth step, the ends of epochs and the best of them.
SNAPSHOTS = {"every_steps": 4, "every_epochs": 1, "best": "validation_loss"}


def run(recipe):
    return train_population(recipe, Quiet()).population


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A kind, and the files of a run that was never interrupted."""
    output = tmp_path_factory.mktemp(request.param)
    return request.param, bytes_of(run(make_recipe(request.param, output, snapshots=SNAPSHOTS)).folder)


# Before any checkpoint, between two, and in the middle of the second epoch, from a checkpoint there.
@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_killed_run_resumes_to_the_same_bytes(whole, step, tmp_path):
    kind, expected = whole
    recipe = make_recipe(kind, tmp_path, snapshots=SNAPSHOTS)
    kill_at(recipe, step)
    assert Member.open(tmp_path / "zoo" / "zoo-000").manifest.status == "training"
    got = bytes_of(run(recipe).folder)
    assert got.keys() == expected.keys()
    assert [name for name in expected if expected[name] != got[name]] == []


def test_a_run_killed_twice_and_an_adapter_resume_too(tmp_path):
    base = run(make_recipe("bert", tmp_path / "base")).folder / "zoo-000"
    keys = {
        "recipe_class": FinetuneRecipe,
        "objective": "sequence_classification",
        "parent": str(base),
        "model": {"adapter": {"rank": 2, "dropout": 0.1, "target_modules": ["query", "value"]}},
        "data": {"path": "docs-sentences", "num_train": 96, "num_eval": 32, "max_length": 32},
        "snapshots": SNAPSHOTS,
    }
    expected = bytes_of(run(make_recipe("bert", tmp_path / "whole", **keys)).folder)
    recipe = make_recipe("bert", tmp_path / "killed", **keys)
    kill_at(recipe, 5)
    kill_at(recipe, 9)
    got = bytes_of(run(recipe).folder)
    assert got.keys() == expected.keys()
    assert [name for name in expected if expected[name] != got[name]] == []
    assert "zoo-000/adapter_model.safetensors" in got


def test_a_run_killed_after_its_last_step_only_finishes(tmp_path):
    # Ten steps of six an epoch: the Trainer, asked to resume there, would train the epoch to its end.
    keys = {"training": {"epochs": 2, "batch_size": 16, "max_steps": 10}, "snapshots": SNAPSHOTS}
    expected = bytes_of(run(make_recipe("vit", tmp_path / "whole", **keys)).folder)
    recipe = make_recipe("vit", tmp_path / "killed", **keys)

    def kill_when_saved():
        original = callbacks.SnapshotCallback.on_save

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, args, state, control, **kwargs)

        callbacks.SnapshotCallback.on_save = on_save

    child = os.fork()
    if child == 0:
        known_tables.clear()
        kill_when_saved()
        train_population(recipe, Quiet())
        os._exit(1)
    os.waitpid(child, 0)
    checkpoints = list((tmp_path / "killed" / "zoo" / "zoo-000" / ".training").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-10"]
    got = bytes_of(run(recipe).folder)
    assert [name for name in expected if expected[name] != got.get(name)] == []
