"""Who asks, and what they may see and change."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message

from hf_zoo.errors import HubError
from hf_zoo.hub.local import names
from hf_zoo.hub.local.records import Repo
from hf_zoo.hub.local.refusal import Refusal, repo_not_found


@dataclass(frozen=True)
class Caller:
    """Who sent a request: None as the name means nobody in particular."""

    name: str | None
    namespaces: frozenset[str] | None  # None: all of them
    token: str | None = None

    def owns(self, namespace: str) -> bool:
        """Whether the caller may write to a namespace and see what is private in it."""
        return self.namespaces is None or namespace.lower() in self.namespaces


NOBODY = Caller(None, frozenset())


class Access:
    """Check tokens.

    Args:
        tokens: Token -> its user, and after commas the user's organisations: `{"hf_a": "alice,zoo"}`. None lets every
            token, or none, read and write everything.
        user: The name of whoever asks when there are no tokens.

    Raises:
        HubError: If a token is empty or a name is not one the Hub would accept.
    """

    def __init__(self, tokens: Mapping[str, str] | None, user: str) -> None:
        self.open = tokens is None
        self._user = user
        self._callers: list[Caller] = []
        try:
            names.repo_id(user, "x")
            for token, text in (tokens or {}).items():
                namespaces = [name.strip() for name in text.split(",")]
                for name in namespaces:
                    names.repo_id(name, "x")
                if not token or not token.isascii():
                    raise HubError("A token must be a non-empty ASCII string.")
                lowered = frozenset(name.lower() for name in namespaces)
                self._callers.append(Caller(namespaces[0], lowered, token))
        except Refusal as refusal:
            raise HubError(f"The Hub's users: {refusal.message}") from refusal

    def caller(self, headers: Message) -> Caller:
        """Return who asks.

        Args:
            headers: Of the request; the token comes as `Bearer`, or from a browser as the password of `Basic`.

        Returns:
            The caller.

        Raises:
            Refusal: 401, for a token that is not known here.
        """
        token = _token(headers.get("Authorization", ""))
        if self.open:
            return Caller(self._user, None, token)
        if token is None:
            return NOBODY
        for known in self._callers:
            if known.token is not None and hmac.compare_digest(known.token.encode(), token.encode()):
                return known
        raise Refusal(401, "Invalid credentials in Authorization header: this Hub does not know the token.")

    @staticmethod
    def require_read(caller: Caller, repo: Repo) -> Repo:
        """Return the repo if the caller may see it; otherwise it is not there."""
        if repo.private and not caller.owns(repo.namespace):
            raise repo_not_found(repo.id)
        return repo

    @staticmethod
    def require_write(caller: Caller, namespace: str) -> None:
        """Refuse with 401 if nobody asks, with 403 if somebody from another namespace does."""
        if caller.name is None:
            raise Refusal(401, "This needs a token: set HF_TOKEN, or pass token=.")
        if not caller.owns(namespace):
            raise Refusal(403, f"{caller.name} has no right to write to the namespace {namespace!r}.")


def _token(authorization: str) -> str | None:
    """Return the token of an Authorization header."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None
