"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


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


def weights_digest(folder: Path) -> str:
    """Return one SHA-256 for all weights files of a model's folder, shards included, adapters too."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(f"{path.name}:{sha256_of(path)}\n" for path in files).encode()).hexdigest()
