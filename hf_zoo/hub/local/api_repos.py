"""Routes about whole repos: who am I, create, delete, move, settings, info, listing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hf_zoo.hub.local import names
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.card_check import check_card
from hf_zoo.hub.local.metadata import Facts
from hf_zoo.hub.local.records import Commit, Repo
from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.wire import Answer, json_answer

PAGE_SIZE = 1000

_ALWAYS = ("_id", "id")
_LISTED = (
    "_id id modelId author sha lastModified createdAt private gated disabled likes tags pipeline_tag library_name"
).split()
_SHOWN = [
    *_LISTED,
    "cardData",
    "config",
    "model-index",
    "siblings",
    "safetensors",
    "usedStorage",
    "sdk",
    "description",
]
_KNOWN = frozenset([
    *_SHOWN,
    *(
        "baseModels childrenModelCount downloads downloadsAllTime evalResults gguf inference inferenceProviderMapping "
        "mask_token resourceGroup securityRepoStatus securityStatus spaces transformersInfo trendingScore widgetData "
        "xetEnabled citation paperswithcode_id datasets models runtime subdomain region providers"
    ).split(),
])
_SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lastModified": lambda info: info["lastModified"],
    "createdAt": lambda info: info["createdAt"],
    # What this Hub does not count is equal for all, so the latest come first.
    "downloads": lambda info: info["lastModified"],
    "likes": lambda info: info["lastModified"],
    "trendingScore": lambda info: info["lastModified"],
}
_MAGNITUDES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def whoami(call: Call) -> Answer:
    """Say who the caller is and which namespaces are theirs."""
    if call.caller.name is None:
        raise Refusal(401, "Invalid username or password.")
    if call.caller.namespaces is None:
        known = {repo.namespace for kind in names.KINDS for repo in call.hub.store.repos(kind)}
    else:
        known = set(call.caller.namespaces)
    organisations = sorted(known - {call.caller.name, call.caller.name.lower()})
    return json_answer({
        "type": "user",
        "id": call.caller.name,
        "name": call.caller.name,
        "fullname": call.caller.name,
        "isPro": False,
        "orgs": [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in organisations],
        "auth": {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}},
    })


def create(call: Call) -> Answer:
    """Create a repo."""
    content = call.request.body.json()
    kind, repo_id = _named(call, content)
    private = _private(content, default=False)
    url = f"{call.request.base}/{'' if kind == 'model' else names.KINDS[kind] + '/'}{repo_id}"
    try:
        repo = call.hub.store.create_repo(
            kind, repo_id, call.author, private, content.get("sdk") if kind == "space" else None
        )
    except Refusal as refusal:
        refusal.extra["url"] = url
        raise
    return json_answer({"url": url, "name": repo.id, "id": repo.key})


def delete(call: Call) -> Answer:
    """Delete a repo."""
    kind, repo_id = _named(call, call.request.body.json())
    call.hub.store.delete_repo(call.hub.store.repo(kind, repo_id))
    return json_answer({})


def move(call: Call) -> Answer:
    """Rename a repo, or give it to another namespace of the caller."""
    content = call.request.body.json()
    kind = names.kind(content.get("type"))
    source, target = (names.split_repo_id(content.get(key)) for key in ("fromRepo", "toRepo"))
    call.hub.access.require_write(call.caller, source[0])
    call.hub.access.require_write(call.caller, target[0])
    call.hub.store.move_repo(call.hub.store.repo(kind, "/".join(source)), "/".join(target))
    return json_answer({})


def settings(call: Call) -> Answer:
    """Change who may see a repo."""
    repo = call.repo_to_write()
    content = call.request.body.json()
    if content.get("gated"):
        raise Refusal(400, "This Hub keeps no gated repos; make it private instead.")
    call.hub.store.set_private(repo, _private(content, default=repo.private))
    return json_answer({"private": repo.private})


def auth_check(call: Call) -> Answer:
    """Say whether the caller may see a repo."""
    call.repo()
    return json_answer({})


def info(call: Call) -> Answer:
    """Describe a repo at a revision."""
    repo = call.repo()
    commit = call.commit(repo)
    wanted = _expanded(call) or _SHOWN
    described = _describe(call, repo, commit, wanted, blobs=call.request.flag("blobs"))
    return json_answer(described, headers={"X-Repo-Commit": commit.id})


def listing(call: Call) -> Answer:
    """List the repos that match, the latest first, page by page."""
    matching = [_describe(call, repo, commit, _LISTED) for repo, commit, facts in _matches(call)]
    sort = call.request.first("sort") or "lastModified"
    if sort not in _SORTS:
        raise Refusal(400, f"Invalid sort: {sort!r:.80}. Expected one of {', '.join(_SORTS)}.")
    matching.sort(key=lambda found: found["id"].lower())
    matching.sort(key=_SORTS[sort], reverse=call.request.first("direction") != "1")
    start = call.request.number("cursor", 0, len(matching))
    limit = call.request.number("limit", PAGE_SIZE, PAGE_SIZE)
    page = matching[start : start + limit]
    wanted = _expanded(call) or _listed_more(call)
    if wanted:
        store = call.hub.store
        described = []
        for found in page:
            repo = store.repo(call.kind, found["id"])
            described.append(_describe(call, repo, call.head(repo), wanted))
        page = described
    headers = {}
    if start + limit < len(matching) and limit > 0:
        headers["Link"] = next_page(call, start + limit)
    return json_answer(page, headers=headers)


def validate_yaml(call: Call) -> Answer:
    """Check a card before it is committed."""
    content = call.request.body.json()
    readme = content.get("content")
    if not isinstance(readme, str):
        raise Refusal(400, "Expected the card's text as 'content'.")
    errors, warnings = check_card(readme, names.kind(content.get("repoType")))
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return json_answer(answer, 400 if errors else 200)


def next_page(call: Call, cursor: int) -> str:
    """Return the Link header to the next page of an answer."""
    from urllib.parse import urlencode

    fields = {name: values for name, values in call.request.query.items() if name != "cursor"}
    query = urlencode({**fields, "cursor": [str(cursor)]}, doseq=True)
    return f'<{call.request.base}{call.request.path}?{query}>; rel="next"'


def siblings(commit: Commit, blobs: bool) -> list[dict[str, Any]]:
    """List a commit's files as an info answer has them."""
    if not blobs:
        return [{"rfilename": path} for path in sorted(commit.entries)]
    listed = []
    for path, entry in sorted(commit.entries.items()):
        described: dict[str, Any] = {"rfilename": path, "size": entry.size, "blobId": entry.blob}
        if entry.lfs:
            described["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        listed.append(described)
    return listed


def _named(call: Call, content: dict[str, Any]) -> tuple[str, str]:
    """Return kind and checked id of the repo that a create or delete names, if the caller may write there."""
    kind = names.kind(content.get("type"))
    namespace = content.get("organization") or call.caller.name
    if namespace is None:
        raise Refusal(401, "This needs a token: set HF_TOKEN, or pass token=.")
    repo_id = names.repo_id(namespace, content.get("name"))
    call.hub.access.require_write(call.caller, namespace)
    return kind, repo_id


def _private(content: dict[str, Any], default: bool) -> bool:
    """Read a repo's visibility in either of the ways clients say it."""
    visibility = content.get("visibility")
    if visibility is None:
        private = content.get("private")
        return default if private is None else private is True
    if visibility not in {"public", "private"}:
        raise Refusal(400, f"Invalid visibility: {visibility!r:.80}. This Hub knows 'public' and 'private'.")
    return visibility == "private"


def _expanded(call: Call) -> list[str]:
    """Return the fields that the caller asks for one by one."""
    wanted = [name for value in call.request.query.get("expand", []) for name in value.split(",")]
    wanted += call.request.query.get("expand[]", [])
    if unknown := sorted(set(wanted) - _KNOWN):
        raise Refusal(400, f"Invalid expand: {unknown[0]!r:.80}.")
    return [*_ALWAYS, *wanted] if wanted else []


def _listed_more(call: Call) -> list[str]:
    """Return the fields of a listing that asks for more than the usual; empty if it does not."""
    more = [name for flag, name in (("cardData", "cardData"), ("config", "config")) if call.request.flag(flag)]
    if call.request.flag("full"):
        more += ["siblings", "cardData", "sdk", "description"]
    return [*_LISTED, *more] if more else []


def _matches(call: Call) -> list[tuple[Repo, Commit, Facts]]:
    """Return the visible repos that pass the request's filters."""
    query = call.request.query
    author = (call.request.first("author") or "").lower()
    words = (call.request.first("search") or "").lower().split()
    tags = {tag for value in query.get("filter", []) for tag in value.split(",") if tag}
    task = call.request.first("pipeline_tag")
    least, most = _parameter_range(call.request.first("num_parameters"))
    found = []
    for repo in call.visible(call.kind):
        if author not in {"", repo.namespace.lower()} or not all(word in repo.id.lower() for word in words):
            continue
        commit = call.head(repo)
        facts = call.hub.catalogue.facts(repo.kind, commit)
        if not tags <= set(facts.tags) or task not in {None, facts.pipeline_tag}:
            continue
        if (least, most) != (None, None):
            total = sum(facts.parameters.values())
            if not total or not (least or 0) <= total <= (total if most is None else most):
                continue
        found.append((repo, commit, facts))
    return found


def _parameter_range(text: str | None) -> tuple[float | None, float | None]:
    """Read `min:6B,max:128B`."""
    bounds: dict[str, float] = {}
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(min|max):([0-9]{1,6}(?:\.[0-9]{1,6})?)([KMBT]?)", part)
        if match is None:
            raise Refusal(400, f"Invalid num_parameters: {text!r:.80}. Expected for instance 'min:6B,max:128B'.")
        bounds[match[1]] = float(match[2]) * _MAGNITUDES[match[3]]
    return bounds.get("min"), bounds.get("max")


def _describe(call: Call, repo: Repo, commit: Commit, wanted: list[str], blobs: bool = False) -> dict[str, Any]:
    """Return the fields of a repo that are wanted and known."""
    facts = call.hub.catalogue.facts(repo.kind, commit)
    fields: dict[str, Callable[[], Any]] = {
        "_id": lambda: repo.key,
        "id": lambda: repo.id,
        "modelId": lambda: repo.id if repo.kind == "model" else None,
        "author": lambda: repo.namespace,
        "sha": lambda: commit.id,
        "lastModified": lambda: commit.date,
        "createdAt": lambda: repo.created,
        "private": lambda: repo.private,
        "gated": lambda: False,
        "disabled": lambda: False,
        "likes": lambda: 0,
        "tags": lambda: list(facts.tags),
        "pipeline_tag": lambda: facts.pipeline_tag,
        "library_name": lambda: facts.library_name,
        "cardData": lambda: facts.card or None,
        "config": lambda: facts.config or None,
        "model-index": lambda: facts.card.get("model-index"),
        "siblings": lambda: siblings(commit, blobs),
        "safetensors": lambda: _weights(facts),
        "usedStorage": lambda: facts.size,
        "baseModels": lambda: _bases(facts),
        "childrenModelCount": lambda: _children(call, repo),
        "sdk": lambda: repo.sdk,
    }
    described = {name: fields[name]() for name in dict.fromkeys(wanted) if name in fields}
    return {name: value for name, value in described.items() if value is not None}


def _weights(facts: Facts) -> dict[str, Any] | None:
    return {"parameters": facts.parameters, "total": sum(facts.parameters.values())} if facts.parameters else None


def _bases(facts: Facts) -> dict[str, Any] | None:
    """Name the models a model comes from, and how it does."""
    if not facts.base_models:
        return None
    relations = [tag.split(":")[1] for tag in facts.tags if tag.startswith("base_model:") and tag.count(":") == 2]
    return {"relation": relations[0], "models": [{"id": base} for base in facts.base_models]}


def _children(call: Call, repo: Repo) -> int:
    """Count the visible models that name this one as their base."""
    every = (call.hub.catalogue.facts("model", call.head(other)) for other in call.visible("model"))
    return sum(repo.id in facts.base_models for facts in every)
