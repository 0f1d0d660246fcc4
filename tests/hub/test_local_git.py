import shutil
import subprocess
from datetime import datetime, timezone

import pytest

from hf_zoo.hub.local import git

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def run_git(folder, *words, **environment):
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True, env=environment or None
    )
    return done.stdout.strip()


@needs_git
def test_ids_are_those_git_computes(tmp_path):
    files = {"b.txt": b"b", "b/c.txt": b"c", "b-d/e/f.txt": b"", "a": b"\x00\xff", "z/y/x/w": b"deep", "ü.md": b"u"}
    run_git(tmp_path, "init", "-q", "-b", "main")
    for path, content in files.items():
        if path == "b.txt":
            continue
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"b")
    run_git(tmp_path, "add", "-A")
    blobs = {path: git.blob_id(content) for path, content in files.items()}
    trees = git.tree_ids(blobs)
    assert trees[""] == run_git(tmp_path, "write-tree")
    assert blobs["a"] == run_git(tmp_path, "hash-object", "a")

    date = datetime(2026, 11, 20, 18, 24, 5, tzinfo=timezone.utc)
    who = {"NAME": "alice", "EMAIL": "alice@users.noreply", "DATE": f"{int(date.timestamp())} +0000"}
    environment = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
    made = run_git(tmp_path, "commit-tree", trees[""], "-m", "title\n\nmore", PATH="/usr/bin:/bin", **environment)
    assert git.commit_id(trees[""], None, "alice", date, "title\n\nmore") == made
    child = run_git(tmp_path, "commit-tree", trees[""], "-p", made, "-m", "x", PATH="/usr/bin:/bin", **environment)
    assert git.commit_id(trees[""], made, "alice", date, "x") == child


@needs_git
def test_folders_know_their_own_ids(tmp_path):
    trees = git.tree_ids({"a/b/c": git.blob_id(b"1"), "a/d": git.blob_id(b"2")})
    assert set(trees) == {"", "a", "a/b"}
    run_git(tmp_path, "init", "-q")
    (tmp_path / "c").write_bytes(b"1")
    run_git(tmp_path, "add", "c")
    assert trees["a/b"] == run_git(tmp_path, "write-tree")
