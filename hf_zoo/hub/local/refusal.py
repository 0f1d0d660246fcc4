"""What the server says no with: a status, the Hub's error code and one sentence."""

from __future__ import annotations


class Refusal(Exception):
    """End a request with an error answer.

    Args:
        status: The HTTP status.
        message: What was wrong and what would be right, shown to the person by the client.
        code: The Hub's error code (`RepoNotFound`, `RevisionNotFound`, `EntryNotFound`), by which the client picks the
            exception it raises.
        extra: More keys of the JSON answer.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        extra: dict[str, object] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = extra or {}
        self.headers = headers or {}


def repo_not_found(repo_id: str) -> Refusal:
    """Return the 404 for a repo that is missing or that the caller may not see."""
    return Refusal(404, f"Repository not found: {repo_id}", code="RepoNotFound")


def revision_not_found(revision: str, repo_id: str) -> Refusal:
    """Return the 404 for a branch, tag or commit that the repo does not have."""
    return Refusal(404, f"Invalid rev id: {revision} in {repo_id}", code="RevisionNotFound")


def entry_not_found(path: str, repo_id: str) -> Refusal:
    """Return the 404 for a file or folder that the revision does not have."""
    return Refusal(404, f"Entry not found: {path} in {repo_id}", code="EntryNotFound")
