"""The safetensors format written by hand: every offset known beforehand, every folder whole or absent.

The safetensors library wants all tensors of a file at once. Here the header goes first and each tensor to its place as
it comes, so a file of any size costs the memory of one tensor.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_zoo.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 50_000_000_000  # what transformers 5 writes: one file for all but the largest models
SPACE_MARGIN_BYTES = 16 << 20  # config, processor, card and the file system's own bookkeeping
MAX_WRITE_BYTES = 1 << 30  # one pwrite moves at most 2 GiB on Linux
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
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
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize

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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read names, shapes and types of a safetensors file, and check that every byte it promises is there.

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
    return layout


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
    cuts = _cut(layout, max_shard_bytes)
    names = (
        [WEIGHTS_FILE]
        if len(cuts) == 1
        else [f"model-{i:05d}-of-{len(cuts):05d}.safetensors" for i in range(1, len(cuts) + 1)]
    )
    shards = [_ShardWriter(folder / name, cut) for name, cut in zip(names, cuts, strict=True)]
    home = {name: shard for shard in shards for name in shard.layout}
    pending = set(home)
    try:
        with ExitStack() as stack:
            for shard in shards:
                stack.callback(shard.discard)
                shard.begin()
            for name, tensor in tensors:
                _check_tensor(name, tensor, layout, pending, finite)
                home[name].put(name, tensor)
                pending.remove(name)
            if pending:
                raise CheckpointError(f"{folder}: {len(pending)} tensors never came, first {min(pending)!r}")
            for shard in shards:
                shard.finish()
    except OSError as error:
        raise _disk_error(folder, error, sum(info.nbytes for info in layout.values())) from error
    paths = [shard.path for shard in shards]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in layout.values())},
            "weight_map": {name: home[name].path.name for name in sorted(home)},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        paths.append(folder / INDEX_FILE)
    return paths


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """Give a temporary sibling that becomes `folder` when the block ends, and vanishes when it raises.

    What a killed process of this machine left behind for the same folder is removed first.

    Args:
        folder: The folder to make.
        replace: Replace an existing folder; else it is refused.

    Yields:
        The temporary folder to fill.

    Raises:
        CheckpointError: If the folder exists and is not to be replaced, or the disk is full.
    """
    if folder.exists() and not replace:
        raise CheckpointError(f"{folder}: exists already: choose another name, or remove it first")
    stem = f".{folder.name}.partial-{socket.gethostname()}-"
    temporary = folder.parent / f"{stem}{os.getpid()}"
    parents = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(f"{stem}*"):
            if not _is_alive(stale.name.removeprefix(stem)) or stale == temporary:
                shutil.rmtree(stale)
        temporary.mkdir()
    except OSError as error:
        raise _disk_error(folder, error) from error
    try:
        yield temporary
        _sync_tree(temporary)
        _put_in_place(temporary, folder)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise _disk_error(folder, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(parents)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that a file system has room before anything is written.

    Args:
        folder: Where the bytes will go; it need not exist.
        num_bytes: Bytes that will be written.

    Raises:
        CheckpointError: If they do not fit; names need and free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes + SPACE_MARGIN_BYTES > free:
        raise CheckpointError(
            f"{folder}: {_size(num_bytes + SPACE_MARGIN_BYTES)} are needed and {_size(free)} are free: "
            "make room, or choose another output folder"
        )


class _ShardWriter:
    """One safetensors file with a place for every tensor."""

    def __init__(self, path: Path, layout: Mapping[str, TensorInfo]) -> None:
        self.path = path
        # The order of the safetensors library: wide types first keeps every tensor aligned, then by name.
        self.layout = dict(sorted(layout.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        self.partial = path.with_name(f".{path.name}.partial")
        self.offsets: dict[str, int] = {}
        self.handle = -1

    def begin(self) -> None:
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
        self.handle = os.open(self.partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        _reserve(self.handle, start + position)
        _write_at(self.handle, memoryview(len(text).to_bytes(8, "little") + text), 0)

    def put(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel():
            content = tensor.reshape(-1).view(torch.uint8).numpy()
            _write_at(self.handle, content.data, self.offsets[name])

    def finish(self) -> None:
        os.fsync(self.handle)
        os.close(self.handle)
        self.handle = -1
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
        self.partial.unlink(missing_ok=True)


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


def _check_tensor(
    name: str, tensor: Tensor, layout: Mapping[str, TensorInfo], pending: set[str], finite: bool
) -> None:
    if name not in pending:
        known = "came twice" if name in layout else "was not announced"
        raise CheckpointError(f"tensor {name!r} {known}")
    if TensorInfo.of(tensor) != layout[name]:
        raise CheckpointError(f"tensor {name!r} is {TensorInfo.of(tensor)}, {layout[name]} was announced")
    if finite and not is_finite(tensor):
        raise CheckpointError(f"tensor {name!r} to be written holds {describe_nonfinite(tensor)}: nothing was kept")


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


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder; an old one is moved aside first, and removed once the new one stands."""
    if folder.exists():
        old = temporary.with_name(f"{temporary.name}-old")
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    _sync(folder.parent)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process.partition("-")[0]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _disk_error(folder: Path, error: OSError, num_bytes: int | None = None) -> CheckpointError:
    folder = Path(
        *(re.sub(r"^\.(.+)\.partial-.*$", r"\1", part) for part in folder.parts)
    )  # the name it would have got
    if error.errno in FULL_DISK:
        need = f" while {_size(num_bytes)} were being written" if num_bytes else ""
        return CheckpointError(
            f"{folder}: the disk is full{need}: make room or choose another folder; nothing was kept"
        )
    return CheckpointError(f"{folder}: cannot be written: {error}")


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
