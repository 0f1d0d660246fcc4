"""A disk that fills up in the middle of a training: said, nothing lost, and continued once there is room."""

import os
import shutil
import subprocess

import pytest
from commands import SMALL, tree, verb, write_recipes

DISK_MIB = 24
MODEL = [
    f"model.config={{patch_size: 4, num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 128, intermediate_size: {SMALL['intermediate_size']}}}"
]
ARGUMENTS = ["vit.yaml", *MODEL, "training.epochs=4", "training.schedule=cosine", "snapshots.best=validation_loss"]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if (
        os.geteuid()
        or shutil.which("mount") is None
        or subprocess.run(options, capture_output=True, check=False).returncode
    ):
        pytest.skip("a file system can only be mounted by root, where it is allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left=0):
    """Fill a file system with a file, but for `left` bytes."""
    free = shutil.disk_usage(folder).free
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - left)


# An epoch has four steps, each checkpoint about a MiB: the disk fills up before the first checkpoint, between the second
# and the third, or so that the weights find room and the optimizer's moments do not.
@pytest.mark.parametrize(("step", "left"), [(2, 0), (9, 0), (9, 700_000), (16, 0)])
def test_a_full_disk_loses_nothing(disk, tmp_path, monkeypatch, capsys, step, left):
    from hf_zoo import display

    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path)
    assert verb("pretrain", *ARGUMENTS, "output=whole") == 0
    expected = tree(tmp_path / "whole")

    class Filling(display.Bars):
        def step(self, done, total):
            super().step(done, total)
            if done == step:
                fill(disk, left)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(display, "Bars", Filling)
        status = verb("pretrain", *ARGUMENTS, "output=disk")
    err = capsys.readouterr().err
    assert status in {1, 2}
    assert "the disk is full" in err
    assert "Traceback" not in err
    checkpoints = sorted(path.name for path in (disk / "zoo-vit/zoo-vit-000/.training").glob("checkpoint-*"))
    assert checkpoints == ([f"checkpoint-{4 * ((step - 1) // 4)}"] if step > 4 else [])

    (disk / "filler").unlink()
    assert verb("pretrain", *ARGUMENTS, "output=disk") == 0
    assert tree(disk) == expected


def test_too_little_room_is_told_before_anything_is_written(disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path)
    fill(disk, left=1_000_000)
    capsys.readouterr()
    assert verb("pretrain", *ARGUMENTS, "output=disk") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: disk/zoo-vit: ")
    assert "make room" in err
    assert [path.name for path in disk.iterdir()] == ["filler"]
