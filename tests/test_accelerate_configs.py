import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "accelerate_configs"

PROGRAM = """
import sys
import torch
from accelerate import PartialState
state = PartialState(cpu=not torch.cuda.is_available())
total = torch.tensor([state.process_index + 1.0])
if state.num_processes > 1:
    torch.distributed.all_reduce(total)
print("world", state.num_processes, state.device.type, state.backend, int(total), *sys.argv[1:])
"""


def launch(tmp_path, config):
    """Launch a small module as a user would, without settings of this process's environment."""
    (tmp_path / "world.py").write_text(PROGRAM)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "CUDA"))}
    environment["PYTHONPATH"] = str(tmp_path)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    run = subprocess.run(
        [*launcher, "-m", "world", "recipe.yaml", "seed=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("world")]


@pytest.mark.parametrize(
    ("name", "kind", "precision"),
    [
        ("cpu", "NO", "no"),
        ("two_cpu", "MULTI_GPU", "no"),
        ("single_gpu", "NO", "bf16"),
        ("multi_gpu", "MULTI_GPU", "bf16"),
        ("fsdp", "FSDP", "bf16"),
        ("deepspeed", "DEEPSPEED", "bf16"),
    ],
)
def test_accelerate_reads_a_config(name, kind, precision):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type.value, config.mixed_precision) == (kind, precision)
    assert config.num_processes == (1 if kind == "NO" else 2)


def test_every_config_is_checked():
    named = {"cpu", "two_cpu", "single_gpu", "multi_gpu", "fsdp", "deepspeed"}
    assert {path.stem for path in CONFIGS.iterdir()} == named


def test_fsdp_writes_whole_weights():
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(CONFIGS / "fsdp.yaml")).fsdp_config
    assert (settings["fsdp_version"], settings["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")


def test_cpu_starts_one_process(tmp_path):
    assert launch(tmp_path, "cpu.yaml") == ["world 1 cpu None 1 recipe.yaml seed=1"]


def test_two_cpu_starts_two_processes_that_talk_over_gloo(tmp_path):
    assert launch(tmp_path, "two_cpu.yaml") == ["world 2 cpu gloo 3 recipe.yaml seed=1"] * 2
