"""The table of routes, and the way from a request to the function that answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from hf_zoo.hub.local import api_collections, api_commits, api_files, api_repos, pages, xet
from hf_zoo.hub.local.access import NOBODY
from hf_zoo.hub.local.call import Call, Hub
from hf_zoo.hub.local.refusal import Refusal, repo_not_found
from hf_zoo.hub.local.wire import Answer, Incoming

Handler = Callable[[Call], Answer]

_REPO = "/api/{kinds}/{namespace}/{name}"
_COLLECTION = "/api/collections/{namespace}/{slug}"
_LFS = "/lfs/{kinds}/{namespace}/{name}"
_XET = "/xet/{kinds}/{namespace}/{name}"


def _missing(call: Call) -> Answer:
    """Answer for ids without a namespace: this Hub has none."""
    raise repo_not_found(call.parts["name"])


_API: list[tuple[str, str, Handler]] = [
    ("GET", "/api/whoami-v2", api_repos.whoami),
    ("POST", "/api/validate-yaml", api_repos.validate_yaml),
    ("POST", "/api/repos/create", api_repos.create),
    ("DELETE", "/api/repos/delete", api_repos.delete),
    ("POST", "/api/repos/move", api_repos.move),
    ("POST", "/api/collections", api_collections.create),
    ("GET", "/api/collections", api_collections.listing),
    ("GET", _COLLECTION, api_collections.show),
    ("PATCH", _COLLECTION, api_collections.update),
    ("DELETE", _COLLECTION, api_collections.delete),
    ("POST", f"{_COLLECTION}/items", api_collections.add_item),
    ("PATCH", f"{_COLLECTION}/items/{{item}}", api_collections.update_item),
    ("DELETE", f"{_COLLECTION}/items/{{item}}", api_collections.delete_item),
    ("GET", "/api/{kinds}", api_repos.listing),
    ("GET", _REPO, api_repos.info),
    ("GET", f"{_REPO}/revision/{{revision}}", api_repos.info),
    ("GET", f"{_REPO}/auth-check", api_repos.auth_check),
    ("PUT", f"{_REPO}/settings", api_repos.settings),
    ("GET", f"{_REPO}/tree/{{revision}}", api_files.tree),
    ("GET", f"{_REPO}/tree/{{revision}}/{{path*}}", api_files.tree),
    ("POST", f"{_REPO}/paths-info/{{revision}}", api_files.paths_info),
    ("GET", f"{_REPO}/refs", api_files.refs),
    ("GET", f"{_REPO}/commits/{{revision}}", api_files.commits),
    ("POST", f"{_REPO}/branch/{{branch}}", api_files.create_branch),
    ("DELETE", f"{_REPO}/branch/{{branch}}", api_files.delete_branch),
    ("POST", f"{_REPO}/tag/{{revision}}", api_files.create_tag),
    ("DELETE", f"{_REPO}/tag/{{tag}}", api_files.delete_tag),
    ("POST", f"{_REPO}/preupload/{{revision}}", api_commits.preupload),
    ("POST", f"{_REPO}/commit/{{revision}}", api_commits.commit),
    ("POST", f"{_REPO}/super-squash/{{branch}}", api_commits.squash),
    ("GET", f"{_REPO}/xet-write-token/{{revision}}", xet.write_token),
    ("POST", f"{_XET}/v1/xorbs/default/{{hash}}", xet.add_xorb),
    ("POST", f"{_XET}/v1/shards", xet.add_shard),
    ("POST", f"{_LFS}/verify", api_commits.lfs_verify),
    ("PUT", f"{_LFS}/{{oid}}", api_commits.lfs_upload),
    ("GET", "/api/{kinds}/{name}", _missing),
    ("GET", "/api/{kinds}/{name}/revision/{revision}", _missing),
    ("GET", "/{name}/resolve/{revision}/{path*}", _missing),
]
_BY_KIND: list[tuple[str, str, Handler]] = [
    ("POST", "/{namespace}/{name}.git/info/lfs/objects/batch", api_commits.lfs_batch),
    ("GET", "/{namespace}/{name}/resolve/{revision}/{path*}", api_files.resolve),
    ("GET", "/{namespace}/{name}/raw/{revision}/{path*}", api_files.resolve),
    ("GET", "/{namespace}/{name}", pages.repo),
    ("GET", "/{namespace}/{name}/tree/{revision}", pages.tree),
    ("GET", "/{namespace}/{name}/tree/{revision}/{path*}", pages.tree),
    ("GET", "/{namespace}/{name}/blob/{revision}/{path*}", pages.blob),
    ("GET", "/{namespace}/{name}/commits/{revision}", pages.commits),
    ("GET", "/{namespace}/{name}/commit/{revision}", pages.commit),
]
_PAGES: list[tuple[str, str, Handler]] = [
    ("GET", "/", pages.index),
    ("GET", "/models", pages.index),  # where cards link to a population: /models?other=TAG
    ("GET", "/login", pages.login),
    ("GET", "/collections/{namespace}/{slug}", pages.collection),
]


def application(hub: Hub) -> Callable[[Incoming], Answer]:
    """Return the function that answers the requests to a Hub."""

    def answer(request: Incoming) -> Answer:
        try:
            return dispatch(request)
        except Refusal as refusal:
            if "text/html" in request.headers.get("Accept", "") and not request.path.startswith("/api/"):
                return pages.refused(refusal)
            raise

    def dispatch(request: Incoming) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        # Uploads through Xet come with a token of their own, which those routes check.
        caller = NOBODY if request.path.startswith("/xet/") else hub.access.caller(request.headers)
        allowed = set()
        for wanted, pattern, kinds, handler in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match is None:
                continue
            allowed.add(wanted)
            if wanted == method:
                parts = {name: _unquote(value) for name, value in match.groupdict().items()}
                return handler(Call(hub, request, caller, {"kinds": kinds, **parts}))
        if allowed:
            raise Refusal(405, f"{method} is not possible here.", headers={"Allow": ", ".join(sorted(allowed))})
        raise Refusal(404, f"hf_zoo's local Hub has nothing at {request.method} {request.path:.200}")

    return answer


def _compile(template: str) -> re.Pattern[str]:
    """Turn `/api/{kinds}/{path*}` into a pattern over the quoted path; only a starred part may span slashes."""
    pattern = re.escape(template).replace(r"\{kinds\}", "(?P<kinds>models|datasets|spaces)")
    pattern = re.sub(r"\\\{(\w+)\\\*\\\}", r"(?P<\1>.+)", pattern)
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", pattern))


def _unquote(text: str) -> str:
    """Unquote one part of a path, once."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, f"{text!r:.80} is not quoted UTF-8.") from None


_ROUTES: list[tuple[str, re.Pattern[str], str, Handler]] = [
    *((method, _compile(template), "models", handler) for method, template, handler in [*_API, *_PAGES]),
    *(
        (method, _compile(prefix + template), kinds, handler)
        for kinds, prefix in (("datasets", "/datasets"), ("spaces", "/spaces"), ("models", ""))
        for method, template, handler in _BY_KIND
    ),
]
