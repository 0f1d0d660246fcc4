"""Merges written by several threads: the same bytes as one thread's, and nothing left behind by a failure."""

import _thread
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError
from hf_zoo.files import sha256_of
from hf_zoo.inputs import PIECE_ENTRIES, MergeInputs
from hf_zoo.methods.base import Work
from hf_zoo.places import Places
from hf_zoo.streaming import run_works, write_merge
from hf_zoo.varying import plan_parts

SHAPES = {"a": (3, PIECE_ENTRIES), "b": (PIECE_ENTRIES // 2 + 7,), "c": (5, 4), "d": (), "empty": (0, 3)}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    readers = []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        tensors["count"] = torch.tensor([seed])
        path = tmp_path_factory.mktemp("member") / "model.safetensors"
        save_file(tensors, path)
        readers.append(CheckpointReader.open(path.parent, f"org/m{seed}"))
    return readers


def merger(method, members, **parameters):
    names = list(members[0])
    return plan_parts(method, parameters, (), Places(names, lambda: names, list), names)


@pytest.mark.parametrize("method", ["average", "ties", "dare", "slerp"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(method, members, tmp_path):
    base, *rest = members
    inputs = MergeInputs.of(rest[:2], base=base, seed=3)
    hashes, before = set(), torch.get_num_threads()
    for count in (1, 2, 5):
        folder = tmp_path / str(count)
        folder.mkdir()
        written = write_merge(folder, merger(method, members), inputs, num_threads=count)
        (path,) = written.paths
        assert written.digest == sha256_of(path)
        hashes.add(sha256_of(path))
    assert len(hashes) == 1
    assert torch.get_num_threads() == before


def test_what_is_written_is_what_is_merged_in_memory(members, tmp_path):
    base, *rest = members
    inputs = MergeInputs.of(rest, base=base)
    plan = merger("ties", members)
    write_merge(tmp_path, plan, inputs)
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in plan.merge(inputs):
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)
    assert int(written["count"]) == 1  # the first member's


def test_shards_are_cut_and_hold_everything(members, tmp_path):
    inputs = MergeInputs.of(members)
    written = write_merge(tmp_path, merger("average", members), inputs, max_shard_bytes=1_000_000)
    paths = written.paths
    assert written.digest is None
    assert [path.name for path in paths][-1] == "model.safetensors.index.json"
    assert len(paths) > 2
    read = CheckpointReader.open(tmp_path)
    oracle = torch.stack([member["a"].double() for member in members]).mean(0)
    torch.testing.assert_close(read["a"].double(), oracle, rtol=0, atol=1e-6)
    assert set(read) == {*SHAPES, "count"}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_failing_part_stops_the_merge_and_leaves_no_file(num_threads, members, tmp_path):
    bad = dict(members[1])
    bad["a"] = bad["a"].clone()
    bad["a"][2, -1] = float("nan")
    inputs = MergeInputs.of([members[0], CheckpointReader.of(bad, "org/bad"), members[2]])
    with pytest.raises(CheckpointError, match="org/bad: tensor 'a' holds 1 NaN"):
        write_merge(tmp_path, merger("average", members), inputs, num_threads=num_threads)
    assert list(tmp_path.iterdir()) == []


def test_float64_is_computed_in_on_request(members):
    rest = members[1:]
    oracle = torch.stack([member["a"].double() for member in rest]).mean(0)
    for dtype in (torch.float32, torch.float64):
        inputs = MergeInputs.of(rest, torch.float64, compute_dtype=dtype)
        merged = dict(merger("average", members).merge(inputs))["a"]
        error = float((merged - oracle).abs().max())
        assert (error < 1e-15) == (dtype == torch.float64)


def test_a_killed_merge_is_continued_with_the_same_bytes(tmp_path):
    shapes = {f"t{i:02d}": (PIECE_ENTRIES * 3 + 5,) for i in range(12)}
    code = f"""
import os, signal, sys, threading, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_streaming import merger_of, random_members
import hf_zoo.shards as shards
from hf_zoo.files import sha256_of
from hf_zoo.streaming import write_merge
members = random_members({list(shapes.items())!r})
count, plain = 0, shards.WeightsWriter.put_piece
def put_piece(self, *arguments):
    global count
    plain(self, *arguments)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
shards.WeightsWriter.put_piece = put_piece
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
written = write_merge(folder, *merger_of(members), num_threads=2, resume=True)
assert written.digest == sha256_of(written.paths[0])
print(count)
"""
    hashes = set()
    for name, kills in (("whole", ()), ("killed", (17, 9))):
        folder = tmp_path / name
        for after in kills:
            run = subprocess.run([sys.executable, "-c", code, str(folder), str(after)], capture_output=True)
            assert run.returncode == -9, run.stderr
            assert not (folder / "model.safetensors").exists()
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), "0"], capture_output=True, text=True, check=True
        )
        hashes.add(sha256_of(folder / "model.safetensors"))
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        # 12 tensors of 4 pieces; a part that was cut off is made again from its first piece
        assert int(done.stdout) == 48 if not kills else int(done.stdout) < 48
    assert len(hashes) == 1


def random_members(shapes):
    draw = torch.Generator().manual_seed(0)
    return [
        CheckpointReader.of({name: torch.randn(shape, generator=draw) for name, shape in shapes}, f"m{i}")
        for i in range(3)
    ]


def merger_of(members):
    base, *rest = members
    return merger("dare", members, election="total"), MergeInputs.of(rest, base=base)


def test_an_interrupt_leaves_the_parts_that_wait_unmade():
    made = []

    def run(put):
        made.append(0)
        if len(made) == 1:
            _thread.interrupt_main()  # what Ctrl-C does
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        run_works(lambda: [Work(1, run, "w")] * 40, lambda name, start, piece: None, 2)
    assert len(made) < 20  # 40 parts take a second on two threads, an interrupt a fraction of it
