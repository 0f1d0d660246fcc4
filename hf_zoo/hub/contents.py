"""What of a member's folder goes to a Hub, with the hashes a Hub compares by, and never with a token inside."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import get_token

from hf_zoo.errors import HubError
from hf_zoo.files import CHUNK_BYTES, PRIVATE_FOLDERS
from hf_zoo.population import POPULATION_FILE, SNAPSHOT_FOLDER

# A repo holds what loads and describes a model. Everything else stays here, above all pickles and what only training
# needs: `training_args.bin` keeps a `hub_token` in clear.
PUBLISHED_SUFFIXES = frozenset({
    ".jinja",
    ".json",
    ".jsonl",
    ".md",
    ".model",
    ".png",
    ".py",
    ".safetensors",
    ".svg",
    ".txt",
    ".yaml",
    ".yml",
})
_PRIVATE_FOLDERS = PRIVATE_FOLDERS | {SNAPSHOT_FOLDER}
_PRIVATE_FILES = re.compile(
    r"(training_args|trainer_state|optimizer|scheduler|scaler|rng_state)[\w-]*\.\w+|checkpoint-.*"
)
_TEXT_SUFFIXES = PUBLISHED_SUFFIXES - {".safetensors", ".png", ".model"}
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")  # as the Hub issues them
_LONGEST_TOKEN = 256
_SHORTEST_SECRET = 12  # a shorter `HF_TOKEN` is a word of a test Hub and may stand anywhere


@dataclass(frozen=True)
class RepoFile:
    """A file as it stands, or shall stand, in a repo.

    Attributes:
        path: Its path in the repo, with `/`.
        source: Where its content is, or the content itself.
        size: Its size in bytes.
        sha256: The hash by which a Hub knows it as a large file.
        blob: The hash by which a Hub knows it as a regular file (git's).
    """

    path: str
    source: Path | bytes
    size: int
    sha256: str
    blob: str

    @property
    def is_weights(self) -> bool:
        """Whether it holds weights or lists their shards."""
        return is_weights(self.path)


def is_weights(path: str) -> bool:
    """Whether a path of a repo holds weights or lists their shards."""
    return bool(_WEIGHTS.fullmatch(PurePosixPath(path).name))


def is_published(path: str) -> bool:
    """Whether a path inside a member's folder belongs into its repo."""
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") or part in _PRIVATE_FOLDERS or _PRIVATE_FILES.fullmatch(part) for part in parts):
        return False
    return PurePosixPath(path).suffix in PUBLISHED_SUFFIXES and path != POPULATION_FILE


def folder_files(folder: Path) -> tuple[dict[str, RepoFile], tuple[str, ...]]:
    """Read what a folder would publish.

    Args:
        folder: A member's, a snapshot's or a merge's folder.

    Returns:
        Path -> file, sorted, and the paths that stay here although they are not hidden.

    Raises:
        HubError: If a file leads out of the folder, cannot be read, or holds a token.
    """
    files, left_out = {}, []
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if not is_published(name):
            if not any(part.startswith(".") or part in _PRIVATE_FOLDERS for part in PurePosixPath(name).parts):
                left_out.append(name)
            continue
        if not path.resolve().is_relative_to(root):
            raise HubError(f"{path}: is a link out of its folder: replace it by the file itself, or remove it")
        files[name] = file_of(name, path)
    return files, tuple(left_out)


def file_of(name: str, source: Path | bytes) -> RepoFile:
    """Hash a file, refusing it if it holds a token.

    Args:
        name: Its path in the repo.
        source: Where it is, or its content.

    Raises:
        HubError: If it cannot be read or holds a token.
    """
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        tail = b""
        for chunk in _chunks(source):
            sha256.update(chunk)
            blob.update(chunk)
            if _has_token(tail + chunk, PurePosixPath(name).suffix in _TEXT_SUFFIXES):
                where = name if isinstance(source, bytes) else source
                raise HubError(f"{where}: holds a token, so nothing was published: remove it, and revoke the token")
            tail = chunk[-_LONGEST_TOKEN:]
    except OSError as error:
        raise HubError(f"{source!s}: cannot be read: {error.strerror}") from error
    return RepoFile(name, source, size, sha256.hexdigest(), blob.hexdigest())


def _chunks(source: Path | bytes) -> Iterable[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _has_token(content: bytes, is_text: bool) -> bool:
    token = (get_token() or "").encode()
    if len(token) >= _SHORTEST_SECRET and token in content:
        return True
    return is_text and bool(_TOKEN.search(content))
