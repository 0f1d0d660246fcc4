"""Checkpoints: what is read is what was saved, what is written safetensors reads, and nothing is half there."""

import errno
import json
import os
import pickle
import resource
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_zoo.checkpoint import CheckpointReader, verify_weights, write_checkpoint
from hf_zoo.errors import CheckpointError
from hf_zoo.files import sha256_of
from hf_zoo.folders import new_folder
from hf_zoo.shards import TensorInfo, is_finite


def make_tensors():
    """One tensor of every kind a model holds."""
    draw = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(5, 3, generator=draw),
        "encoder.half": torch.randn(7, generator=draw).half(),
        "encoder.brain": torch.randn(2, 3, generator=draw).bfloat16(),
        "norm.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "wide": torch.randn(3, dtype=torch.float64, generator=draw),
    }


def layout_of(tensors):
    return {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}


def assert_same(reader, tensors):
    assert set(reader) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(reader[name], tensor, rtol=0, atol=0)
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype


def test_one_file_equals_what_the_safetensors_library_writes(tmp_path):
    tensors = make_tensors()
    written = write_checkpoint(tmp_path / "model", reversed(tensors.items()), layout_of(tensors))
    save_file(tensors, tmp_path / "oracle.safetensors", metadata={"format": "pt"})
    assert written == [tmp_path / "model" / "model.safetensors"]
    assert json.loads(written[0].read_bytes()[8:].split(b"}}")[0] + b"}}")["mask"]["dtype"] == "BOOL"
    assert sha256_of(written[0]) == sha256_of(tmp_path / "oracle.safetensors")


def test_shards_hold_every_tensor_once_within_the_limit(tmp_path):
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)}
    written = write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors), max_shard_bytes=100)
    shards = [path for path in written if path.suffix == ".safetensors"]
    assert [path.name for path in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(name for path in shards for name in load_file(path)) == sorted(tensors)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"]["layer.6"] == "model-00004-of-00004.safetensors"
    assert_same(CheckpointReader.open(tmp_path / "model"), tensors)


def test_a_sharded_checkpoint_loads_in_the_stock_class(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path / "whole")
    reader = CheckpointReader.open(tmp_path / "whole")
    files = {"config.json": tmp_path / "whole" / "config.json"}
    write_checkpoint(tmp_path / "cut", reader.items(), reader.layout, files, max_shard_bytes=4_000)
    loaded, info = BertModel.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_writing_into_a_tensor_read_leaves_the_file_alone(tmp_path):
    tensors = make_tensors()
    write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors))
    before = sha256_of(tmp_path / "model" / "model.safetensors")
    CheckpointReader.open(tmp_path / "model")["encoder.weight"].fill_(3.0)
    assert sha256_of(tmp_path / "model" / "model.safetensors") == before


def test_bin_files_are_read_and_tied_tensors_come_once(tmp_path):
    tensors = make_tensors()
    torch.save(tensors | {"decoder.weight": tensors["encoder.weight"]}, tmp_path / "pytorch_model.bin")
    reader = CheckpointReader.open(tmp_path)
    assert_same(reader, tensors)


def test_old_bin_files_that_cannot_be_mapped_are_read(tmp_path):
    tensors = make_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(CheckpointReader.open(tmp_path), tensors)


class _Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_bin_file_with_code_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused"):
        CheckpointReader.open(tmp_path)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        CheckpointReader.open(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, cut):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        verify_weights(tmp_path)


def test_a_header_that_lies_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor 'w' is float32 \[3\] but lies in bytes 0 to 8"):
        CheckpointReader.open(tmp_path)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "1 NaN"), (float("-inf"), "1 infinite")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(tmp_path, value, word):
    tensors = make_tensors()
    verify_weights_after_saving(tensors, tmp_path)
    tensors["encoder.brain"][1, 2] = value
    with pytest.raises(CheckpointError, match=rf"tensor 'encoder\.brain' in model\.safetensors holds {word} of 6"):
        verify_weights_after_saving(tensors, tmp_path)


def verify_weights_after_saving(tensors, folder):
    save_file(tensors, folder / "model.safetensors")
    verify_weights(folder)


def test_finite_values_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((4,), 3e38))
    assert is_finite(torch.full((4,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([("a", torch.zeros(2))], "1 tensors never came, first 'b'"),
        ([("a", torch.zeros(2)), ("c", torch.zeros(2))], "'c' was not announced"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "'a' came twice"),
        ([("a", torch.zeros(3))], r"'a' is float32 \[3\], float32 \[2\] was announced"),
        ([("a", torch.zeros(2).half())], r"'a' is float16 \[2\], float32 \[2\] was announced"),
        ([("a", torch.tensor([0.0, float("nan")]))], "'a' to be written holds 1 NaN of 2 values"),
    ],
)
def test_a_stream_that_breaks_its_word_leaves_nothing(tmp_path, stream, message):
    layout = {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((2,), torch.float32)}
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "model", iter(stream), layout)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_it_is_to_be_replaced(tmp_path):
    tensors = make_tensors()
    write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors), {"note": b"old"})
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors), {"note": b"new"})
    assert (tmp_path / "model" / "note").read_bytes() == b"old"
    write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors), {"note": b"new"}, replace=True)
    assert (tmp_path / "model" / "note").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_read(tmp_path):
    num_floats = shutil.disk_usage(tmp_path).free  # four times the free bytes

    def tensors():
        pytest.fail("the space was not checked first")
        yield

    with pytest.raises(CheckpointError, match=r"are needed and .* are free: make room"):
        write_checkpoint(tmp_path / "model", tensors(), {"a": TensorInfo((num_floats,), torch.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_system_met_in_the_middle_leaves_nothing(tmp_path):
    tensors = {"a": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    tensors = make_tensors()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="model: the disk is full while 121 B were being written: make room"):
        write_checkpoint(tmp_path / "model", tensors.items(), layout_of(tensors))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_spared(tmp_path):
    stem = f".model.partial-{socket.gethostname()}-"
    dead, living = tmp_path / f"{stem}{2**22 + 1}", tmp_path / f"{stem}{os.getppid()}"
    dead.mkdir()
    living.mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "note").write_text("there")
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "model"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "not a file of its own folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "names 'model-00001-of-00002.safetensors'"),
        ("[]", "not an index of weights"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader.open(tmp_path)


def test_a_selection_reads_under_other_names_and_names_what_is_missing():
    reader = CheckpointReader.of(make_tensors(), "mine")
    chosen = reader.select({"weight": "encoder.weight"})
    assert_same(chosen, {"weight": make_tensors()["encoder.weight"]})
    with pytest.raises(CheckpointError, match=r"mine: no tensor 'head' \(1 of 2 are missing\)"):
        reader.select({"a": "head", "b": "mask"})


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"org/zoo: no weights: expected one of model\.safetensors"):
        CheckpointReader.open(tmp_path, "org/zoo")
