"""The web pages: what is on this Hub, and of one repo its card, files and revisions."""

from __future__ import annotations

from html import escape
from itertools import islice
from urllib.parse import urlencode

from hf_zoo.hub.local import api_collections, markdown
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.metadata import MAX_CARD_BYTES, Facts, without_front_matter
from hf_zoo.hub.local.page import address, count_text, link, page, revision_address, size_text, when
from hf_zoo.hub.local.records import Commit, Repo
from hf_zoo.hub.local.refusal import Refusal, entry_not_found
from hf_zoo.hub.local.store import DEFAULT_BRANCH
from hf_zoo.hub.local.wire import Answer

ROWS = 100
TAGS_IN_ROW = 6
MAX_SHOWN_BYTES = 500_000
MAX_SHOWN_COMMITS = 500
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
_HEADINGS = (("model", "Models"), ("dataset", "Datasets"), ("space", "Spaces"))
_DULL_TAGS = frozenset(("region:us", "safetensors", "model-index"))


def index(call: Call) -> Answer:
    """List repos and collections, filtered by name and tag."""
    words = (call.request.first("q") or "").lower().split()
    tag = call.request.first("tag") or call.request.first("other") or ""
    start = call.request.number("start", 0, 10**6)
    body = ["<h1>Repos</h1>" if not tag else f"<h1>Repos tagged <span class=tag>{escape(tag)}</span></h1>"]
    for kind, heading in _HEADINGS:
        found = [
            (repo, commit, facts)
            for repo in call.visible(kind)
            for commit in [call.head(repo)]
            for facts in [call.hub.catalogue.facts(kind, commit)]
            if all(word in repo.id.lower() for word in words) and (not tag or tag in facts.tags)
        ]
        if kind == "space" and not found:
            continue
        found.sort(key=lambda row: row[1].date, reverse=True)
        rows = "".join(_row(*row) for row in found[start : start + ROWS])
        body.append(f"<h2 id={kind}s>{heading} <span class=soft>{len(found)}</span></h2>")
        body.append(_repo_table(kind, rows) if rows else "<p class=soft>None.</p>")
        body.append(_turn(call, start, len(found)))
    if not tag:
        body.append(_collections(call, words))
    return page("hf_zoo Hub", "".join(body), query=call.request.first("q") or "")


def login(call: Call) -> Answer:
    """Ask a browser for a token, to be given as the password."""
    if call.caller.name is None:
        headers = {"WWW-Authenticate": 'Basic realm="hf_zoo Hub: the token is the password", charset="UTF-8"'}
        return page(
            "Sign in", "<h1>Sign in</h1><p>Give a token of this Hub as the password.</p>", status=401, headers=headers
        )
    return page("Signed in", f"<p>You are {escape(call.caller.name)}.</p>", status=303, headers={"Location": "/"})


def repo(call: Call) -> Answer:
    """Show a repo: its card, and beside it what is known of it, its files and its revisions."""
    found = call.repo()
    commit = call.head(found)
    facts = call.hub.catalogue.facts(found.kind, commit)
    readme = call.hub.catalogue.text(commit, "README.md", MAX_CARD_BYTES)
    if readme is None:
        card = "<p class=soft>This repo has no card.</p>"
    else:
        card = markdown.render(without_front_matter(readme), _addresses(found, commit.id))
    tags = "".join(_tag(tag) for tag in facts.tags)
    body = (
        f"{_title(found)}<p>{tags}</p><div class=columns><article>{_loading(call, found, facts)}{card}</article>"
        f"<aside>{_known(found, commit, facts)}{_revisions(found)}<h2>Files</h2>"
        f"{_files(found, DEFAULT_BRANCH, commit, '')}</aside></div>"
    )
    return page(found.id, body)


