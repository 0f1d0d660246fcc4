"""`accelerate launch` on two processes is the same training as on one."""

import json
import subprocess

import pytest
import torch
from commands import REPOSITORY, environment, tree, verb, write_recipes

# 64 samples: two steps an epoch of two batches of 16, one a process, or accumulated by one process.
ARGUMENTS = [
    "vit.yaml",
    "training.epochs=3",
    "training.evaluate_train=true",
    "training.schedule=linear",
    "augmentation={mixup: 0.5, crop: pad, random_erasing: 0.2}",
    "snapshots.best=validation_loss",
    "vary.seed=[0,1]",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `one` and `two`: the same population trained by one process, and by two."""
    folder = tmp_path_factory.mktemp("processes")
    write_recipes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert verb("pretrain", *ARGUMENTS, "training.accumulation=2", "output=one") == 0
    config = REPOSITORY / "accelerate_configs" / "two_cpu.yaml"
    command = ["accelerate", "launch", "--config_file", str(config), "-m", "hf_zoo.pretrain", *ARGUMENTS, "output=two"]
    environ = environment(folder / "home")
    run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("2 members in two/zoo-vit") == 1  # one of the processes speaks
    return folder


@pytest.mark.parametrize("member", ["zoo-vit-000", "zoo-vit-001"])
def test_the_loss_curve_is_that_of_one_process(runs, member):
    one, two = (
        [json.loads(line) for line in (runs / name / "zoo-vit" / member / "results.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [record["step"] for record in two] == [record["step"] for record in one] == [0, 2, 4, 6]
    assert [record.keys() for record in two] == [record.keys() for record in one]
    for key in ("learning_rate", "running_loss", "train_loss", "validation_loss", "test_loss"):
        values = [torch.tensor([record[key] for record in records if key in record]) for records in (two, one)]
        # Gradients and sums are added up in another order: float32 rounds each to 6e-8, and six steps of AdamW, which
        # divides by the gradient's size, carry that on.
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)


def test_the_finished_folders_hold_the_same_files(runs):
    assert tree(runs / "two").keys() == tree(runs / "one").keys()
