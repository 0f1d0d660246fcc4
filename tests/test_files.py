"""Files that are wholly there or not at all, also when the process dies in between."""

import hashlib
import os
import signal
import stat
import threading

import pytest

from hf_zoo.files import json_text, sha256_of, weights_digest, write_bytes, write_json, write_text


def test_content_and_folders_are_written(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_bytes(path, b"smaller")
    assert path.read_bytes() == b"smaller"
    assert [other.name for other in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # others may read a repo's files


def test_equal_json_is_equal_text(tmp_path):
    write_json(tmp_path / "one", {"b": 1, "a": ["ü", None, 1e-4]})
    write_json(tmp_path / "two", {"a": ["ü", None, 0.0001], "b": 1})
    assert (tmp_path / "one").read_text() == '{\n  "a": [\n    "ü",\n    null,\n    0.0001\n  ],\n  "b": 1\n}\n'
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert json_text({}) == "{}\n"


@pytest.mark.parametrize("moment", ["fsync", "chmod", "replace"])
def test_a_kill_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch, moment):
    path = tmp_path / "zoo.json"
    write_text(path, "old")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, moment, lambda *arguments, **keywords: os.kill(os.getpid(), signal.SIGKILL))
        write_text(path, "new, and longer")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "zoo.json"
    write_text(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [(other.name, other.read_text()) for other in tmp_path.iterdir()] == [("zoo.json", "old")]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "zoo.json"
    contents = [str(digit) * 100_000 for digit in range(10)]
    write_text(path, contents[0])
    done = threading.Event()
    seen = set()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_text(path, content)
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_digests_are_those_of_the_content(tmp_path):
    first, second = b"a" * 3_000_000, b"b"  # more than one chunk
    (tmp_path / "model-1.safetensors").write_bytes(first)
    expected = hashlib.sha256(first).hexdigest()
    assert sha256_of(tmp_path / "model-1.safetensors") == expected
    assert weights_digest(tmp_path) == expected
    (tmp_path / "model-2.safetensors").write_bytes(second)
    lines = f"model-1.safetensors:{expected}\nmodel-2.safetensors:{hashlib.sha256(second).hexdigest()}\n"
    assert weights_digest(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
