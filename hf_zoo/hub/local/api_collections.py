"""Routes about collections."""

from __future__ import annotations

from typing import Any

from hf_zoo.hub.local import names
from hf_zoo.hub.local.api_repos import next_page
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.collection_store import Collection
from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.wire import Answer, json_answer

PAGE_SIZE = 100
ITEMS_IN_LISTING = 4
_METADATA = ("title", "description", "private", "theme", "position")


def create(call: Call) -> Answer:
    """Create a collection."""
    content = call.request.body.json()
    namespace = content.get("namespace") or call.caller.name
    if namespace is not None:
        names.repo_id(namespace, "x")
    call.hub.access.require_write(call.caller, str(namespace))
    made = call.hub.collections.create(
        str(namespace), content.get("title"), content.get("description"), content.get("private")
    )
    for item in [content["item"]] if isinstance(content.get("item"), dict) else []:
        made = _added(call, made, item, None)
    return json_answer(described(made))


def show(call: Call) -> Answer:
    """Show a collection."""
    return json_answer(described(visible(call, _found(call)), call))


def listing(call: Call) -> Answer:
    """List the collections of an owner, or those that have an item; each with its first items."""
    owners = {owner.lower() for value in call.request.query.get("owner", []) for owner in value.split(",")}
    wanted = {item for value in call.request.query.get("item", []) for item in value.split(",")}
    found = [
        described(collection, call, ITEMS_IN_LISTING)
        for collection in call.hub.collections.all()
        if (not collection.private or call.caller.owns(collection.owner))
        and (not owners or collection.owner.lower() in owners)
        and (not wanted or wanted & {f"{names.KINDS[item.kind]}/{item.id}" for item in collection.items})
    ]
    start = call.request.number("cursor", 0, len(found))
    limit = call.request.number("limit", PAGE_SIZE, PAGE_SIZE)
    headers = {"Link": next_page(call, start + limit)} if 0 < limit < len(found) - start else {}
    page = found[start : start + limit]
    for collection in page:
        del collection["position"]  # the client counts positions itself and accepts none
    return json_answer(page, headers=headers)


def update(call: Call) -> Answer:
    """Change title, description, privacy, theme or position."""
    collection = _found_to_write(call)
    content = call.request.body.json()
    changes = {key: content[key] for key in _METADATA if key in content}
    return json_answer({"success": True, "data": described(call.hub.collections.update(collection, changes))})


def delete(call: Call) -> Answer:
    """Delete a collection."""
    call.hub.collections.delete(_found_to_write(call))
    return json_answer({})


def add_item(call: Call) -> Answer:
    """Add a repo to a collection."""
    collection = _found_to_write(call)
    content = call.request.body.json()
    item = content.get("item")
    if not isinstance(item, dict):
        raise Refusal(400, "Expected the item as an object with 'id' and 'type'.")
    return json_answer(described(_added(call, collection, item, content.get("note"))))


def update_item(call: Call) -> Answer:
    """Change an item's note or position."""
    collection = _found_to_write(call)
    content = call.request.body.json()
    changes: dict[str, Any] = {key: content[key] for key in ("note", "position") if key in content}
    return json_answer(described(call.hub.collections.update_item(collection, call.parts["item"], changes)))


def delete_item(call: Call) -> Answer:
    """Take an item out of a collection."""
    return json_answer(described(call.hub.collections.delete_item(_found_to_write(call), call.parts["item"])))


def visible(call: Call, collection: Collection) -> Collection:
    """Return the collection if the caller may see it; otherwise it is not there."""
    if collection.private and not call.caller.owns(collection.owner):
        raise Refusal(404, f"Collection not found: {collection.slug}")
    return collection


def described(collection: Collection, call: Call | None = None, most: int | None = None) -> dict[str, Any]:
    """Describe a collection as the clients read it; items that the caller may not see are left out."""
    items = []
    for position, item in enumerate(collection.items):
        if call is not None and not _item_visible(call, item.kind, item.id):
            continue
        one: dict[str, Any] = {"_id": item.key, "id": item.id, "type": item.kind, "position": position}
        if item.note:
            one["note"] = {"text": item.note, "html": ""}
        items.append(one)
    return {
        "slug": collection.slug,
        "title": collection.title,
        "description": collection.description,
        "owner": collection.owner,
        "items": items[:most],
        "lastUpdated": collection.updated,
        "position": collection.position,
        "private": collection.private,
        "theme": collection.theme,
        "upvotes": 0,
        "gating": False,
    }


def _item_visible(call: Call, kind: str, repo_id: str) -> bool:
    try:
        call.hub.access.require_read(call.caller, call.hub.store.repo(kind, repo_id))
    except Refusal:
        return False
    return True


def _added(call: Call, collection: Collection, item: dict[str, Any], note: Any) -> Collection:
    """Add an item that exists and that the caller may see."""
    if item.get("type") not in names.KINDS:
        raise Refusal(400, f"Invalid item type: {item.get('type')!r:.40}. Expected one of {', '.join(names.KINDS)}.")
    repo_id = "/".join(names.split_repo_id(item.get("id")))
    repo = call.hub.access.require_read(call.caller, call.hub.store.repo(item["type"], repo_id))
    return call.hub.collections.add_item(collection, repo.kind, repo.id, note)


def _found(call: Call) -> Collection:
    return call.hub.collections.get(f"{call.parts['namespace']}/{call.parts['slug']}")


def _found_to_write(call: Call) -> Collection:
    collection = visible(call, _found(call))
    call.hub.access.require_write(call.caller, collection.owner)
    return collection
