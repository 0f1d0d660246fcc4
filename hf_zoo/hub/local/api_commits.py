"""Routes through which files come in: preupload, LFS, commit."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlencode

from hf_zoo.hub.local import names
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.card_check import check_card
from hf_zoo.hub.local.disk import ObjectBatch
from hf_zoo.hub.local.records import Change, Repo
from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.store import regular_file
from hf_zoo.hub.local.wire import Answer, json_answer, parse_object

MAX_REGULAR_BYTES = 10 << 20
MAX_COMMIT_LINE_BYTES = 15 << 20  # a regular file in base64 and its path
MAX_CHANGES = 50_000
MAX_PREUPLOAD_FILES = 1000
MAX_LFS_OBJECTS = 1000
MAX_MESSAGE = 65_000
MAX_ATTRIBUTES_BYTES = 1 << 20
UPLOAD_SECONDS = 24 * 3600

_LFS_TYPE = "application/vnd.git-lfs+json"


def preupload(call: Call) -> Answer:
    """Say of each file whether it goes through LFS, is ignored, or is here already."""
    repo = call.repo_to_write()
    commit = call.commit(repo)
    _refuse_pull_request(call)
    content = call.request.body.json()
    files = _list_of_objects(content.get("files"), "files", MAX_PREUPLOAD_FILES)
    attributes = call.hub.catalogue.text(commit, ".gitattributes", MAX_ATTRIBUTES_BYTES) or ""
    ignored = content.get("gitIgnore")
    if not isinstance(ignored, str):
        ignored = call.hub.catalogue.text(commit, ".gitignore", MAX_ATTRIBUTES_BYTES) or ""
    answers = []
    for file in files:
        path = names.path(file.get("path"))
        size = file.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Refusal(400, f"Invalid size of {path!r}: expected a number of bytes.")
        large = size > MAX_REGULAR_BYTES or (size > 0 and tracked_by_lfs(path, attributes))
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": ignored_by_git(path, ignored),
        }
        entry = commit.entries.get(path)
        if entry is not None:
            answer["oid"] = entry.sha256 if entry.lfs else entry.blob
        answers.append(answer)
    return json_answer({"files": answers, "commitOid": commit.id})


def lfs_batch(call: Call) -> Answer:
    """Say which objects are still to be uploaded, and where to."""
    repo = call.repo_to_write()
    content = call.request.body.json()
    if content.get("operation") != "upload":
        raise Refusal(400, "This Hub takes LFS uploads; files are downloaded from their resolve address.")
    if content.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "Invalid hash_algo: expected 'sha256'.")
    answers = []
    for asked in _list_of_objects(content.get("objects"), "objects", MAX_LFS_OBJECTS):
        oid, size = names.sha256(asked.get("oid")), asked.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
            raise Refusal(400, f"Invalid size of object {oid}: expected a number of bytes.")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not call.hub.store.may_commit(repo, oid):
            answer["actions"] = {
                "upload": {"href": _upload_address(call, repo, oid, size), "header": {}},
                "verify": {"href": f"{_lfs_address(call, repo)}/verify", "header": {}},
            }
        answers.append(answer)
    batch = json_answer({"transfer": "basic", "objects": answers})
    batch.content_type = _LFS_TYPE
    return batch


def lfs_upload(call: Call) -> Answer:
    """Take an object in, at an address that `lfs_batch` signed: the client sends no token here."""
    repo = call.hub.store.repo(call.kind, f"{call.parts['namespace']}/{call.parts['name']}")
    oid = names.sha256(call.parts["oid"])
    size, expires = call.request.number("size", -1, 1 << 50), call.request.number("expires", 0, 1 << 50)
    signature = _signature(call, repo, oid, size, expires)
    if not hmac.compare_digest(signature.encode(), (call.request.first("signature") or "").encode()):
        raise Refusal(403, "This upload address was not given out by this Hub.")
    if expires < time.time():
        raise Refusal(403, "This upload address has expired: start the push again.")
    body = call.request.body
    if body.length is not None and body.length != size:
        raise Refusal(400, f"Object {oid} was announced with {size} bytes; {body.length} are being sent.")
    call.hub.store.objects.receive(body.pieces(), oid, size)
    call.hub.store.mark_uploaded(repo, oid)
    return Answer(headers={"ETag": f'"{oid}"'})


def lfs_verify(call: Call) -> Answer:
    """Confirm that an object has arrived."""
    repo = call.repo_to_write()
    content = call.request.body.json()
    oid = names.sha256(content.get("oid"))
    if not call.hub.store.may_commit(repo, oid) or call.hub.store.objects.size(oid) != content.get("size"):
        raise Refusal(404, f"Object {oid} with {content.get('size')!r:.40} bytes is not here.")
    return json_answer({})


def commit(call: Call) -> Answer:
    """Put a commit on a branch: the header line, then one line a change."""
    repo = call.repo_to_write()
    _refuse_pull_request(call)
    call.commit(repo)  # an unknown branch is refused before anything is read
    header: dict[str, Any] = {}
    changes: list[Change] = []
    with call.hub.store.objects.batch() as batch:
        for key, value in _operations(call):
            if key == "header":
                header = value
            else:
                changes.append(_change(call, repo, key, value, batch))
            if len(changes) > MAX_CHANGES:
                raise Refusal(413, f"A commit takes at most {MAX_CHANGES} changes; make several.")
        batch.keep()
    title, message, parent = _header(header)
    made = call.hub.store.add_commit(
        repo, call.parts["revision"], changes, author=call.author, title=title, message=message, parent=parent
    )
    return json_answer({
        "success": True,
        "commitOid": made.id,
        "commitUrl": f"{call.request.base}/{repo.url_path}/commit/{made.id}",
        "hookOutput": "",
    })


def squash(call: Call) -> Answer:
    """Make a branch's history one commit."""
    repo = call.repo_to_write()
    message = call.request.body.json().get("message") or f"Super-squash branch '{call.parts['branch']}'"
    title, _, _ = _header({"summary": message})
    made = call.hub.store.squash(repo, call.parts["branch"], call.author, title)
    return json_answer({"commitOid": made.id})


