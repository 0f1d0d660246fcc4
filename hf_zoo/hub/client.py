"""Reading from a Hub: manifests, repos and populations; and every way a Hub can fail, as one kind of error.

All traffic goes through `huggingface_hub`, so `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and its cache are honoured.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from hf_zoo.errors import HubError, PopulationError, nearest
from hf_zoo.population import MANIFEST_FILE, SNAPSHOT_FOLDER, TRAINING_FOLDER, Manifest

POPULATION_TAG = "population:"
MERGE_TAG = "merge"

# A Hub that accepts a connection and then says nothing would otherwise be waited for without end; every wait for the
# next bytes counts anew, so that slow transfers of large files are not cut.
SILENCE_SECONDS = 120.0

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_MOST_CHARACTERS = 96
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")

_ADVICE = {
    400: "Correct what it names.",
    401: "Set HF_TOKEN to a valid token, or run `hf auth login`.",
    402: "The account has reached a limit of its plan.",
    403: "The token may not do this here: choose a namespace it can write to, or a token with write access.",
    404: "Check the name; a private repo also needs a token that may see it (HF_TOKEN).",
    409: "Something of that name exists or is being made: look at it there, then run the same command again.",
    412: "It changed in the meantime: run the same command again.",
    413: "A file or request is larger than this Hub takes.",
    416: "The file is shorter there than expected: run the same command again.",
    429: "Too many requests: wait a few minutes, then run the same command again; what is already there is skipped.",
}
_TROUBLE = "The Hub itself has trouble: run the same command again later; what is already there is skipped."


class HubAnswerError(HubError):
    """Report a Hub's refusal, with its status where there was an answer.

    Attributes:
        status: The HTTP status; null when no answer came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def hub_errors(doing: str, repo: str) -> Generator[None, None, None]:
    """Turn whatever `huggingface_hub` raises inside into a `HubError` that says what to do.

    Args:
        doing: What was being done, as it follows `while` (`reading`, `creating the repo`).
        repo: Whose it is: `org/name`, or a namespace.

    Yields:
        Nothing.

    Raises:
        HubError: With status, Hub, repo and advice; a token is never part of it.
    """
    place = f"{doing} {repo} at {constants.ENDPOINT}"
    try:
        _bound_silence()
        yield
    except HubError:
        raise
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(place, error.__cause__) from error
        raise _unreachable(place, error.__cause__ if isinstance(error.__cause__, HTTPError) else error) from error
    except HfHubHTTPError as error:
        raise _refused(place, error) from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise _unreachable(place, error) from error
    except HFValidationError as error:
        raise HubError(f"{repo}: not a name a Hub accepts: {_said(error)}") from error
    except (RuntimeError, ValueError, OSError, EntryNotFoundError) as error:
        # What huggingface_hub makes of a failed upload, a refused card, an answer that is no JSON and a full disk.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(place, cause, _said(error)) from error
        if isinstance(cause, HTTPError):
            raise _unreachable(place, cause) from error
        raise HubError(f"Failed while {place}: {_said(error)}") from error


def check_repo_name(namespace: str, name: str) -> str:
    """Return `namespace/name` if a Hub would accept it, without asking one.

    Args:
        namespace: A user or an organisation.
        name: The repo's own name.

    Returns:
        The repo's id.

    Raises:
        HubError: If a part is not a name, or both are too long.
    """
    for what, part in (("namespace", namespace), ("repo name", name)):
        if not _NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith((".git", ".ipynb")):
            raise HubError(
                f"{part!r} is not a {what} a Hub accepts: use letters, digits, `-`, `_`, `.`; neither `--` nor `..`;"
                " no `-` or `.` at either end; no `.git` at the end"
            )
    repo = f"{namespace}/{name}"
    if len(repo) > _MOST_CHARACTERS:
        raise HubError(f"{repo!r} has {len(repo)} characters, a Hub accepts {_MOST_CHARACTERS}: shorten the name")
    with hub_errors("checking the name of", repo):
        validate_repo_id(repo)
    return repo


