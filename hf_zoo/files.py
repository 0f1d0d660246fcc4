"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

# What libraries and training leave in a model's folder and is never published.
PRIVATE_FOLDERS = frozenset({"__pycache__", "runs", "wandb", "trackio"})
CHUNK_BYTES = 1 << 20
CLOCK_GRAIN_NS = 2_000_000_000
MAX_DIGESTS = 10_000


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp is private to the user; a repo's files are not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_bytes` does, in the form of `json_text`."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Return JSON with sorted keys, so that equal content is equal text."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hashed only if it has changed since it was last asked for.

    A file in the Hub's cache is named after its hash. Other hashes are kept in the cache folder, under path, size,
    inode and times of the file; a file younger than the clock's grain is hashed every time.
    """
    real = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name) and real.parent.name == "blobs":
        return real.name
    from huggingface_hub.constants import HF_HOME

    memory = Path(HF_HOME) / "hf_zoo" / "digests.json"
    state = real.stat()
    key = f"{real}:{state.st_size}:{state.st_ino}:{state.st_mtime_ns}:{state.st_ctime_ns}"
    known = _read_digests(memory)
    if key in known:
        return known[key]
    digest = sha256_of(real)
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > CLOCK_GRAIN_NS:
        kept = dict(list(known.items())[-MAX_DIGESTS:])
        with contextlib.suppress(OSError):  # a home that cannot be written to costs time, no more
            write_json(memory, kept | {key: digest})
    return digest


def weights_digest(folder: Path) -> str:
    """Return one SHA-256 for all weights files of a model's folder, shards included, adapters too."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return remembered_sha256(files[0])
    return hashlib.sha256("".join(f"{path.name}:{remembered_sha256(path)}\n" for path in files).encode()).hexdigest()


def _read_digests(memory: Path) -> dict[str, str]:
    try:
        content = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