def tree(call: Call) -> Answer:
    """Show a folder of a revision."""
    found = call.repo()
    commit, revision, folder = call.commit(found), call.parts["revision"], call.parts.get("path", "").strip("/")
    if folder and not any(path.startswith(f"{folder}/") for path in commit.entries):
        raise entry_not_found(folder, found.id)
    body = (
        f"{_title(found)}<p>{_trail(found, revision, folder)} <span class=soft>at {escape(commit.id[:7])}, "
        f"{escape(commit.title)}, {when(commit.date)} UTC</span> "
        f"{link(revision_address(found.url_path, 'commits', revision), 'History')}</p>"
        f"{_files(found, revision, commit, folder)}"
    )
    return page(f"{found.id} at {revision}", body)


def blob(call: Call) -> Answer:
    """Show a file: text and pictures as they are, of everything else the size."""
    found = call.repo()
    commit, revision, path = call.commit(found), call.parts["revision"], call.parts["path"]
    entry = commit.entries.get(path)
    if entry is None:
        raise entry_not_found(path, found.id)
    raw = revision_address(found.url_path, "resolve", revision, path)
    content = call.hub.store.objects.path(entry.sha256).read_bytes() if entry.size <= MAX_SHOWN_BYTES else b"\0"
    if path.lower().endswith(_PICTURES):
        shown = f'<p><img src="{escape(raw)}" alt="{escape(path)}"></p>'
    elif b"\0" in content:
        shown = "<p class=soft>Not shown: not a text, or a long one.</p>"
    else:
        shown = f"<pre><code>{escape(content.decode('utf-8', 'replace'))}</code></pre>"
    body = (
        f"{_title(found)}<p>{_trail(found, revision, path)} <span class=soft>{size_text(entry.size)}"
        f"{', LFS' if entry.lfs else ''}</span> {link(raw, 'Download')}</p>{shown}"
    )
    return page(f"{path} of {found.id}", body)


def commits(call: Call) -> Answer:
    """Show a revision's history."""
    found = call.repo()
    history = islice(call.hub.store.history(found, call.commit(found).id), MAX_SHOWN_COMMITS)
    rows = "".join(
        f"<tr><td class=when>{when(one.date)}</td>"
        f"<td>{link(address(found.url_path, 'commit', one.id), one.title)}</td>"
        f"<td>{escape(one.author)}</td><td><code>{one.id[:7]}</code></td></tr>"
        for one in history
    )
    body = (
        f"{_title(found)}<p>History of {escape(call.parts['revision'])}</p><table><thead><tr><th>UTC<th>Commit<th>By"
        f"<th></tr></thead>{rows}</table>"
    )
    return page(f"History of {found.id}", body)


def commit(call: Call) -> Answer:
    """Show a commit: what it says and which files it changed."""
    found = call.repo()
    shown = call.commit(found)
    before = call.hub.store.commit(found, shown.parent).entries if shown.parent else {}
    changes = [
        (path, "added" if path not in before else "changed")
        for path, entry in shown.entries.items()
        if path not in before or before[path].sha256 != entry.sha256
    ]
    changes += [(path, "deleted") for path in before if path not in shown.entries]
    rows = "".join(f"<tr><td>{escape(path)}</td><td class=soft>{what}</td></tr>" for path, what in sorted(changes))
    parent = link(address(found.url_path, "commit", shown.parent), shown.parent[:7]) if shown.parent else "none"
    message = f"<pre>{escape(shown.message)}</pre>" if shown.message else ""
    files = link(revision_address(found.url_path, "tree", shown.id), "Files at this commit")
    body = (
        f"{_title(found)}<h2>{escape(shown.title)}</h2>{message}<dl><dt>Commit<dd><code>{shown.id}</code><dt>Parent"
        f"<dd>{parent}<dt>By<dd>{escape(shown.author)}<dt>When<dd>{when(shown.date)} UTC</dl>"
        f"<p>{files}</p><table>{rows}</table>"
    )
    return page(f"{shown.title} of {found.id}", body)


