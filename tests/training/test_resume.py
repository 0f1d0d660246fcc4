"""A killed run, run again, is the run that was never killed: the same bytes in every file."""

import pytest
from conftest import KINDS, Quiet, bytes_of, kill_at, make_recipe

from hf_zoo.population import Member
from hf_zoo.training.engine import train_population


def run(recipe):
    return train_population(recipe, Quiet()).population


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_killed_run_resumes_to_the_same_bytes(kind, step, tmp_path):
    # An epoch has 6 steps (2 for text cut into pieces has its own number); kept are steps 2, 4, ... and both epochs.
    snapshots = {"every_steps": 2, "every_epochs": 1, "best": "validation_loss"}
    whole = run(make_recipe(kind, tmp_path / "whole", snapshots=snapshots))
    killed = make_recipe(kind, tmp_path / "killed", snapshots=snapshots)
    kill_at(killed, step)
    assert Member.open(tmp_path / "killed" / "zoo" / "zoo-000").manifest.status == "training"
    resumed = run(killed)
    expected, got = bytes_of(whole.folder), bytes_of(resumed.folder)
    assert got.keys() == expected.keys()
    assert [name for name in expected if expected[name] != got[name]] == []
