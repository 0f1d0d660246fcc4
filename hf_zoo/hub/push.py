"""One revision of a repo, pushed as one commit, or not at all when the Hub has it already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile as RemoteFile

from hf_zoo.hub.client import hub_errors
from hf_zoo.hub.contents import RepoFile, is_weights

MAIN = "main"


@dataclass(frozen=True)
class PushedRevision:
    """What became of one revision.

    Attributes:
        repo: `org/name`.
        revision: The branch.
        commit: The commit the branch is at.
        uploaded: Files the commit changed; 0 when it was there already.
        skipped: Files the Hub had already.
    """

    repo: str
    revision: str
    commit: str
    uploaded: int
    skipped: int


@dataclass
class RemoteRepo:
    """A repo on a Hub, as it was found or just created.

    Attributes:
        api: The client.
        repo: `org/name`.
        branches: Branch -> commit.
    """

    api: HfApi
    repo: str
    branches: dict[str, str] = field(default_factory=dict)
    _first_commit: str | None = None

    @classmethod
    def open(cls, api: HfApi, repo: str, private: bool) -> RemoteRepo:
        """Look a repo up, and create it where there is none.

        Args:
            api: The client.
            repo: `org/name`.
            private: Whether a new repo is private; an existing one stays as it is.

        Raises:
            HubError: If the Hub cannot be reached or refuses.
        """
        with hub_errors("looking up", repo):
            try:
                refs = api.list_repo_refs(repo)
            except RepositoryNotFoundError:
                refs = None
        if refs is None:
            with hub_errors("creating", repo):
                api.create_repo(repo, private=private, exist_ok=True)
                refs = api.list_repo_refs(repo)
        return cls(api, repo, {branch.name: branch.target_commit for branch in refs.branches})

    def push(self, revision: str, files: Mapping[str, RepoFile], message: str) -> PushedRevision:
        """Bring a branch to the given files in one commit.

        Weights that are on the branch but not among the files are removed; other files somebody added stay.

        Args:
            revision: The branch, made from the repo's first commit where there is none.
            files: Path -> file.
            message: The commit's title.

        Returns:
            What was done.

        Raises:
            HubError: If the Hub cannot be reached, refuses, or the branch moved meanwhile.
        """
        with hub_errors(f"pushing {revision} of", self.repo):
            if revision not in self.branches:
                self.api.create_branch(self.repo, branch=revision, revision=self._first(), exist_ok=True)
                self.branches[revision] = self._first()
            remote = self._hashes(self.branches[revision])
            changed = [file for file in files.values() if remote.get(file.path) not in {file.sha256, file.blob}]
            stale = sorted(path for path in remote if is_weights(path) and path not in files)
            skipped = len(files) - len(changed)
            if not changed and not stale:
                return PushedRevision(self.repo, revision, self.branches[revision], 0, skipped)
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(file.path, file.source) for file in changed),
                *(CommitOperationDelete(path) for path in stale),
            ]
            done = self.api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                revision=revision,
                parent_commit=self.branches[revision],
            )
            self.branches[revision] = done.oid
            return PushedRevision(self.repo, revision, done.oid, len(operations), skipped)

    def _first(self) -> str:
        if self._first_commit is None:
            self._first_commit = self.api.list_repo_commits(self.repo)[-1].commit_id
        return self._first_commit

    def _hashes(self, commit: str) -> dict[str, str]:
        """Return path -> SHA-256 of a large file, git's hash of a regular one."""
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=commit)
        files = [entry for entry in tree if isinstance(entry, RemoteFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
