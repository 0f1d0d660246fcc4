"""Routes about what is in a repo: trees, files, branches, tags, history."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from hf_zoo.hub.local import git, names
from hf_zoo.hub.local.api_repos import next_page
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.records import Commit, Entry, Repo
from hf_zoo.hub.local.refusal import Refusal, entry_not_found
from hf_zoo.hub.local.store import DEFAULT_BRANCH
from hf_zoo.hub.local.wire import Answer, FilePart, json_answer

TREE_PAGE_SIZE = 1000
EXPANDED_PAGE_SIZE = 50
COMMITS_PAGE_SIZE = 1000

# What a browser may show as it is; everything else is plain text or a download, and runs nothing.
_IMAGES = frozenset(("image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml"))
_TEXT_SUFFIXES = (".md", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".py", ".gitattributes", ".jinja")


def tree(call: Call) -> Answer:
    """List a folder of a revision, or everything below it."""
    repo = call.repo()
    commit = call.commit(repo)
    folder = call.parts.get("path", "").strip("/")
    below = f"{folder}/" if folder else ""
    recursive, expand = call.request.flag("recursive"), call.request.flag("expand")
    paths = [path for path in commit.entries if path.startswith(below)]
    if folder and not paths:
        raise entry_not_found(folder, repo.id)
    listed: set[str] = set()
    for path in paths:
        segments = path[len(below) :].split("/")
        listed.update(below + "/".join(segments[: depth + 1]) for depth in range(len(segments) if recursive else 1))
    ordered = sorted(listed)
    size = EXPANDED_PAGE_SIZE if expand else TREE_PAGE_SIZE
    size = call.request.number("limit", size, size)
    start = call.request.number("cursor", 0, len(ordered))
    headers = {"X-Repo-Commit": commit.id}
    if 0 < size < len(ordered) - start:
        headers["Link"] = next_page(call, start + size)
    return json_answer(list(_described(call, repo, commit, ordered[start : start + size], expand)), headers=headers)


def paths_info(call: Call) -> Answer:
    """Describe some paths of a revision; those it does not have are left out."""
    repo = call.repo()
    commit = call.commit(repo)
    if "json" in call.request.headers.get("Content-Type", ""):
        content = call.request.body.json()
        paths, expand = content.get("paths", []), content.get("expand") is True
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise Refusal(400, "Invalid paths: expected a list of strings.")
    else:
        form = call.request.body.form()
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
    return json_answer(list(_described(call, repo, commit, [path.strip("/") for path in paths], expand)))


def resolve(call: Call) -> Answer:
    """Send a file, or the part of it that is asked for."""
    repo = call.repo()
    commit = call.commit(repo)
    path = call.parts["path"]
    headers = {"X-Repo-Commit": commit.id}
    entry = commit.entries.get(path)
    if entry is None:
        refusal = entry_not_found(path, repo.id)
        refusal.headers.update(headers)  # lets the client remember that this commit has no such file
        raise refusal
    etag = entry.sha256 if entry.lfs else entry.blob
    headers |= {
        "ETag": f'"{etag}"',
        "Accept-Ranges": "bytes",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}"
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    call.hub.store.objects.size(entry.sha256)  # a store that lost the file says so before anything is sent
    start, length, partial = _range(call.request.headers.get("Range"), entry.size, headers)
    body = FilePart(call.hub.store.objects.path(entry.sha256), start, length)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{entry.size}"
    return Answer(206 if partial else 200, body, _content_type(path), headers)


def refs(call: Call) -> Answer:
    """List branches and tags."""
    repo = call.repo()
    branches = sorted(repo.branches.items(), key=lambda item: (item[0] != DEFAULT_BRANCH, item[0]))
    content: dict[str, Any] = {
        "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": head} for n, head in branches],
        "tags": [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": tag.commit}
            for name, tag in sorted(repo.tags.items())
        ],
        "converts": [],
    }
    if call.request.flag("include_prs"):
        content["pullRequests"] = []
    return json_answer(content)


def commits(call: Call) -> Answer:
    """List a revision's history, newest first."""
    repo = call.repo()
    start = call.request.number("cursor", 0, 10**9)
    size = call.request.number("limit", COMMITS_PAGE_SIZE, COMMITS_PAGE_SIZE)
    listed, headers = [], {}
    for index, commit in enumerate(call.hub.store.history(repo, call.commit(repo).id)):
        if index >= start + size:
            headers["Link"] = next_page(call, start + size)
            break
        if index >= start:
            listed.append({
                "id": commit.id,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            })
    return json_answer(listed, headers=headers)