def collection(call: Call) -> Answer:
    """Show a collection."""
    shown = api_collections.visible(call, call.hub.collections.get(f"{call.parts['namespace']}/{call.parts['slug']}"))
    rows = []
    for item in api_collections.described(shown, call)["items"]:
        one = call.hub.store.repo(item["type"], item["id"])
        note = escape(item.get("note", {}).get("text", ""))
        rows.append(
            f"<tr><td>{link(address(one.url_path), one.id)}</td><td class=soft>{one.kind}</td><td>{note}</td></tr>"
        )
    description = f"<p>{escape(shown.description)}</p>" if shown.description else ""
    body = (
        f"<h1>{escape(shown.title)}</h1><p class=soft>A collection of {escape(shown.owner)}, {len(rows)} items, "
        f"updated {when(shown.updated)} UTC</p>{description}<table>{''.join(rows)}</table>"
    )
    return page(shown.title, body)


def refused(refusal: Refusal) -> Answer:
    """Say no to a browser."""
    body = f"<h1>{refusal.status}</h1><p>{escape(refusal.message)}</p>"
    return page(str(refusal.status), body, status=refusal.status, headers=refusal.headers)


def _row(repo: Repo, commit: Commit, facts: Facts) -> str:
    """One line of the list of repos."""
    tags = [tag for tag in facts.tags if tag not in _DULL_TAGS and tag != facts.pipeline_tag and ":" not in tag]
    private = " <span class=tag>private</span>" if repo.private else ""
    cells = [f"<td>{link(address(repo.url_path), repo.id)}{private}</td>"]
    if repo.kind == "model":
        weights = count_text(sum(facts.parameters.values())) if facts.parameters else ""
        cells += [f"<td>{escape(facts.pipeline_tag or '')}</td>", f"<td class=number>{weights}</td>"]
    cells += [
        f"<td>{''.join(_tag(tag) for tag in tags[:TAGS_IN_ROW])}</td>",
        f"<td class=when>{when(commit.date)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _repo_table(kind: str, rows: str) -> str:
    more = "<th>Task<th class=number>Weights" if kind == "model" else ""
    return f"<div class=wide><table><thead><tr><th>Name{more}<th>Tags<th>Updated, UTC</tr></thead>{rows}</table></div>"


def _turn(call: Call, start: int, total: int) -> str:
    """Links to the rows before and after."""
    turns = []
    for text, other in (("Earlier rows", start - ROWS), ("More rows", start + ROWS)):
        if (0 <= other < total) and other != start:
            query = {key: call.request.first(key) for key in ("q", "tag", "other") if call.request.first(key)}
            turns.append(link(f"/?{urlencode({**query, 'start': other})}", text))
    return f"<p>{' · '.join(turns)}</p>" if turns else ""


def _collections(call: Call, words: list[str]) -> str:
    """The list of collections."""
    shown = [
        one
        for one in call.hub.collections.all()
        if (not one.private or call.caller.owns(one.owner)) and all(word in one.slug.lower() for word in words)
    ]
    rows = "".join(
        f"<tr><td>{link(address('collections', one.slug), one.title)}</td><td>{escape(one.owner)}</td>"
        f"<td class=number>{len(one.items)}</td><td class=when>{when(one.updated)}</td></tr>"
        for one in shown[:ROWS]
    )
    head = "<thead><tr><th>Title<th>Owner<th class=number>Items<th>Updated, UTC</tr></thead>"
    table = f"<table>{head}{rows}</table>" if rows else "<p class=soft>None.</p>"
    return f"<h2 id=collections>Collections <span class=soft>{len(shown)}</span></h2>{table}"


def _title(repo: Repo) -> str:
    kind = "" if repo.kind == "model" else f"<span class=soft>{repo.kind}</span> "
    private = " <span class=tag>private</span>" if repo.private else ""
    return f"<h1>{kind}{link(address(repo.url_path), repo.id)}{private}</h1>"


def _tag(tag: str) -> str:
    return link(f"/?{urlencode({'tag': tag})}", tag, "tag")


def _loading(call: Call, repo: Repo, facts: Facts) -> str:
    """How to get the repo from this Hub."""
    if repo.kind == "model" and facts.library_name == "transformers":
        names = facts.config.get("architectures")
        auto = "AutoModel" if not isinstance(names, list) or not names else _auto_class(str(names[0]))
        code = f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{repo.id}")'
    else:
        kind = "" if repo.kind == "model" else f', repo_type="{repo.kind}"'
        code = f'from huggingface_hub import snapshot_download\nfolder = snapshot_download("{repo.id}"{kind})'
    return f"<pre><code>{escape(f'# with HF_ENDPOINT={call.request.base}{chr(10)}{code}')}</code></pre>"


def _auto_class(architecture: str) -> str:
    """Return the Auto class that loads an architecture with its head."""
    for head in (
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForImageClassification",
        "ForCausalLM",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ):
        if architecture.endswith(head):
            return f"AutoModel{head}"
    return "AutoModel"


def _known(repo: Repo, commit: Commit, facts: Facts) -> str:
    """What is known of a repo, as a list of terms."""
    rows = [("Updated", f"{when(commit.date)} UTC"), ("Created", f"{when(repo.created)} UTC")]
    if facts.parameters:
        dtypes = ", ".join(sorted(facts.parameters))
        rows.append(("Weights", f"{count_text(sum(facts.parameters.values()))} ({dtypes})"))
    rows.append(("Size", size_text(facts.size)))
    for key in ("license", "library_name", "language"):
        if isinstance(facts.card.get(key), str):
            rows.append((key.replace("_name", "").capitalize(), str(facts.card[key])))
    listed = "".join(f"<dt>{escape(term)}<dd>{escape(text)}" for term, text in rows)
    bases = "".join(f"<dt>Base<dd>{link(address(base), base)}" for base in facts.base_models)
    return f"<h2>About</h2><dl>{listed}{bases}<dt>Commit<dd><code>{commit.id[:7]}</code></dl>"


def _revisions(repo: Repo) -> str:
    """Branches and tags, each with its files and history."""
    rows = []
    tags = {name: tag.commit for name, tag in repo.tags.items()}
    for kind, revisions in (("branch", repo.branches), ("tag", tags)):
        for name in sorted(revisions, key=lambda name: (name != DEFAULT_BRANCH, name)):
            files = link(revision_address(repo.url_path, "tree", name), name)
            history = link(revision_address(repo.url_path, "commits", name), revisions[name][:7])
            rows.append(f"<tr><td>{files}</td><td class=soft>{kind}</td><td>{history}</td></tr>")
    return (
        f"<h2>Revisions <span class=soft>{len(rows)}</span></h2><div class=scroll><table>{''.join(rows)}</table></div>"
    )


def _files(repo: Repo, revision: str, commit: Commit, folder: str) -> str:
    """The files and folders right inside a folder."""
    below = f"{folder}/" if folder else ""
    folders: dict[str, int] = {}
    files: dict[str, int] = {}
    for path, entry in commit.entries.items():
        if path.startswith(below):
            name, slash, _ = path[len(below) :].partition("/")
            target = folders if slash else files
            target[name] = target.get(name, 0) + entry.size
    rows = [(f"{name}/", "tree", below + name, size) for name, size in sorted(folders.items())]
    rows += [(name, "blob", below + name, size) for name, size in sorted(files.items())]
    listed = "".join(
        f"<tr><td>{link(revision_address(repo.url_path, view, revision, path), name)}</td>"
        f"<td class=number>{size_text(size)}</td></tr>"
        for name, view, path, size in rows
    )
    return f"<table>{listed}</table>"


def _trail(repo: Repo, revision: str, path: str) -> str:
    """Links to a path's folders."""
    trail = [link(revision_address(repo.url_path, "tree", revision), revision)]
    segments = path.split("/") if path else []
    for depth, name in enumerate(segments, 1):
        last = depth == len(segments)
        folder = "/".join(segments[:depth])
        trail.append(escape(name) if last else link(revision_address(repo.url_path, "tree", revision, folder), name))
    return " / ".join(trail)


def _addresses(repo: Repo, revision: str) -> markdown.Addresses:
    """Where a card's relative addresses lead."""
    return markdown.Addresses(
        link=lambda path: revision_address(repo.url_path, "blob", revision, path),
        image=lambda path: revision_address(repo.url_path, "resolve", revision, path),
    )
