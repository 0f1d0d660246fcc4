"""Names a client may use: repos, branches, tags, paths, digests. Everything else is refused with 400.

Whatever becomes a path on disk is checked here first.
"""

from __future__ import annotations

import re
from typing import Any

from hf_zoo.hub.local.refusal import Refusal

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_RESERVED_NAMESPACES = frozenset((
    "api",
    "models",
    "datasets",
    "spaces",
    "collections",
    "login",
    "lfs",
    "xet",
    "docs",
    "settings",
    "static",
))
_FORBIDDEN_IN_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{")
_FORBIDDEN_SEGMENTS = frozenset(("", ".", "..", ".git"))
_SHA256 = re.compile(r"[0-9a-f]{64}")

MAX_ID_LENGTH = 96
MAX_PATH_BYTES = 1024
MAX_REF_BYTES = 255


def repo_id(namespace: Any, name: Any) -> str:
    """Return `namespace/name` if the Hub would accept it.

    Args:
        namespace: A user or an organisation.
        name: The repo's own name.

    Returns:
        The repo's id.

    Raises:
        Refusal: 400, if a part is not a name, or the id is too long.
    """
    for what, part in (("namespace", namespace), ("repo name", name)):
        if not isinstance(part, str) or not _NAME.fullmatch(part) or "--" in part or ".." in part:
            raise Refusal(
                400,
                f"Invalid {what}: {part!r}. Use letters, digits, '-', '_' and '.'; no '--' or '..'; "
                "no '-' or '.' at either end.",
            )
    if name.endswith((".git", ".ipynb", ".lock")):
        raise Refusal(400, f"Invalid repo name: {name!r}. It must not end in '.git', '.ipynb' or '.lock'.")
    if namespace.lower() in _RESERVED_NAMESPACES:
        raise Refusal(400, f"Invalid namespace: {namespace!r} is reserved.")
    if len(namespace) + 1 + len(name) > MAX_ID_LENGTH:
        raise Refusal(400, f"Invalid repo id: {namespace}/{name} has more than {MAX_ID_LENGTH} characters.")
    return f"{namespace}/{name}"


def split_repo_id(value: Any) -> tuple[str, str]:
    """Return (namespace, name) of a checked `namespace/name`.

    Args:
        value: What the client sent.

    Returns:
        The two parts.

    Raises:
        Refusal: 400, if it is not such an id.
    """
    if not isinstance(value, str) or value.count("/") != 1:
        raise Refusal(400, f"Invalid repo id: {value!r}. Expected 'namespace/name'.")
    namespace, name = value.split("/")
    repo_id(namespace, name)
    return namespace, name


def kind(value: Any) -> str:
    """Return `model`, `dataset` or `space`.

    Args:
        value: What the client sent; None means a model.

    Returns:
        The kind.

    Raises:
        Refusal: 400, for any other kind.
    """
    if value is None:
        return "model"
    if not isinstance(value, str) or value not in KINDS:
        raise Refusal(400, f"Invalid repo type: {value!r}. This Hub keeps {', '.join(KINDS)}.")
    return value


def ref_name(value: Any, what: str) -> str:
    """Return a branch or tag name that git would accept.

    Args:
        value: What the client sent.
        what: `branch` or `tag`, for the message.

    Returns:
        The name.

    Raises:
        Refusal: 400, if git would refuse it, or if it could be taken for a commit.
    """
    if not isinstance(value, str) or not value or len(value.encode("utf-8", "replace")) > MAX_REF_BYTES:
        raise Refusal(400, f"Invalid {what} name: expected 1 to {MAX_REF_BYTES} characters, got {value!r:.80}.")
    segments = value.split("/")
    if (
        _FORBIDDEN_IN_REF.search(value)
        or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in segments)
        or value in {"@", "HEAD"}
        or value.startswith(("refs/", "-"))
        or re.fullmatch(r"[0-9a-f]{40}", value)
        or not is_text(value)
    ):
        raise Refusal(400, f"Invalid {what} name: {value!r:.80} (git's rules for reference names).")
    return value


def path(value: Any) -> str:
    """Return a path inside a repo: relative, normal, with nothing that could leave the folder.

    Args:
        value: What the client sent.

    Returns:
        The path, segments joined by `/`.

    Raises:
        Refusal: 400, for absolute paths, empty, `.`, `..` or `.git` segments, backslashes and control characters.
    """
    if not isinstance(value, str) or not value:
        raise Refusal(400, f"Invalid path: expected a non-empty string, got {value!r:.80}.")
    if len(value.encode("utf-8", "replace")) > MAX_PATH_BYTES:
        raise Refusal(400, f"Invalid path: {value[:60]!r}... has more than {MAX_PATH_BYTES} bytes.")
    if any(segment.lower() in _FORBIDDEN_SEGMENTS for segment in value.split("/")):
        raise Refusal(400, f"Invalid path: {value!r:.80} is absolute or has an empty, '.', '..' or '.git' segment.")
    if "\\" in value or any(ord(letter) < 32 or ord(letter) == 127 for letter in value) or not is_text(value):
        raise Refusal(400, f"Invalid path: {value!r:.80} has a backslash or a control character.")
    return value


def sha256(value: Any) -> str:
    """Return a SHA-256 of 64 lower-case hexadecimal digits.

    Args:
        value: What the client sent.

    Returns:
        The digest.

    Raises:
        Refusal: 400, if it is anything else.
    """
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise Refusal(400, f"Invalid oid: expected 64 lower-case hexadecimal digits, got {value!r:.80}.")
    return value


def is_text(value: str) -> bool:
    """Return whether a string can be written as UTF-8 (JSON can smuggle in lone surrogates)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