def create_branch(call: Call) -> Answer:
    """Begin a branch at a revision, by default where `main` is."""
    repo = call.repo_to_write()
    content = call.request.body.json()
    starting_point = content.get("startingPoint") or DEFAULT_BRANCH
    if content.get("emptyBranch"):
        raise Refusal(400, "This Hub makes no empty branches: name a starting point.")
    if not isinstance(starting_point, str):
        raise Refusal(400, "Invalid startingPoint: expected a revision.")
    call.hub.store.create_branch(repo, names.ref_name(call.parts["branch"], "branch"), starting_point)
    return json_answer({})


def delete_branch(call: Call) -> Answer:
    """Delete a branch other than `main`."""
    call.hub.store.delete_branch(call.repo_to_write(), call.parts["branch"])
    return json_answer({})


def create_tag(call: Call) -> Answer:
    """Tag a revision."""
    repo = call.repo_to_write()
    content = call.request.body.json()
    name = names.ref_name(content.get("tag"), "tag")
    message = content.get("message") or ""
    if not isinstance(message, str) or not names.is_text(message):
        raise Refusal(400, "Invalid tag message: expected a text.")
    call.hub.store.create_tag(repo, name, call.parts["revision"], message)
    return json_answer({})


def delete_tag(call: Call) -> Answer:
    """Delete a tag."""
    call.hub.store.delete_tag(call.repo_to_write(), call.parts["tag"])
    return json_answer({})


def _described(call: Call, repo: Repo, commit: Commit, paths: Iterable[str], expand: bool) -> Iterable[dict[str, Any]]:
    """Describe files and folders, one after the other; unknown paths are left out.

    Yields:
        A file's or folder's description.
    """
    trees: dict[str, str] | None = None
    for path in paths:
        entry = commit.entries.get(path)
        if entry is not None:
            described: dict[str, Any] = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
            if entry.lfs:
                described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            changed_by = [entry]
        else:
            trees = trees or git.tree_ids({name: one.blob for name, one in commit.entries.items()})
            if not path or path not in trees:
                continue
            described = {"type": "directory", "oid": trees[path], "size": 0, "path": path}
            changed_by = [one for name, one in commit.entries.items() if name.startswith(f"{path}/")] if expand else []
        if expand:
            described["lastCommit"] = _last_commit(call, repo, changed_by)
        yield described


def _last_commit(call: Call, repo: Repo, entries: list[Entry]) -> dict[str, str]:
    """Return the latest of the commits that put some files where they are."""
    found = [call.hub.store.commit(repo, commit_id) for commit_id in {entry.commit for entry in entries}]
    latest = max(found, key=lambda commit: (commit.date, commit.id))
    return {"id": latest.id, "title": latest.title, "date": latest.date}


def _range(header: str | None, size: int, headers: dict[str, str]) -> tuple[int, int, bool]:
    """Return start and length of the part of a file that is asked for, and whether it is only a part."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip()) if header else None
    if match is None or not (match[1] or match[2]):  # several ranges at once may be answered with the whole
        return 0, size, False
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, size) if match[2] else size
    else:
        start, stop = max(size - int(match[2]), 0), size
    if start >= size or stop <= start:
        raise Refusal(
            416,
            f"Invalid range {header!r}: the file has {size} bytes.",
            headers={**headers, "Content-Range": f"bytes */{size}"},
        )
    return start, stop - start, True


def _content_type(path: str) -> str:
    """Return a type under which a browser runs nothing."""
    guessed = mimetypes.guess_type(path)[0] or ""
    if guessed in _IMAGES:
        return guessed
    if guessed.startswith("text/") or path.lower().endswith(_TEXT_SUFFIXES):
        return "text/plain; charset=utf-8"
    return "application/octet-stream"
