"""Object ids as git computes them, so that what clients compare (blob, tree, commit ids) is what git would say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime


def blob_id(content: bytes) -> str:
    """Return the id of a file's content."""
    return _object_id(b"blob", content)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the text git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(blobs: Mapping[str, str]) -> dict[str, str]:
    """Return the id of every folder.

    Args:
        blobs: Path of each file -> its blob id.

    Returns:
        Path of each folder -> its tree id; the root is the empty string.
    """
    children: dict[str, dict[str, str | None]] = {"": {}}
    for path in blobs:
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, {})[name] = blobs[path]
        while folder:
            parent, _, name = folder.rpartition("/")
            siblings = children.setdefault(parent, {})
            if name in siblings:
                break
            siblings[name] = None
            folder = parent
    ids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: (-path.count("/"), path == "")):
        rows: list[tuple[bytes, bytes]] = []
        for name, blob in children[folder].items():
            encoded = name.encode()
            if blob is None:  # git sorts folders as if their names ended in a slash
                child = ids[f"{folder}/{name}" if folder else name]
                rows.append((encoded + b"/", b"40000 " + encoded + b"\0" + bytes.fromhex(child)))
            else:
                rows.append((encoded, b"100644 " + encoded + b"\0" + bytes.fromhex(blob)))
        ids[folder] = _object_id(b"tree", b"".join(row for _, row in sorted(rows)))
    return ids


def commit_id(tree: str, parent: str | None, author: str, date: datetime, message: str) -> str:
    """Return the id of a commit.

    Args:
        tree: Id of its root folder.
        parent: The commit before it, if any.
        author: Name of who made it.
        date: When, in UTC; git keeps whole seconds.
        message: Title, and after an empty line the description.

    Returns:
        40 hexadecimal digits.
    """
    who = f"{author} <{author}@users.noreply> {int(date.timestamp())} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
    return _object_id(b"commit", ("\n".join(lines) + f"\n\n{message}\n").encode())


def _object_id(kind: bytes, content: bytes) -> str:
    """Hash a git object with its header."""
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
