"""`hf zoo` runs hf-zoo once it is registered with the Hugging Face CLI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = Path(sys.executable).parent


@pytest.mark.skipif(not (COMMANDS / "hf-zoo").is_file(), reason="hf_zoo is not installed as a package here")
def test_the_hugging_face_cli_finds_the_command(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*command):
        return subprocess.run([COMMANDS / command[0], *command[1:]], env=environment, capture_output=True, text=True)

    assert run("hf-zoo", "register").returncode == 0
    direct, through = run("hf-zoo", "--help"), run("hf", "zoo", "--help")
    assert through.returncode == 0
    assert through.stdout == direct.stdout
    assert run("hf", "zoo", "pretrian").returncode == 2