def tracked_by_lfs(path: str, attributes: str) -> bool:
    """Return whether `.gitattributes` sends a path through LFS; the last line that matches decides."""
    tracked = False
    for line in attributes.splitlines():
        pattern, *words = line.split()[:16] or ["#"]
        if not pattern.startswith("#") and _matches(path, pattern):
            for word in words:
                if word.lstrip("-!").startswith("filter"):
                    tracked = word == "filter=lfs"
    return tracked


def ignored_by_git(path: str, ignore: str) -> bool:
    """Return whether `.gitignore` leaves a path out; the last line that matches decides."""
    ignored = False
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept = pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        segments = path.split("/")
        folders = ["/".join(segments[:depth]) for depth in range(1, len(segments))]
        candidates = folders if pattern.endswith("/") else [*folders, path]
        if any(_matches(candidate, pattern.rstrip("/")) for candidate in candidates):
            ignored = not kept
    return ignored


def _matches(path: str, pattern: str) -> bool:
    """Match as git does: a pattern with a slash is about the whole path, one without about the name."""
    pattern = pattern[:256]
    if pattern.count("*") > 8:  # more would make the search exponential
        return False
    if "/" in pattern.rstrip("/"):
        return fnmatchcase(path, pattern.removeprefix("/").replace("**/", "*"))
    return fnmatchcase(path.rpartition("/")[2], pattern)


def _operations(call: Call) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a commit's lines as they arrive."""
    for line in call.request.body.lines(MAX_COMMIT_LINE_BYTES):
        if not line.strip():
            continue
        operation = parse_object(line, "A line of the commit")
        key, value = operation.get("key"), operation.get("value")
        if not isinstance(key, str) or not isinstance(value, dict):
            raise Refusal(400, "A line of the commit must have a 'key' and an object as 'value'.")
        yield key, value