def fetch_manifest(repo: str, revision: str | None = None) -> tuple[Manifest, str]:
    """Fetch a repo's manifest.

    Args:
        repo: `org/name`.
        revision: A snapshot's name, a branch, tag or commit; null for the last state.

    Returns:
        The manifest and the commit it was read at.

    Raises:
        PopulationError: If there is no folder of that name and no such form of repo id, or the repo has no manifest.
        HubError: If the Hub cannot be reached or refuses.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo):
        raise PopulationError(f"{repo}: no such folder, and a repo of a Hub is written `org/name`")
    with _no_folder(repo), hub_errors("reading", repo):
        try:
            path = Path(HfApi().hf_hub_download(repo, MANIFEST_FILE, revision=revision))
        except RemoteEntryNotFoundError:
            raise PopulationError(f"{repo}: no {MANIFEST_FILE} at {constants.ENDPOINT}: not of hf_zoo") from None
        except RevisionNotFoundError:
            raise _no_revision(repo, str(revision)) from None
    source = f"{repo}@{revision}" if revision else repo
    manifest = Manifest.read(path.parent, source)
    commit = _COMMIT.search(str(path))
    if commit is None:
        raise HubError(f"{source}: the Hub client keeps its files in an unknown layout: {path}")
    return manifest, commit[1]


def fetch_repo(repo: str, revision: str | None = None) -> Path:
    """Fetch a repo's files of one revision into the Hub client's cache.

    Args:
        repo: `org/name`.
        revision: A snapshot's name, a branch, tag or commit; null for the last state.

    Returns:
        The local folder, not to be written to.

    Raises:
        HubError: If the Hub cannot be reached or refuses, or there is no such repo or revision.
    """
    with _no_folder(repo), hub_errors("fetching", repo):
        try:
            ignored = [f"{SNAPSHOT_FOLDER}/*", f"{TRAINING_FOLDER}/*"]
            return Path(HfApi().snapshot_download(repo, revision=revision, ignore_patterns=ignored))
        except RevisionNotFoundError:
            raise _no_revision(repo, str(revision)) from None


def list_members(where: str) -> list[str]:
    """List the repos of a population, without merges of its members.

    Args:
        where: `org/population`.

    Returns:
        Repo ids, sorted.

    Raises:
        PopulationError: If `org` has no member of such a population that the token may see.
        HubError: If the Hub cannot be reached or refuses.
    """
    namespace, _, name = where.partition("/")
    if not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name):
        raise PopulationError(f"{where}: no such folder, and a population on a Hub is written `org/population`")
    with _no_folder(where), hub_errors("looking for the population", where):
        # `list_models` tries for half a minute before it says that nobody answers; this says it at once.
        get_session().head(constants.ENDPOINT)
        found = list(HfApi().list_models(author=namespace, filter=f"{POPULATION_TAG}{name}"))
        repos = sorted(model.id for model in found if MERGE_TAG not in (model.tags or ()))
        if repos:
            return repos
        every = {tag for model in HfApi().list_models(author=namespace, filter="hf_zoo") for tag in model.tags or ()}
    known = sorted(tag.removeprefix(POPULATION_TAG) for tag in every if tag.startswith(POPULATION_TAG))
    has = f"it has {', '.join(known)}" if known else "it has none that this token may see"
    raise PopulationError(
        f"{where}: {namespace} has no population {name!r} at {constants.ENDPOINT}{nearest(name, known)}: {has}"
    )


@contextmanager
def _no_folder(where: str) -> Generator[None, None, None]:
    """Say that what a Hub does not give is no folder either: whoever mistypes a folder is not sent to the network."""
    try:
        yield
    except HubAnswerError as error:
        if error.status not in {None, 404}:
            raise
        raise HubAnswerError(f"{error} There is no folder {where} here either.", error.status) from error


def hide_token(text: str) -> str:
    """Return text with the current token blotted out."""
    token = get_token()
    return text.replace(token, "***") if token else text


def _bound_silence() -> None:
    session = get_session()
    if session.timeout.read is None:
        session.timeout = SILENCE_SECONDS


def _no_revision(repo: str, revision: str) -> HubError:
    with hub_errors("listing the revisions of", repo):
        refs = HfApi().list_repo_refs(repo)
    names = sorted(ref.name for ref in [*refs.branches, *refs.tags])
    return HubAnswerError(
        f"{repo}: no revision {revision!r}{nearest(revision, names)}: it has {', '.join(names)}", 404
    )


def _refused(place: str, error: HfHubHTTPError, said: str | None = None) -> HubError:
    status = error.response.status_code
    said = said or error.server_message or ""
    said = f": {one_sentence(hide_token(said))}" if said else ""
    advice = _ADVICE.get(status, _TROUBLE if status >= 500 else "")
    return HubAnswerError(f"The Hub answered {status} while {place}{said}. {advice}".rstrip(), status)


def _unreachable(place: str, error: Exception) -> HubError:
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return HubAnswerError(
            f"Failed while {place}: offline mode is on and it is not in the cache. Unset HF_HUB_OFFLINE."
        )
    detail = _said(error) or type(error).__name__
    return HubAnswerError(
        f"No answer while {place}: {detail}. Check the network and HF_ENDPOINT, then run the same command again."
    )


def _said(error: BaseException) -> str:
    return one_sentence(hide_token(str(error)))


def one_sentence(text: str) -> str:
    """Return the text on one line without a full stop at its end."""
    return " ".join(text.split()).rstrip(".")
