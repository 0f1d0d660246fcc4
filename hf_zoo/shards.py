"""The safetensors format written by hand: every offset known beforehand, every folder whole or absent.

The safetensors library wants all tensors of a file at once. Here the header goes first and each tensor to its place as
it comes, so a file of any size costs the memory of one tensor.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hf_zoo.errors import CheckpointError
from hf_zoo.folders import disk_error
from hf_zoo.hashing import FollowingHash

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
JOURNAL_FILE = ".written.jsonl"
MAX_SHARD_BYTES = 50_000_000_000  # what transformers 5 writes: one file for all but the largest models
MAX_WRITE_BYTES = 1 << 30  # one pwrite moves at most 2 GiB on Linux
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        shape: Its shape.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Describe a tensor at hand."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity; integers always are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no reductions
        tensor = tensor.float()
    # One pass without temporaries: NaN and infinity survive a sum. A sum may also overflow by itself, hence the exact
    # test after it. float16 and bfloat16 are summed in float32.
    total = tensor.sum() if tensor.is_complex() else tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def describe_nonfinite(tensor: Tensor) -> str:
    """Return how many entries are NaN and how many infinite, in words."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    counts = {"NaN": int(torch.isnan(tensor).sum()), "infinite": int(torch.isinf(tensor).sum())}
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    return f"{' and '.join(parts)} of {tensor.numel()} values"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Read what a safetensors file holds, and check that every byte it promises is there.

    Returns:
        Names with shapes and types, and names with the place of their first byte in the file.

    Raises:
        CheckpointError: If the file is truncated, too long or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: truncated or not safetensors: {size} bytes, header of {length}: fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted((tuple(entry["data_offsets"]), name) for name, entry in header.items())
            layout = {
                name: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors header: {error!r}") from error
    position = 0
    for (begin, end), name in entries:
        if begin != position or end - begin != layout[name].nbytes:
            raise CheckpointError(f"{path}: tensor {name!r} is {layout[name]} but lies in bytes {begin} to {end}")
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: truncated or too long: its tensors end at byte {8 + length + position}, the file at {size}: "
            "fetch it again"
        )
    return layout, {name: 8 + length + begin for (begin, _), name in entries}


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    layout: Mapping[str, TensorInfo],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finite: bool = True,
) -> list[Path]:
    """Write `model.safetensors`, or shards and their index, into an existing folder.

    Every offset is known before the first tensor comes, so a tensor goes to its place when it comes and is let go.

    Args:
        folder: An existing folder.
        tensors: Name and tensor, in any order, each name once.
        layout: What will come: names in the order shards are cut, shapes and types.
        max_shard_bytes: Largest file; one tensor is never split.
        finite: Refuse NaN and infinity.

    Returns:
        The weights files, index last where there is one.

    Raises:
        CheckpointError: If the disk is full, or a tensor is unknown, missing, double, of another shape or type, or
            not finite.
    """
    with WeightsWriter(folder, layout, max_shard_bytes=max_shard_bytes, finite=finite) as writer:
        for name, tensor in tensors:
            writer.put(name, tensor)
    return writer.paths


