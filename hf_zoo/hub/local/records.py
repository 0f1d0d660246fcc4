"""The records the store keeps, and how a commit's changes make one tree from another."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_zoo.hub.local import git, names
from hf_zoo.hub.local.refusal import Refusal


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its content, how git names it, and the commit that put it there."""

    sha256: str
    size: int
    blob: str
    lfs: bool
    commit: str

    @property
    def pointer_size(self) -> int:
        """Bytes of what git keeps in place of a large file."""
        return len(git.lfs_pointer(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    """One state of a repo."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Tag:
    """A name that stays with its commit."""

    commit: str
    message: str = ""


@dataclass
class Repo:
    """A repo's settings, branches and tags, as `repo.json` has them; its id is where it lies."""

    kind: str
    id: str
    folder: Path
    key: str
    created: str
    private: bool = False
    sdk: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, Tag] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @property
    def namespace(self) -> str:
        """The user or organisation that owns it."""
        return self.id.split("/", maxsplit=1)[0]

    @property
    def url_path(self) -> str:
        """The address of its page below the Hub's."""
        return self.id if self.kind == "model" else f"{names.KINDS[self.kind]}/{self.id}"

    def saved(self) -> dict[str, Any]:
        """Return the content of `repo.json`."""
        names = ("key", "created", "private", "sdk", "branches")
        tags = {name: asdict(tag) for name, tag in self.tags.items()}
        return {**{name: getattr(self, name) for name in names}, "tags": tags}


@dataclass(frozen=True)
class Change:
    """One line of a commit: a file put at a path, or a file or folder taken away."""

    path: str
    sha256: str | None = None  # None: deleted
    size: int = 0
    blob: str = ""
    lfs: bool = False
    folder: bool = False


def now() -> datetime:
    """Return the present moment in UTC."""
    return datetime.now(timezone.utc)


def timestamp(moment: datetime) -> str:
    """Write a moment as the Hub does: `2026-11-20T18:24:00.000Z`."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def apply_changes(before: Mapping[str, Entry], changes: list[Change]) -> dict[str, Entry]:
    """Return the tree after the changes; changed entries have no commit yet."""
    after = dict(before)
    for change in changes:
        if change.sha256 is not None:
            old = before.get(change.path)
            if old is not None and (old.sha256, old.lfs) == (change.sha256, change.lfs):
                after[change.path] = old
            else:
                after[change.path] = Entry(change.sha256, change.size, change.blob, change.lfs, "")
            continue
        below = change.path.rstrip("/") + "/"
        gone = [path for path in after if path == change.path or (change.folder and path.startswith(below))]
        if not gone:
            what = "folder" if change.folder else "file"
            raise Refusal(400, f"Cannot delete {change.path!r}: there is no such {what}.")
        for path in gone:
            del after[path]
    folders = {path[:index] for path in after for index, letter in enumerate(path) if letter == "/"}
    if clash := sorted(folders & after.keys()):
        raise Refusal(400, f"{clash[0]!r} cannot be both a file and a folder.")
    return after
