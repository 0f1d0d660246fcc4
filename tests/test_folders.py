"""Folders that appear whole: what a killed process left is continued under the same key, and removed under another."""

import subprocess
import sys

import pytest

from hf_zoo.folders import new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from hf_zoo.folders import new_folder
with new_folder(Path(sys.argv[1]), resume_key=sys.argv[2]) as folder:
    (folder / "half").write_text("done")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path):
    """The folder a process was killed over while it made it under the key `one`."""
    folder = tmp_path / "made"
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), "one"]).returncode == -9
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    return folder


@pytest.mark.parametrize(("key", "continued"), [("one", True), ("two", False), (None, False)])
def test_a_killed_process_s_folder_is_continued_under_its_key_alone(killed, key, continued):
    with new_folder(killed, resume_key=key) as folder:
        assert (folder / "half").exists() == continued
        (folder / "other").write_text("")
    assert {path.name for path in killed.iterdir()} == ({"half", "other"} if continued else {"other"})
    assert list(killed.parent.iterdir()) == [killed]


@pytest.mark.parametrize(("key", "kept"), [("one", True), (None, False)])
def test_an_interrupt_keeps_what_can_be_continued(tmp_path, key, kept):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "made", resume_key=key):
        raise KeyboardInterrupt
    assert bool(list(tmp_path.iterdir())) == kept


def test_an_error_leaves_nothing_even_with_a_key(tmp_path):
    with pytest.raises(ValueError, match="wrong"), new_folder(tmp_path / "sub" / "made", resume_key="one"):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []
