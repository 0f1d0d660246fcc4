"""Checkpoints: weights read lazily by name, and written so that a folder is wholly there or not at all.

A checkpoint is a folder with safetensors shards, old `.bin` files (read with `weights_only=True`) or a PEFT adapter.
Reading maps the files into memory, so a tensor costs memory while somebody holds it and nothing before. Writing needs
the names, shapes and types beforehand and then takes the tensors in any order, one at a time.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_zoo.errors import CheckpointError
from hf_zoo.folders import new_folder, require_space
from hf_zoo.shards import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    WEIGHTS_FILE,
    TensorInfo,
    describe_nonfinite,
    is_finite,
    read_header,
    write_weights,
)

BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MAX_READ_BYTES = 1 << 30  # one call reads at most 2 GiB on Linux


class CheckpointReader(Mapping[str, Tensor]):
    """A read-only mapping name -> tensor that reads a tensor when it is asked for.

    Names are those on disk; tied tensors appear once. Whoever writes into a tensor changes a private copy of its
    pages, never the file.

    Args:
        source: Whose weights these are, for messages.
        layout: Names in order, with shapes and types.
        read: Returns the tensor of a name.
        files: Name -> the file that holds it; nothing for tensors in memory.
        read_piece: Returns entries `start` to `stop` of a tensor laid out flat; null cuts them out of the tensor.
    """

    def __init__(
        self,
        source: str,
        layout: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        files: Mapping[str, Path],
        read_piece: Callable[[str, int, int], Tensor] | None = None,
    ) -> None:
        self.source = source
        self.layout = dict(layout)
        self._read = read
        self._read_piece = read_piece or (lambda name, start, stop: read(name).reshape(-1)[start:stop])
        self._files = dict(files)

    @classmethod
    def open(cls, folder: str | Path, source: str | None = None) -> CheckpointReader:
        """Open a folder's weights, reading nothing but their headers.

        Args:
            folder: Folder with `model.safetensors`, its index, `pytorch_model.bin`, its index, or a PEFT adapter.
            source: Whose they are, for messages; null for the folder.

        Raises:
            CheckpointError: If there are no weights, or a file is truncated or damaged.
        """
        folder = Path(folder)
        source = source or str(folder)
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            from hf_zoo.adapters import open_adapter

            return open_adapter(folder, source)
        if (folder / WEIGHTS_FILE).is_file():
            return _open_safetensors(source, [folder / WEIGHTS_FILE])
        if (folder / INDEX_FILE).is_file():
            return _open_safetensors(source, _files_of_index(source, folder / INDEX_FILE))
        if (folder / BIN_FILE).is_file():
            return _open_bin(source, [folder / BIN_FILE])
        if (folder / BIN_INDEX_FILE).is_file():
            return _open_bin(source, _files_of_index(source, folder / BIN_INDEX_FILE))
        known = ", ".join([WEIGHTS_FILE, INDEX_FILE, BIN_FILE, BIN_INDEX_FILE, ADAPTER_CONFIG_FILE])
        raise CheckpointError(f"{source}: no weights: expected one of {known} in {folder}")

    @classmethod
    def of_file(cls, path: Path, source: str) -> CheckpointReader:
        """Open one safetensors file, reading nothing but its header.

        Raises:
            CheckpointError: If it is truncated or damaged.
        """
        return _open_safetensors(source, [path])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str) -> CheckpointReader:
        """Present tensors in memory as a checkpoint."""
        return cls(source, {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, {})

    def select(self, names: Mapping[str, str]) -> CheckpointReader:
        """Return a reader of some tensors under other names.

        Args:
            names: New name -> name here.

        Raises:
            CheckpointError: If a tensor is not here.
        """
        missing = [name for name in names.values() if name not in self.layout]
        if missing:
            raise CheckpointError(
                f"{self.source}: no tensor {missing[0]!r} ({len(missing)} of {len(names)} are missing)"
            )
        layout = {new: self.layout[name] for new, name in names.items()}
        files = {new: self._files[name] for new, name in names.items() if name in self._files}
        return CheckpointReader(
            self.source,
            layout,
            lambda new: self[names[new]],
            files,
            lambda new, start, stop: self.piece(names[new], start, stop),
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(f"{self.source} has no tensor {name!r}")
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries `start` to `stop` of a tensor laid out flat; of a safetensors file only these are read."""
        return self._read_piece(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.layout[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type without reading it."""
        return self.layout[name].dtype

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.layout.values())

    def place(self, name: str) -> str:
        """Say in words where a tensor is: whose it is, its name and its file."""
        inside = f" in {self._files[name].name}" if name in self._files else ""
        return f"{self.source}: tensor {name!r}{inside}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once, in order."""
        return tuple(dict.fromkeys(self._files.values()))


def verify_weights(folder: str | Path, finite: bool = True) -> None:
    """Check that a folder's weights are whole.

    Args:
        folder: Folder with weights.
        finite: Also read every floating tensor and refuse NaN and infinity.

    Raises:
        CheckpointError: If a file is truncated or damaged, or a tensor is not finite; names file and tensor.
    """
    reader = CheckpointReader.open(folder)
    for name in reader if finite else ():
        if not is_finite(reader[name]):
            raise CheckpointError(f"{reader.place(name)} holds {describe_nonfinite(reader[name])}")


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    layout: Mapping[str, TensorInfo],
    files: Mapping[str, bytes | Path] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> list[Path]:
    """Write a new folder with weights and further files; it appears whole or not at all.

    Args:
        folder: The folder to make.
        tensors: Name and tensor, in any order, each name once; one is held at a time.
        layout: What will come: names in the order shards are cut, shapes and types.
        files: Name -> content, or the file to copy.
        max_shard_bytes: Largest weights file; one tensor is never split.
        replace: Replace an existing folder; else it is refused.

    Returns:
        The weights files written.

    Raises:
        CheckpointError: If the folder exists, the disk is too small, or a tensor is unknown, missing, of another shape
            or not finite.
    """
    folder = Path(folder)
    require_space(folder, sum(info.nbytes for info in layout.values()))
    with new_folder(folder, replace=replace) as temporary:
        for name, content in (files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                (temporary / name).write_bytes(content)
        written = write_weights(temporary, tensors, layout, max_shard_bytes=max_shard_bytes)
    return [folder / path.name for path in written]


def _open_safetensors(source: str, paths: list[Path]) -> CheckpointReader:
    layout: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    offsets: dict[str, int] = {}
    for path in paths:
        of_file, begins = read_header(path)
        layout.update(of_file)
        offsets.update(begins)
        files.update(dict.fromkeys(of_file, path))
    mapped: dict[Path, Any] = {}
    opened: dict[Path, _OpenFile] = {}

    def read(name: str) -> Tensor:
        path = files[name]
        if path not in mapped:
            mapped[path] = safe_open(path, framework="pt").__enter__()
        return mapped[path].get_tensor(name)

    def read_piece(name: str, start: int, stop: int) -> Tensor:
        # Not from the mapping: reading into a small buffer that stays in the processor's cache is faster than faulting
        # pages in, and leaves no pages of the file in the process.
        path = files[name]
        if path not in opened:
            opened.setdefault(path, _OpenFile(path))  # two threads may both open it; one stays
        dtype = layout[name].dtype
        return opened[path].read(offsets[name] + start * dtype.itemsize, stop - start, dtype)

    return CheckpointReader(source, layout, read, files, read_piece)


def _open_bin(source: str, paths: list[Path]) -> CheckpointReader:
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    seen: set[tuple[Any, ...]] = set()
    for path in paths:
        for name, tensor in _load_bin(path).items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, expected tensors only")
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and identity in seen:
                continue  # tied: the first name is the one a model saves under
            seen.add(identity)
            tensors[name], files[name] = tensor, path
    layout = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    return CheckpointReader(source, layout, tensors.__getitem__, files)


def _load_bin(path: Path) -> dict[str, Any]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by torch before 1.6, which cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than weights; convert it to safetensors") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected name -> tensor")
    return content


def _files_of_index(source: str, path: Path) -> list[Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: not an index of weights: {error}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}, which is not a file of its own folder")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{source}: {path.name} names {missing[0]!r}, which is not there: fetch it again")
    return [path.parent / name for name in names]


class _OpenFile:
    """A file open for reading at any place, by several threads; closed when it is let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Read values from a byte on into memory of their own."""
        buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        content = buffer.numpy().data
        while content:
            done = os.preadv(self._handle, [content[:MAX_READ_BYTES]], offset)
            if not done:
                raise CheckpointError(f"{self._path}: became shorter while it was read: fetch it again")
            content, offset = content[done:], offset + done
        return buffer.view(dtype)
