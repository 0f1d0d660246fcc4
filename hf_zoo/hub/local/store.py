"""What the Hub keeps: repos of three kinds, their commits, branches and tags, in one folder.

::

    FOLDER/hub.json                              format and the secret that signs upload addresses
    FOLDER/objects/ab/cdef...                    file contents by SHA-256
    FOLDER/repos/models/NAMESPACE/NAME/repo.json settings, branches, tags: replaced as a whole at every change
    FOLDER/repos/.../commits/SHA.json            one immutable file a commit, with its whole tree
    FOLDER/repos/.../lfs/SHA256                  empty marks: this object may be committed here
    FOLDER/collections/NAMESPACE/SLUG.json       see `collection_store`

Names are checked by `names` before they come here. One lock a repo orders its writers; readers take none, since
everything they read is immutable or replaced as a whole.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_zoo.errors import HubError
from hf_zoo.hub.local import git, names
from hf_zoo.hub.local.disk import FolderLock, ObjectBatch, ObjectStore, make_folder, read_json, sync_folder, write_json
from hf_zoo.hub.local.records import Change, Commit, Entry, Repo, Tag, apply_changes, now, timestamp
from hf_zoo.hub.local.refusal import Refusal, repo_not_found, revision_not_found

FORMAT = 1
DEFAULT_BRANCH = "main"
MAX_CACHED_COMMITS = 4096

LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "
    "safetensors tar tflite tgz wasm xz zip zst"
).split()
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in [*(f"*.{suffix}" for suffix in LFS_SUFFIXES), "saved_model/**/*", "*.tar.*", "*tfevents*"]
).encode()


class Store:
    """Open the folder of a Hub and hold it.

    Args:
        folder: Created if missing.

    Raises:
        HubError: If another process serves it, or it is not a Hub's folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            make_folder(folder.absolute())
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise HubError(f"{folder} cannot be a Hub's folder: {error.strerror}: name another one") from error
        self.folder = folder.absolute()
        known = {"hub.json", "lock", "objects", "incoming", "repos", "collections", "xet", "requests.log", "garbage"}
        foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in known)
        if foreign and not (self.folder / "hub.json").is_file():
            raise HubError(f"{folder} is no Hub's folder: it has {foreign[0]!r}. Name an empty or a new folder.")
        self._held = FolderLock(self.folder)
        try:
            self.incoming = self.folder / "incoming"
            if self.incoming.exists():  # what a crash left unfinished
                shutil.rmtree(self.incoming)
            make_folder(self.incoming)
            self.secret = self._read_secret()
            self.objects = ObjectStore(self.folder / "objects", self.incoming)
            self._lock = threading.RLock()
            self._cache_lock = threading.Lock()
            self._commits: OrderedDict[tuple[str, str], Commit] = OrderedDict()
            self._repos: dict[tuple[str, str], Repo] = {}
            self._garbage = self.folder / "garbage"
            self._read_repos()
            self._collect_garbage()
        except BaseException:
            self._held.release()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        self._held.release()

    def _read_secret(self) -> bytes:
        """Read the signing secret, or make it in a new folder."""
        path = self.folder / "hub.json"
        if not path.is_file():
            write_json(path, {"format": FORMAT, "secret": secrets.token_hex(32)}, self.incoming)
            path.chmod(0o600)
        content = read_json(path)
        if content["format"] != FORMAT:
            raise HubError(f"{path} has format {content['format']}; this hf_zoo reads {FORMAT}. Update hf_zoo.")
        return bytes.fromhex(content["secret"])

    def _read_repos(self) -> None:
        """Read every `repo.json`."""
        for kind, plural in names.KINDS.items():
            make_folder(self.folder / "repos" / plural)
            for path in sorted((self.folder / "repos" / plural).glob("*/*/repo.json")):
                content = read_json(path)
                tags = {name: Tag(**tag) for name, tag in content.pop("tags").items()}
                repo_id = f"{path.parent.parent.name}/{path.parent.name}"
                repo = Repo(kind=kind, id=repo_id, folder=path.parent, tags=tags, **content)
                self._repos[kind, repo_id.lower()] = repo

    # Repos

    def repo(self, kind: str, repo_id: str) -> Repo:
        """Return a repo; ids are told apart without regard to case, as on the Hub."""
        found = self._repos.get((kind, repo_id.lower()))
        if found is None:
            raise repo_not_found(repo_id)
        return found

    def repos(self, kind: str) -> list[Repo]:
        """Return all repos of a kind, by id."""
        with self._lock:
            found = [repo for repo in self._repos.values() if repo.kind == kind]
        return sorted(found, key=lambda repo: repo.id.lower())

    def create_repo(self, kind: str, repo_id: str, author: str, private: bool, sdk: str | None = None) -> Repo:
        """Create a repo whose first commit holds `.gitattributes`.

        Args:
            kind: `model`, `dataset` or `space`.
            repo_id: A checked id.
            author: Who creates it.
            private: Whether only its owners see it.
            sdk: What a Space runs on.

        Returns:
            The new repo.

        Raises:
            Refusal: 409, if it exists.
        """
        with self._lock:
            if (kind, repo_id.lower()) in self._repos:
                raise Refusal(409, f"You already created this {kind} repo: {repo_id}")
            home = self._home(kind, repo_id)
            built = self.incoming / secrets.token_hex(8)
            for folder in (built, built / "commits", built / "lfs"):
                folder.mkdir()
            repo = Repo(kind, repo_id, built, secrets.token_hex(12), timestamp(now()), private, sdk=sdk)
            with self.objects.batch() as batch:
                change = regular_file(".gitattributes", GITATTRIBUTES, batch)
                batch.keep()
            commit = self._write_commit(repo, None, [change], author, "initial commit", "")
            self._change(repo, branches={DEFAULT_BRANCH: commit.id})
            make_folder(home.parent)
            os.rename(built, home)
            sync_folder(home.parent)
            repo.folder = home
            self._repos[kind, repo_id.lower()] = repo
            return repo

    def delete_repo(self, repo: Repo) -> None:
        """Delete a repo; contents that no other repo has go when the Hub is next opened."""
        with self._lock, repo.lock:
            self._require_present(repo)
            trash = self.incoming / secrets.token_hex(8)
            os.rename(repo.folder, trash)
            sync_folder(repo.folder.parent)
            del self._repos[repo.kind, repo.id.lower()]
            self._garbage.touch()
        shutil.rmtree(trash)

    def move_repo(self, repo: Repo, to_id: str) -> None:
        """Give a repo another id; the old one is free afterwards."""
        with self._lock, repo.lock:
            self._require_present(repo)
            if (repo.kind, to_id.lower()) in self._repos and to_id.lower() != repo.id.lower():
                raise Refusal(409, f"Cannot move {repo.id} to {to_id}: that {repo.kind} repo exists.")
            home = self._home(repo.kind, to_id)
            make_folder(home.parent)
            os.rename(repo.folder, home)
            sync_folder(home.parent)
            sync_folder(repo.folder.parent)
            del self._repos[repo.kind, repo.id.lower()]
            repo.id, repo.folder = to_id, home
            self._repos[repo.kind, to_id.lower()] = repo

    def set_private(self, repo: Repo, private: bool) -> None:
        """Change who may see a repo."""
        with repo.lock:
            self._require_present(repo)
            self._change(repo, private=private)

    # Revisions

    def resolve(self, repo: Repo, revision: str) -> str:
        """Return the commit a branch, tag, full reference or (shortened) commit id stands for."""
        branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
        if branch in repo.branches:
            return repo.branches[branch]
        if tag in repo.tags:
            return repo.tags[tag].commit
        if 7 <= len(revision) <= 40 and all(letter in "0123456789abcdef" for letter in revision):
            matches = [path.stem for path in (repo.folder / "commits").glob(f"{revision}*.json")]
            if len(matches) == 1:
                return matches[0]
        raise revision_not_found(revision, repo.id)

    def commit(self, repo: Repo, commit_id: str) -> Commit:
        """Return a commit of the repo by its full id."""
        key = (repo.key, commit_id)
        with self._cache_lock:
            if key in self._commits:
                self._commits.move_to_end(key)
                return self._commits[key]
        try:
            content = read_json(repo.folder / "commits" / f"{commit_id}.json")
        except FileNotFoundError:  # deleted or moved while it was being read
            raise repo_not_found(repo.id) from None
        entries = {path: Entry(*values) for path, values in content.pop("entries").items()}
        return self._remember(repo, Commit(id=commit_id, entries=entries, **content))

    def history(self, repo: Repo, commit_id: str) -> Iterable[Commit]:
        """Yield a commit and those before it, newest first."""
        following: str | None = commit_id
        while following is not None:
            commit = self.commit(repo, following)
            yield commit
            following = commit.parent

    def create_branch(self, repo: Repo, name: str, starting_point: str) -> None:
        """Let a new branch begin at a revision."""
        with repo.lock:
            self._require_present(repo)
            target = self.resolve(repo, starting_point)
            if name in repo.branches:
                raise Refusal(409, f"Branch {name!r} already exists in {repo.id}.")
            self._change(repo, branches=repo.branches | {name: target})

    def delete_branch(self, repo: Repo, name: str) -> None:
        """Delete a branch; its commits stay."""
        with repo.lock:
            self._require_present(repo)
            if name == DEFAULT_BRANCH:
                raise Refusal(403, f"The branch {DEFAULT_BRANCH!r} of {repo.id} cannot be deleted.")
            if name not in repo.branches:
                raise revision_not_found(name, repo.id)
            self._change(repo, branches={other: head for other, head in repo.branches.items() if other != name})

    def create_tag(self, repo: Repo, name: str, revision: str, message: str) -> None:
        """Tag the commit a revision stands for."""
        with repo.lock:
            self._require_present(repo)
            target = self.resolve(repo, revision)
            if name in repo.tags:
                raise Refusal(409, f"Tag {name!r} already exists in {repo.id}.")
            self._change(repo, tags=repo.tags | {name: Tag(target, message)})

    def delete_tag(self, repo: Repo, name: str) -> None:
        """Delete a tag."""
        with repo.lock:
            self._require_present(repo)
            if name not in repo.tags:
                raise revision_not_found(name, repo.id)
            self._change(repo, tags={other: tag for other, tag in repo.tags.items() if other != name})

    # Commits

    def lfs_file(self, repo: Repo, path: str, sha256: str, size: int | None) -> Change:
        """Return the change for an object that was uploaded to this repo before."""
        if not self.may_commit(repo, sha256):
            raise Refusal(400, f"Object {sha256} of {path!r} was never uploaded to {repo.id}: upload it, then commit.")
        actual = self.objects.size(sha256)
        if size is not None and size != actual:
            raise Refusal(400, f"Object {sha256} of {path!r} has {actual} bytes, the commit says {size}.")
        return Change(path, sha256, actual, git.blob_id(git.lfs_pointer(sha256, actual)), lfs=True)

    def mark_uploaded(self, repo: Repo, sha256: str) -> None:
        """Note durably that an object may be committed to a repo: whoever marks it has shown to have its content."""
        (repo.folder / "lfs" / sha256).touch()
        sync_folder(repo.folder / "lfs")

    def may_commit(self, repo: Repo, sha256: str) -> bool:
        """Whether an object is here and was uploaded to this repo, not just to somebody else's."""
        return (repo.folder / "lfs" / sha256).is_file() and self.objects.has(sha256)

    def add_commit(
        self,
        repo: Repo,
        branch: str,
        changes: list[Change],
        *,
        author: str,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Put a commit on a branch, durably.

        A commit that changes nothing is not made: the head is the answer, so that a client may safely repeat one.

        Args:
            repo: The repo.
            branch: An existing branch.
            changes: What changes, in order.
            author: Who commits.
            title: First line of the message.
            message: The rest.
            parent: The commit the client worked from (or its first digits); None if it does not care.

        Returns:
            The branch's new head.

        Raises:
            Refusal: 404 for an unknown branch, 412 if the branch has moved on from `parent`, 400 for trees git could
                not hold.
        """
        with repo.lock:
            self._require_present(repo)
            branch = branch.removeprefix("refs/heads/")
            head = repo.branches.get(branch)
            if head is None:
                raise revision_not_found(branch, repo.id)
            if parent is not None and not head.startswith(parent):
                raise Refusal(412, f"{branch} of {repo.id} is at {head}, not at {parent}: fetch it and try again.")
            commit = self._write_commit(repo, self.commit(repo, head), changes, author, title, message)
            if commit.id != head:
                self._change(repo, branches=repo.branches | {branch: commit.id})
            return commit

    def squash(self, repo: Repo, branch: str, author: str, message: str) -> Commit:
        """Replace a branch's history by one commit with the same files."""
        with repo.lock:
            self._require_present(repo)
            if branch not in repo.branches:
                raise revision_not_found(branch, repo.id)
            entries = self.commit(repo, repo.branches[branch]).entries
            changes = [Change(path, e.sha256, e.size, e.blob, e.lfs) for path, e in entries.items()]
            commit = self._write_commit(repo, None, changes, author, message, "")
            self._change(repo, branches=repo.branches | {branch: commit.id})
            return commit

    # Inside

    def _collect_garbage(self) -> None:
        """Delete the objects that no repo has any more, once a repo was deleted; nothing uploads yet."""
        if not self._garbage.exists():
            return
        used: set[str] = set()
        for repo in self._repos.values():
            used.update(path.name for path in (repo.folder / "lfs").iterdir())
            for path in (repo.folder / "commits").glob("*.json"):
                used.update(entry.sha256 for entry in self.commit(repo, path.stem).entries.values())
        for sha256, path in list(self.objects.all()):
            if sha256 not in used:
                path.unlink()
        self._garbage.unlink()

    def _change(self, repo: Repo, **settings: Any) -> None:
        """Write changed settings, branches or tags durably; only then does anybody see them."""
        write_json(repo.folder / "repo.json", replace(repo, **settings).saved(), self.incoming)
        for name, value in settings.items():
            setattr(repo, name, value)

    def _home(self, kind: str, repo_id: str) -> Path:
        return self.folder / "repos" / names.KINDS[kind] / repo_id

    def _require_present(self, repo: Repo) -> None:
        """Refuse to write to a repo that was deleted since it was looked up."""
        if self._repos.get((repo.kind, repo.id.lower())) is not repo:
            raise repo_not_found(repo.id)

    def _remember(self, repo: Repo, commit: Commit) -> Commit:
        with self._cache_lock:
            self._commits[repo.key, commit.id] = commit
            if len(self._commits) > MAX_CACHED_COMMITS:
                self._commits.popitem(last=False)
        return commit

    def _write_commit(
        self, repo: Repo, parent: Commit | None, changes: list[Change], author: str, title: str, message: str
    ) -> Commit:
        """Apply changes to a tree and write the commit, which no branch shows yet."""
        before = dict(parent.entries) if parent else {}
        after = apply_changes(before, changes)
        if parent is not None and after == before:
            return parent
        date = now()
        tree = git.tree_ids({path: entry.blob for path, entry in after.items()})[""]
        text = f"{title}\n\n{message}" if message else title
        commit_id = git.commit_id(tree, parent.id if parent else None, author, date, text)
        entries = {
            path: entry if entry.commit else Entry(entry.sha256, entry.size, entry.blob, entry.lfs, commit_id)
            for path, entry in after.items()
        }
        commit = Commit(commit_id, parent.id if parent else None, title, message, author, timestamp(date), entries)
        content: dict[str, Any] = {
            "parent": commit.parent,
            "title": title,
            "message": message,
            "author": author,
            "date": commit.date,
            "entries": {path: [e.sha256, e.size, e.blob, e.lfs, e.commit] for path, e in sorted(entries.items())},
        }
        write_json(repo.folder / "commits" / f"{commit_id}.json", content, self.incoming)
        return self._remember(repo, commit)


def regular_file(path: str, content: bytes, batch: ObjectBatch) -> Change:
    """Return the change for a content that comes with its commit; it is kept when the batch is."""
    return Change(path, batch.add(content), len(content), git.blob_id(content))
