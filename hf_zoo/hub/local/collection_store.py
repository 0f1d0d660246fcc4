"""Collections: ordered lists of repos with notes, one small file each."""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_zoo.hub.local import names
from hf_zoo.hub.local.disk import make_folder, read_json, sync_folder, write_json
from hf_zoo.hub.local.records import now, timestamp
from hf_zoo.hub.local.refusal import Refusal

MAX_TITLE = 59
MAX_DESCRIPTION = 150
MAX_NOTE = 500
THEMES = ("orange", "blue", "green", "purple", "pink", "indigo")


@dataclass(frozen=True)
class Item:
    """One line of a collection."""

    key: str
    id: str
    kind: str
    note: str | None = None


@dataclass(frozen=True)
class Collection:
    """A collection; its slug ends in its key, so that it may be renamed."""

    key: str
    owner: str
    title: str
    description: str | None
    private: bool
    theme: str
    position: int
    updated: str
    items: tuple[Item, ...] = ()

    @property
    def slug(self) -> str:
        """Its address: `owner/title-key`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.owner}/{words + '-' if words else ''}{self.key}"


class CollectionStore:
    """Keep the collections of a Hub.

    Args:
        folder: Where their files lie.
        incoming: Where a file lies until it is complete.
    """

    def __init__(self, folder: Path, incoming: Path) -> None:
        self._folder = folder
        self._incoming = incoming
        self._lock = threading.RLock()
        make_folder(folder)
        self._collections: dict[str, Collection] = {}
        for path in folder.glob("*/*.json"):
            content = read_json(path)
            items = tuple(Item(**item) for item in content.pop("items"))
            self._collections[path.stem] = Collection(key=path.stem, items=items, **content)

    def all(self) -> list[Collection]:
        """Return every collection, the latest first."""
        return sorted(list(self._collections.values()), key=lambda one: (one.updated, one.key), reverse=True)

    def get(self, slug: str) -> Collection:
        """Return a collection by its slug; only the key at its end counts, as on the Hub.

        Args:
            slug: `owner/title-key`.

        Returns:
            The collection.

        Raises:
            Refusal: 404, if there is none.
        """
        owner, _, rest = slug.partition("/")
        found = self._collections.get(rest[-24:])
        if found is None or found.owner.lower() != owner.lower():
            raise Refusal(404, f"Collection not found: {slug}")
        return found

    def create(self, owner: str, title: Any, description: Any, private: Any) -> Collection:
        """Create a collection.

        Args:
            owner: A checked namespace.
            title: 1 to 59 characters.
            description: At most 150 characters, or None.
            private: Whether only its owner sees it.

        Returns:
            The new collection.

        Raises:
            Refusal: 409, if the owner has one of that title; 400, if something is not as above.
        """
        with self._lock:
            _check(title=title, description=description, private=private)
            for other in self._collections.values():
                if other.owner.lower() == owner.lower() and other.title == title:
                    raise Refusal(
                        409, f"{owner} already has a collection {title!r}: {other.slug}", extra={"slug": other.slug}
                    )
            return self._save(
                Collection(secrets.token_hex(12), owner, title, description, bool(private), "orange", 0, "")
            )

    def update(self, collection: Collection, changes: dict[str, Any]) -> Collection:
        """Change title, description, privacy, theme or position."""
        _check(**changes)
        with self._lock:
            return self._save(replace(self.get(collection.slug), **changes))

    def delete(self, collection: Collection) -> None:
        """Delete a collection; its repos stay."""
        with self._lock:
            current = self.get(collection.slug)
            path = self._path(current)
            path.unlink()
            sync_folder(path.parent)
            del self._collections[current.key]

    def add_item(self, collection: Collection, kind: str, item_id: str, note: Any) -> Collection:
        """Add a line at the end.

        Args:
            collection: Where to.
            kind: Kind of repo.
            item_id: Its id.
            note: At most 500 characters, or None.

        Returns:
            The collection as it is now.

        Raises:
            Refusal: 409, if it is in the collection already.
        """
        _check_text("note", note, MAX_NOTE)
        with self._lock:
            current = self.get(collection.slug)
            if any((item.kind, item.id.lower()) == (kind, item_id.lower()) for item in current.items):
                raise Refusal(409, f"{kind} {item_id} is already in the collection {current.slug}.")
            item = Item(secrets.token_hex(12), item_id, kind, note or None)
            return self._save(replace(current, items=(*current.items, item)))

    def update_item(self, collection: Collection, key: str, changes: dict[str, Any]) -> Collection:
        """Change a line's note or its position."""
        _check_text("note", changes.get("note"), MAX_NOTE)
        with self._lock:
            current = self.get(collection.slug)
            item = _item(current, key)
            items = [other for other in current.items if other.key != key]
            position = changes.get("position", current.items.index(item))
            if not isinstance(position, int) or isinstance(position, bool):
                raise Refusal(400, f"Invalid position: {position!r:.80} is no number.")
            note = changes.get("note", item.note)
            items.insert(max(0, min(position, len(items))), replace(item, note=note or None))
            return self._save(replace(current, items=tuple(items)))

    def delete_item(self, collection: Collection, key: str) -> Collection:
        """Take a line out."""
        with self._lock:
            current = self.get(collection.slug)
            _item(current, key)
            return self._save(replace(current, items=tuple(item for item in current.items if item.key != key)))

    def _path(self, collection: Collection) -> Path:
        return self._folder / collection.owner / f"{collection.key}.json"

    def _save(self, collection: Collection) -> Collection:
        """Write a collection durably; only then does anybody see the change."""
        collection = replace(collection, updated=timestamp(now()))
        content = asdict(collection)
        del content["key"]
        path = self._path(collection)
        make_folder(path.parent)
        write_json(path, content, self._incoming)
        self._collections[collection.key] = collection
        return collection


def _item(collection: Collection, key: str) -> Item:
    for item in collection.items:
        if item.key == key:
            return item
    raise Refusal(404, f"The collection {collection.slug} has no item {key!r:.80}.")


def _check(**changes: Any) -> None:
    """Refuse what the Hub would refuse; only what is given is looked at."""
    if "title" in changes:
        if not isinstance(changes["title"], str) or not changes["title"].strip():
            raise Refusal(400, "A collection needs a title.")
        _check_text("title", changes["title"], MAX_TITLE)
    _check_text("description", changes.get("description"), MAX_DESCRIPTION)
    if "theme" in changes and changes["theme"] not in THEMES:
        raise Refusal(400, f"Invalid theme: expected one of {', '.join(THEMES)}.")
    if not isinstance(changes.get("private") or False, bool):
        raise Refusal(400, "Invalid private: expected true or false.")
    position = changes.get("position", 0)
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 10_000:
        raise Refusal(400, f"Invalid position: {position!r:.80}.")


def _check_text(what: str, value: Any, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, str) or len(value) > most or not names.is_text(value):
        raise Refusal(400, f"Invalid {what}: expected a text of at most {most} characters.")