def _change(call: Call, repo: Repo, key: str, value: dict[str, Any], batch: ObjectBatch) -> Change:
    """Turn one line of a commit into a change."""
    path = names.path(value["path"].rstrip("/") if isinstance(value.get("path"), str) else None)
    if key == "file":
        content = _content(path, value)
        if path == "README.md":
            errors, _ = check_card(content.decode("utf-8", "replace"), repo.kind)
            if errors:
                raise Refusal(400, "Invalid metadata in README.md:\n" + "\n".join(f"- {error}" for error in errors))
        return regular_file(path, content, batch)
    if key == "lfsFile":
        size = value.get("size")
        if value.get("algo", "sha256") != "sha256" or not isinstance(size, (int, type(None))):
            raise Refusal(400, f"Invalid lfsFile {path!r}: expected algo 'sha256' and a size in bytes.")
        return call.hub.store.lfs_file(repo, path, names.sha256(value.get("oid")), size)
    if key in {"deletedFile", "deletedFolder"}:
        return Change(path, folder=key == "deletedFolder")
    raise Refusal(400, f"Unknown commit line {key!r:.40}: expected file, lfsFile, deletedFile or deletedFolder.")


def _content(path: str, value: dict[str, Any]) -> bytes:
    """Decode a regular file."""
    text, encoding = value.get("content"), value.get("encoding", "utf-8")
    if not isinstance(text, str) or encoding not in {"base64", "utf-8"}:
        raise Refusal(400, f"Invalid file {path!r}: expected 'content' with encoding 'base64' or 'utf-8'.")
    try:
        content = base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"Invalid file {path!r}: its content is not {encoding}: {error}") from error
    if len(content) > MAX_REGULAR_BYTES:
        raise Refusal(
            400, f"Invalid file {path!r}: {len(content)} bytes; above {MAX_REGULAR_BYTES} it goes through LFS."
        )
    return content


def _header(header: dict[str, Any]) -> tuple[str, str, str | None]:
    """Return title, message and parent of a commit."""
    title, message = header.get("summary"), header.get("description") or ""
    for text in (title, message):
        if not isinstance(text, str) or len(text) > MAX_MESSAGE or not names.is_text(text):
            raise Refusal(400, f"A commit needs a header with a summary, of at most {MAX_MESSAGE} characters.")
    title = str(title).strip()
    if not title or "\0" in title + message:
        raise Refusal(400, "A commit needs a summary.")
    parent = header.get("parentCommit")
    if parent is not None and not (isinstance(parent, str) and re.fullmatch(r"[0-9a-f]{7,40}", parent)):
        raise Refusal(400, f"Invalid parentCommit: {parent!r:.80}.")
    return title, message, parent


def _list_of_objects(value: Any, what: str, most: int) -> list[dict[str, Any]]:
    """Check a list of objects that a client sends."""
    if not isinstance(value, list) or len(value) > most or not all(isinstance(item, dict) for item in value):
        raise Refusal(400, f"Invalid {what}: expected a list of at most {most} objects.")
    return value


def _refuse_pull_request(call: Call) -> None:
    if call.request.flag("create_pr"):
        raise Refusal(400, "This Hub keeps no pull requests: push to a branch with revision=.")


def _lfs_address(call: Call, repo: Repo) -> str:
    return f"{call.request.base}/lfs/{names.KINDS[repo.kind]}/{repo.id}"


def _upload_address(call: Call, repo: Repo, oid: str, size: int) -> str:
    """Return an address at which this object, and nothing else, may be uploaded for a day."""
    expires = int(time.time()) + UPLOAD_SECONDS
    fields = {"size": size, "expires": expires, "signature": _signature(call, repo, oid, size, expires)}
    return f"{_lfs_address(call, repo)}/{oid}?{urlencode(fields)}"


def _signature(call: Call, repo: Repo, oid: str, size: int, expires: int) -> str:
    text = f"upload {repo.key} {oid} {size} {expires}"
    return hmac.new(call.hub.store.secret, text.encode(), hashlib.sha256).hexdigest()
