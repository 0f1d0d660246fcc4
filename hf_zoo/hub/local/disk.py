"""Writing so that what was acknowledged is still there after a crash, and what was not is never seen."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hf_zoo.errors import HubError
from hf_zoo.hub.local.refusal import Refusal


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably; nothing happens if it exists."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_json(path: Path, content: Any, incoming: Path) -> None:
    """Replace a small JSON file: a reader, or a restart, finds the old content or the new.

    Args:
        path: The file; its folder exists.
        content: What it shall hold.
        incoming: Where it lies until it is complete, on the same file system.
    """
    temporary = incoming / secrets.token_hex(8)
    try:
        with temporary.open("xb") as file:
            file.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(path.read_bytes())


class FolderLock:
    """Hold a folder for one process; the system lets go of it however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise HubError(
                f"{folder} is already served by another process. Use that Hub, stop it, or serve another folder."
            ) from None

    def release(self) -> None:
        """Let another process have the folder."""
        self._file.close()


class Stored(NamedTuple):
    """What a content turned out to be."""

    sha256: str
    size: int


class ObjectStore:
    """Keep file contents under their SHA-256; equal contents are kept once.

    Args:
        folder: Where the objects lie.
        incoming: Where they lie until they are complete and checked, on the same file system.
    """

    def __init__(self, folder: Path, incoming: Path) -> None:
        self._folder = folder
        self._incoming = incoming
        make_folder(folder)

    def path(self, sha256: str) -> Path:
        """Return where the object lies, or would lie."""
        return self._folder / sha256[:2] / sha256[2:]

    def has(self, sha256: str) -> bool:
        """Whether the object is complete and durable."""
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """Return the object's size in bytes."""
        return self.path(sha256).stat().st_size

    @contextmanager
    def batch(self) -> Generator[ObjectBatch, None, None]:
        """Yield a batch; contents that are not kept by its end are gone."""
        batch = ObjectBatch(self, self._incoming)
        try:
            yield batch
        finally:
            batch.discard()

    def receive(self, chunks: Iterable[bytes], sha256: str | None, size: int | None = None) -> Stored:
        """Keep a content that arrives in pieces, once it is what it claims to be.

        Args:
            chunks: The pieces.
            sha256: The digest it must have, or None if any will do.
            size: The bytes it must have, or None if any will do.

        Returns:
            Digest and size.

        Raises:
            Refusal: 400, if it is too short, too long or has another digest. Nothing is kept then.
        """
        digest, received = hashlib.sha256(), 0
        with self.temporary() as (file, path):
            for chunk in chunks:
                received += len(chunk)
                if size is not None and received > size:
                    raise Refusal(400, f"Object {sha256} was announced with {size} bytes; more than that came.")
                digest.update(chunk)
                file.write(chunk)
            if size is not None and received != size:
                raise Refusal(400, f"Object {sha256} was announced with {size} bytes; {received} came.")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise Refusal(400, f"Object {sha256} arrived with SHA-256 {digest.hexdigest()}; upload it again.")
            file.flush()
            os.fsync(file.fileno())
            self.take({digest.hexdigest(): path})
        return Stored(digest.hexdigest(), received)

    @contextmanager
    def temporary(self) -> Generator[tuple[BinaryIO, Path], None, None]:
        """Yield a file among the incoming ones; it is gone afterwards unless it was renamed."""
        handle, name = tempfile.mkstemp(dir=self._incoming)
        path = Path(name)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)

    def take(self, complete: Mapping[str, Path]) -> None:
        """Give durable files their places under their digests, durably."""
        folders = set()
        for sha256, path in complete.items():
            target = self.path(sha256)
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                folders.add(self._folder)
            os.replace(path, target)
            folders.add(target.parent)
        for folder in folders:
            sync_folder(folder)

    def all(self) -> Iterator[tuple[str, Path]]:
        """Yield digest and path of every object."""
        for folder in self._folder.iterdir():
            for path in folder.iterdir():
                yield folder.name + path.name, path


class ObjectBatch:
    """Small contents that are kept together: one wait for the disk in place of one for each.

    Args:
        objects: Where they go.
        incoming: Where they lie until then.
    """

    def __init__(self, objects: ObjectStore, incoming: Path) -> None:
        self._objects = objects
        self._incoming = incoming
        self._written: dict[str, Path] = {}

    def add(self, content: bytes) -> str:
        """Write a content and return its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in self._written and not self._objects.has(sha256):
            path = self._incoming / secrets.token_hex(8)
            self._written[sha256] = path
            path.write_bytes(content)
        return sha256

    def keep(self) -> None:
        """Make the contents durable; the first file waits for the disk, and most of the others went with it."""
        for path in self._written.values():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._objects.take(self._written)
        self._written = {}

    def discard(self) -> None:
        """Forget what was not kept."""
        for path in self._written.values():
            path.unlink(missing_ok=True)