class WeightsWriter:
    """`model.safetensors`, or shards and their index, filled in any order and from several threads.

    A context manager: leaving it checks that everything came and gives the files their names; an exception leaves
    nothing behind.

    Args:
        folder: An existing folder.
        layout: What will come: names in the order shards are cut, shapes and types.
        max_shard_bytes: Largest file; one tensor is never split.
        finite: Refuse NaN and infinity.
        resume: Continue files of the same layout that a killed process left in the folder; what it had written is
            listed in a journal there.
        hashed: Take the file's hash while it is written.
        sync: Wait until the disk has the files, before they get their names.

    Attributes:
        paths: The weights files, index last where there is one.
        digest: The SHA-256 of the only file, once it stands, where it was asked for; null for several files.
    """

    digest: str | None = None

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, TensorInfo],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        finite: bool = True,
        resume: bool = False,
        hashed: bool = False,
        sync: bool = True,
    ) -> None:
        self._folder, self._layout, self._finite, self._sync = folder, layout, finite, sync
        self._hashed = hashed
        self._hash: FollowingHash | None = None
        self._journal = folder / JOURNAL_FILE if resume else None
        self._done: set[tuple[str, int, int]] = set()
        cuts = _cut(layout, max_shard_bytes)
        many = [f"model-{i:05d}-of-{len(cuts):05d}.safetensors" for i in range(1, len(cuts) + 1)]
        names = [WEIGHTS_FILE] if len(cuts) == 1 else many
        self._shards = [_ShardWriter(folder / name, cut) for name, cut in zip(names, cuts, strict=True)]
        self._home = {name: shard for shard in self._shards for name in shard.layout}
        self._missing = {name: max(layout[name].numel, 1) for name in self._home}
        self._lock = Lock()
        self.paths = [shard.path for shard in self._shards] + [folder / INDEX_FILE] * (len(cuts) > 1)

    def __enter__(self) -> WeightsWriter:
        try:
            begun = [shard.begin(resume=self._journal is not None) for shard in self._shards]
            if self._journal is not None:
                self._done = _read_journal(self._journal) if all(begun) else set()
                for name, _, count in self._done:
                    self._missing[name] -= max(count, 1)
                self._lines = self._journal.open("a" if self._done else "w", buffering=1)
            if self._hashed and len(self._shards) == 1:
                (shard,) = self._shards
                self._hash = FollowingHash(shard.partial, shard.size)
                self._hash.written(0, shard.size - sum(info.nbytes for info in shard.layout.values()))
                for name, start, count in self._done:
                    self._tell(name, start, count)
        except OSError as error:
            self._discard()
            raise disk_error(self._folder, error, self._nbytes) from error
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor.

        Raises:
            CheckpointError: If it is unknown, double, of another shape or type, or not finite, or the disk is full.
        """
        if name in self._layout and tuple(tensor.shape) != self._layout[name].shape:
            raise CheckpointError(f"tensor {name!r} is {TensorInfo.of(tensor)}, {self._layout[name]} was announced")
        self.put_piece(name, 0, tensor.detach().reshape(-1))

    def position(self, name: str, start: int) -> tuple[str, int]:
        """Return where an entry of a tensor lies: in which file, and at which byte."""
        shard = self._home[name]
        return shard.path.name, shard.offsets[name] + start * self._layout[name].dtype.itemsize

    def has(self, name: str, start: int, count: int) -> bool:
        """Return whether these entries were written by the process that was killed."""
        inside = (n for other, s, n in self._done if other == name and start <= s < start + max(count, 1))
        return bool(self._done) and sum(max(n, 1) for n in inside) >= max(count, 1)

    def put_piece(self, name: str, start: int, piece: Tensor) -> None:
        """Write some entries of a tensor, each once.

        Args:
            name: The tensor.
            start: Place of the first entry in the tensor laid out flat.
            piece: Flat, in the tensor's type.

        Raises:
            CheckpointError: If the tensor is unknown, an entry comes twice, the type is another, a value is not
                finite, or the disk is full.
        """
        if name not in self._layout:
            raise CheckpointError(f"tensor {name!r} was not announced")
        if (name, start, piece.numel()) in self._done:
            return
        if piece.dtype != self._layout[name].dtype:
            raise CheckpointError(f"tensor {name!r} is {TensorInfo.of(piece)}, {self._layout[name]} was announced")
        if self._finite and not is_finite(piece):
            raise CheckpointError(f"tensor {name!r} to be written holds {describe_nonfinite(piece)}: nothing was kept")
        with self._lock:
            self._missing[name] -= max(piece.numel(), 1)
            if self._missing[name] < 0:
                raise CheckpointError(f"tensor {name!r} came twice")
        try:
            self._home[name].put(name, start, piece)
            self._tell(name, start, piece.numel())
            if self._journal is not None:  # after the data: a line promises what lies in the file
                self._lines.write(json.dumps([name, start, piece.numel()]) + "\n")
        except OSError as error:
            raise disk_error(self._folder, error, self._nbytes) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        digest = None if self._hash is None else self._hash.finish()
        try:
            if kind is None:
                self.digest = digest
                pending = [name for name, missing in self._missing.items() if missing]
                if pending:
                    raise CheckpointError(f"{self._folder}: {len(pending)} tensors never came, first {min(pending)!r}")
                for shard in self._shards:
                    shard.finish(self._sync)
                self._write_index()
                if self._journal is not None:
                    self._journal.unlink()
        except OSError as error:
            raise disk_error(self._folder, error, self._nbytes) from error
        finally:
            if hasattr(self, "_lines"):
                self._lines.close()
            if kind is not KeyboardInterrupt or self._journal is None:
                self._discard()

    def _tell(self, name: str, start: int, count: int) -> None:
        if self._hash is not None:
            begin = self.position(name, start)[1]
            self._hash.written(begin, begin + count * self._layout[name].dtype.itemsize)

    @property
    def _nbytes(self) -> int:
        return sum(info.nbytes for info in self._layout.values())

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        weight_map = {name: self._home[name].path.name for name in sorted(self._home)}
        index = {"metadata": {"total_size": self._nbytes}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _discard(self) -> None:
        for shard in self._shards:
            shard.discard()


class _ShardWriter:
    """One safetensors file with a place for every tensor."""

    def __init__(self, path: Path, layout: Mapping[str, TensorInfo]) -> None:
        self.path = path
        # The order of the safetensors library: wide types first keeps every tensor aligned, then by name.
        self.layout = dict(sorted(layout.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        self.partial = path.with_name(f".{path.name}.partial")
        self.offsets: dict[str, int] = {}
        self.handle = -1
        self.size = 0

    def begin(self, resume: bool = False) -> bool:
        """Open the file and write its header; return whether it was continued."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, info in self.layout.items():
            end = position + info.nbytes
            header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
            self.offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.offsets = {name: start + offset for name, offset in self.offsets.items()}
        self.size = start + position
        beginning = len(text).to_bytes(8, "little") + text
        if resume and self.partial.is_file() and self.partial.stat().st_size == start + position:
            self.handle = os.open(self.partial, os.O_RDWR)
            if os.pread(self.handle, len(beginning), 0) == beginning:
                return True
            os.close(self.handle)
        self.handle = os.open(self.partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        _reserve(self.handle, start + position)
        _write_at(self.handle, memoryview(beginning), 0)
        return False

    def put(self, name: str, start: int, piece: Tensor) -> None:
        piece = piece.detach().cpu().contiguous()
        if piece.numel():
            content = piece.view(torch.uint8).numpy()
            _write_at(self.handle, content.data, self.offsets[name] + start * piece.dtype.itemsize)

    def finish(self, sync: bool) -> None:
        if sync:
            os.fsync(self.handle)
        os.close(self.handle)
        self.handle = -1
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
        self.partial.unlink(missing_ok=True)


def _read_journal(path: Path) -> set[tuple[str, int, int]]:
    """Return what a journal lists; its last line may have been cut off."""
    done = set()
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            name, start, count = json.loads(line)
            done.add((str(name), int(start), int(count)))
    return done


def _cut(layout: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """Cut a layout into shards, in its order."""
    cuts: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in layout.items():
        if cuts[-1] and filled + info.nbytes > max_shard_bytes:
            cuts.append({})
            filled = 0
        cuts[-1][name] = info
        filled += info.nbytes
    return cuts


def _reserve(handle: int, num_bytes: int) -> None:
    """Give a file its size at once, so that a full disk is met before the work and not in its middle."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, num_bytes)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
        else:
            return
    os.ftruncate(handle, num_bytes)


def _write_at(handle: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content[:MAX_WRITE_BYTES], offset)
        content, offset = content[written:], offset + written
