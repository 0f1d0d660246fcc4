"""A request on its way to the function that answers it, with the Hub it is about."""

from __future__ import annotations

from dataclasses import dataclass

from hf_zoo.hub.local import names
from hf_zoo.hub.local.access import Access, Caller
from hf_zoo.hub.local.collection_store import CollectionStore
from hf_zoo.hub.local.metadata import Catalogue
from hf_zoo.hub.local.records import Commit, Repo
from hf_zoo.hub.local.store import DEFAULT_BRANCH, Store
from hf_zoo.hub.local.wire import Incoming

KIND_OF = {plural: kind for kind, plural in names.KINDS.items()}


@dataclass(frozen=True)
class Hub:
    """What the Hub is made of."""

    store: Store
    catalogue: Catalogue
    collections: CollectionStore
    access: Access


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        hub: Whom it asks.
        request: What was sent.
        caller: Who sent it.
        parts: The named parts of the route, unquoted.
    """

    hub: Hub
    request: Incoming
    caller: Caller
    parts: dict[str, str]

    @property
    def kind(self) -> str:
        """Which kind of repo the route is about."""
        return KIND_OF[self.parts.get("kinds", "models")]

    @property
    def author(self) -> str:
        """The name under which the caller commits."""
        return self.caller.name or "anonymous"

    def repo(self) -> Repo:
        """Return the route's repo, if the caller may see it."""
        repo_id = f"{self.parts['namespace']}/{self.parts['name']}"
        repo = self.hub.store.repo(self.kind, repo_id)
        return self.hub.access.require_read(self.caller, repo)

    def repo_to_write(self) -> Repo:
        """Return the route's repo, if the caller may write to it."""
        repo = self.repo()
        self.hub.access.require_write(self.caller, repo.namespace)
        return repo

    def commit(self, repo: Repo) -> Commit:
        """Return the commit that the route's revision stands for."""
        return self.hub.store.commit(repo, self.hub.store.resolve(repo, self.parts.get("revision", DEFAULT_BRANCH)))

    def head(self, repo: Repo) -> Commit:
        """Return the head of a repo's default branch."""
        return self.hub.store.commit(repo, repo.branches[DEFAULT_BRANCH])

    def visible(self, kind: str) -> list[Repo]:
        """Return the repos of a kind that the caller may see."""
        return [repo for repo in self.hub.store.repos(kind) if not repo.private or self.caller.owns(repo.namespace)]
