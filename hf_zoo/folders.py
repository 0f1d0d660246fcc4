"""Folders that appear whole or not at all, and disks that may be full."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from hf_zoo.errors import CheckpointError

SPACE_MARGIN_BYTES = 16 << 20  # config, processor, card and the file system's own bookkeeping
KEY_FILE = ".resume"  # in a folder that is not finished: what its content depends on
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def new_folder(
    folder: Path, *, replace: bool = False, resume_key: str | None = None, sync: bool = True
) -> Generator[Path, None, None]:
    """Give a temporary sibling that becomes `folder` when the block ends, and vanishes when it raises.

    What a killed process of this machine left behind for the same folder is removed first, or continued.

    Args:
        folder: The folder to make.
        replace: Replace an existing folder; else it is refused.
        resume_key: What the content depends on. What a killed or interrupted process left behind under the same key
            is given as it is, to be finished; null always begins anew.
        sync: Wait until the disk has everything, so that the folder is whole also after a power failure.

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
    keep = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(f"{stem}*"):
            if not _is_alive(stale.name.removeprefix(stem)) or stale == temporary:
                if resume_key is not None and not temporary.exists() and _key_of(stale) == resume_key:
                    os.rename(stale, temporary)
                else:
                    shutil.rmtree(stale)
        temporary.mkdir(exist_ok=True)
        if resume_key is not None:
            (temporary / KEY_FILE).write_text(resume_key)
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        yield temporary
        (temporary / KEY_FILE).unlink(missing_ok=True)
        if sync:
            _sync_tree(temporary)
        _put_in_place(temporary, folder)
        if sync:
            _sync(folder.parent)
    except KeyboardInterrupt:
        keep = resume_key is not None
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise disk_error(folder, error) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_empty(parents)


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


def disk_error(folder: Path, error: OSError, num_bytes: int | None = None) -> CheckpointError:
    """Say in words what the operating system answered when a folder was written.

    Args:
        folder: The folder, under its temporary or its own name.
        error: The answer.
        num_bytes: How much was being written.
    """
    folder = Path(
        *(re.sub(r"^\.(.+)\.partial-.*$", r"\1", part) for part in folder.parts)
    )  # the name it would have got
    if error.errno in FULL_DISK:
        need = f" while {_size(num_bytes)} were being written" if num_bytes else ""
        return CheckpointError(
            f"{folder}: the disk is full{need}: make room or choose another folder; nothing was kept"
        )
    return CheckpointError(f"{folder}: cannot be written: {error}")


def _key_of(folder: Path) -> str | None:
    try:
        return (folder / KEY_FILE).read_text()
    except OSError:
        return None


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder; an old one is moved aside first, and removed once the new one stands."""
    if folder.exists():
        old = temporary.with_name(f"{temporary.name}-old")
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)


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


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
