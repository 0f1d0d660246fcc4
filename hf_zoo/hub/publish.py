"""Publishing: a member's folder becomes its repo, its snapshots the repo's branches, its population a collection.

Every revision is one commit; what the Hub has already is not sent again, so a second run sends nothing and a run that
broke off continues. `main` comes last: a repo with a card on it is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from hf_zoo.errors import HubError, ZooError
from hf_zoo.files import json_text, weights_digest
from hf_zoo.hub.cards import CARD_FILE, render_card, render_collection, render_note, write_card
from hf_zoo.hub.client import check_repo_name, hub_errors
from hf_zoo.hub.contents import RepoFile, file_of, folder_files
from hf_zoo.hub.lineage import ADAPTER_FILE, ParentFinder, adapter_for_hub
from hf_zoo.hub.push import MAIN, PushedRevision, RemoteRepo
from hf_zoo.population import (
    MANIFEST_FILE,
    SNAPSHOT_FOLDER,
    Manifest,
    Snapshot,
    read_index,
)
from hf_zoo.recipe.schema import PublishSpec

Progress = Callable[[str, int, int], None]

# Tokenizer, processor and code, which every moment of a member shares.
_SHARED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")
_MOST_NAMED = 5


@dataclass(frozen=True)
class PublishReport:
    """What a run published.

    Attributes:
        revisions: Every revision looked at, in the members' order.
        collection_slug: The collection's name on the Hub; null when there is none.
        url: Address of the collection, or of the first repo.
        waiting: Members not published because their training has not finished.
        left_out: Files that do not belong into a repo, with their member's name.
    """

    revisions: tuple[PushedRevision, ...] = ()
    collection_slug: str | None = None
    url: str | None = None
    waiting: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def repos(self) -> tuple[str, ...]:
        """The repos, each once."""
        return tuple(dict.fromkeys(revision.repo for revision in self.revisions))

    @property
    def commits(self) -> tuple[str, ...]:
        """The commits made."""
        return tuple(revision.commit for revision in self.revisions if revision.uploaded)

    @property
    def uploaded_files(self) -> int:
        """How many files were sent."""
        return sum(revision.uploaded for revision in self.revisions)

    @property
    def skipped_files(self) -> int:
        """How many files were on the Hub already."""
        return sum(revision.skipped for revision in self.revisions)


@dataclass(frozen=True)
class _Published:
    manifest: Manifest
    revisions: tuple[PushedRevision, ...]
    left_out: tuple[str, ...]


def publish_member(folder: Path, namespace: str | None, spec: PublishSpec) -> PublishReport:
    """Publish one member or merge, and add it to the collection of its population where it has one.

    Its card and manifest are brought to the form they have on the Hub first.

    Args:
        folder: The folder with `zoo.json`.
        namespace: User or organisation; null takes the spec's.
        spec: How it appears.

    Returns:
        What was done.

    Raises:
        HubError: If it is not finished or not whole, the Hub cannot be reached or refuses.
        PopulationError: If the folder holds no manifest.
    """
    namespace = _namespace(namespace or spec.namespace)
    manifest = Manifest.read(folder)
    check_repo_name(namespace, manifest.name)
    published = _publish(Path(folder), manifest, namespace, spec, ParentFinder(namespace))
    slug, url = _collect([published.manifest], namespace, spec)
    return PublishReport(published.revisions, slug, url or _repo_url(published.revisions), left_out=published.left_out)


def publish_population(folder: Path, spec: PublishSpec, progress: Progress | None = None) -> PublishReport:
    """Publish every finished member of a population, several at a time, and their collection.

    Args:
        folder: The folder with `population.json`.
        spec: How it appears.
        progress: Called after each member with its name, and how many of how many are done.

    Returns:
        What was done.

    Raises:
        HubError: If nothing can be published, or, after all others were, for the members that could not.
        PopulationError: If the folder is not a population's or a manifest cannot be read.
    """
    folder = Path(folder)
    namespace = _namespace(spec.namespace)
    index = read_index(folder)
    names = [entry["name"] for entry in index["members"]]
    manifests = {name: Manifest.read(folder / name) for name in names if (folder / name / MANIFEST_FILE).is_file()}
    ready = {name: manifest for name, manifest in manifests.items() if manifest.status == "finished"}
    waiting = tuple(name for name in names if name not in ready)
    if not ready:
        raise HubError(f"{folder}: none of its {len(names)} members has finished: train them first")
    _check_names(namespace, ready)
    done, failures = _publish_all(folder, ready, namespace, spec, progress)
    slug = url = None
    if done:
        try:
            slug, url = _collect([done[name].manifest for name in ready if name in done], namespace, spec)
        except HubError as error:
            failures["the collection"] = error
    if failures:
        raise _failed(failures, len(done), len(ready))
    revisions = tuple(revision for name in ready for revision in done[name].revisions)
    left_out = tuple(f"{name}/{path}" for name in ready for path in done[name].left_out)
    return PublishReport(revisions, slug, url or _repo_url(revisions), waiting, left_out)


def snapshot_manifest(manifest: Manifest, snapshot: Snapshot) -> Manifest:
    """Return what a snapshot's own revision says of it: the member as it was then."""
    results = tuple(record for record in manifest.results if record.get("step", 0) <= snapshot.step)
    return manifest.replace(
        results=results, metrics=snapshot.metrics, snapshots=(), statistics=(), sha256=snapshot.sha256
    )


def _namespace(namespace: str | None) -> str:
    if not namespace:
        raise HubError("nobody to publish for: set `publish.namespace` (`namespace=` of hf_zoo.publish)")
    return namespace


def _check_names(namespace: str, manifests: dict[str, Manifest]) -> None:
    mistakes = []
    for name, manifest in manifests.items():
        try:
            check_repo_name(namespace, manifest.name)
        except HubError as error:
            mistakes.append(str(error))
        if manifest.name != name:
            mistakes.append(f"{name}: its {MANIFEST_FILE} says it is {manifest.name!r}")
    if mistakes:
        raise HubError("\n".join(dict.fromkeys(mistakes)))


def _publish_all(
    folder: Path, manifests: dict[str, Manifest], namespace: str, spec: PublishSpec, progress: Progress | None
) -> tuple[dict[str, _Published], dict[str, ZooError]]:
    """Publish level by level, so that a parent is there before its children look it up."""
    done: dict[str, _Published] = {}
    failures: dict[str, ZooError] = {}
    finder = ParentFinder(namespace)
    stopped = threading.Event()

    def publish(name: str) -> _Published | None:
        return None if stopped.is_set() else _publish(folder / name, manifests[name], namespace, spec, finder)

    with ThreadPoolExecutor(max_workers=max(1, spec.workers)) as pool:
        try:
            for level in _levels(manifests):
                futures = {pool.submit(publish, name): name for name in level}
                for future in as_completed(futures):
                    name = futures[future]
                    try:
                        if (published := future.result()) is not None:
                            done[name] = published
                    except ZooError as error:
                        failures[name] = error
                    if progress is not None:
                        progress(name, len(done) + len(failures), len(manifests))
        except BaseException:
            stopped.set()  # those not begun are not begun; those under way end as whole commits
            raise
    return done, failures


def _levels(manifests: dict[str, Manifest]) -> list[list[str]]:
    """Return names grouped so that every parent within the population comes in an earlier group."""
    parents = {
        name: {parent.repo for parent in manifest.parents if parent.repo in manifests and parent.repo != name}
        for name, manifest in manifests.items()
    }
    levels: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(manifests):
        level = [name for name in manifests if name not in placed and parents[name] <= placed]
        level = level or [name for name in manifests if name not in placed]  # a circle: no order is right
        levels.append(level)
        placed.update(level)
    return levels


def _publish(folder: Path, manifest: Manifest, namespace: str, spec: PublishSpec, finder: ParentFinder) -> _Published:
    repo = f"{namespace}/{manifest.name}"
    if manifest.status != "finished":
        raise HubError(f"{folder}: its training has status {manifest.status!r}: only finished models are published")
    manifest = _hub_form(folder, manifest, repo, spec, finder)
    files, left_out = folder_files(folder)
    _check_weights(folder, files, manifest)
    if ADAPTER_FILE in files:
        files[ADAPTER_FILE] = file_of(ADAPTER_FILE, adapter_for_hub(folder / ADAPTER_FILE, manifest))
    snapshots = manifest.snapshots if spec.snapshots else ()
    kept = {snapshot.name: _snapshot_files(folder, manifest, snapshot, repo, files) for snapshot in snapshots}
    remote = RemoteRepo.open(HfApi(library_name="hf_zoo"), repo, spec.private)
    revisions = [
        remote.push(snapshot.name, kept[snapshot.name], f"Snapshot {snapshot.name} of {manifest.name}")
        for snapshot in snapshots
    ]
    what = "Merge" if manifest.kind == "merge" else "Member"
    revisions.append(remote.push(MAIN, files, f"{what} {manifest.name}, made with hf_zoo"))
    return _Published(manifest, tuple(revisions), left_out)


def _hub_form(folder: Path, manifest: Manifest, repo: str, spec: PublishSpec, finder: ParentFinder) -> Manifest:
    """Bring card and manifest in the folder to the bytes they have on the Hub, and return the manifest."""
    resolved = finder.resolve(manifest).replace(
        license=spec.license or manifest.license, language=spec.language or manifest.language
    )
    try:
        if resolved != manifest:
            resolved.write(folder)
        write_card(folder, repo, resolved if spec.snapshots else resolved.replace(snapshots=()))
    except OSError as error:
        raise HubError(f"{folder}: its card cannot be written: {error.strerror}") from error
    return resolved


def _check_weights(folder: Path, files: dict[str, RepoFile], manifest: Manifest) -> None:
    weights = [file for path, file in files.items() if "/" not in path and path.endswith(".safetensors")]
    if not weights:
        raise HubError(f"{folder}: no weights (*.safetensors) to publish")
    digest = weights[0].sha256 if len(weights) == 1 else weights_digest(folder)
    if manifest.sha256 not in {None, digest}:
        raise HubError(
            f"{folder}: its weights have SHA-256 {digest[:12]}…, {MANIFEST_FILE} says {str(manifest.sha256)[:12]}…:"
            " they were truncated or changed after they were made"
        )


def _snapshot_files(
    folder: Path, manifest: Manifest, snapshot: Snapshot, repo: str, last: dict[str, RepoFile]
) -> dict[str, RepoFile]:
    """Return a snapshot's revision: its own files, card and manifest, and the last state's tokenizer or processor."""
    place = folder / SNAPSHOT_FOLDER / snapshot.name
    if not place.is_dir():
        raise HubError(f"{place}: no such folder, although {MANIFEST_FILE} lists it: was it removed?")
    own, _ = folder_files(place)
    manifest = snapshot_manifest(manifest, snapshot)
    _check_weights(place, own, manifest)
    shared = {
        path: file
        for path, file in last.items()
        if "/" not in path and path.endswith(_SHARED_SUFFIXES) and not file.is_weights
    }
    files = {**shared, **own}
    if ADAPTER_FILE in own:
        files[ADAPTER_FILE] = file_of(ADAPTER_FILE, adapter_for_hub(place / ADAPTER_FILE, manifest))
    files[CARD_FILE] = file_of(CARD_FILE, render_card(manifest, repo, snapshot.name).encode())
    files[MANIFEST_FILE] = file_of(MANIFEST_FILE, json_text(manifest.to_dict()).encode())
    return files


def _collect(manifests: Sequence[Manifest], namespace: str, spec: PublishSpec) -> tuple[str | None, str | None]:
    """Add models to their population's collection, made where there is none; those in it stay as they are."""
    title = spec.collection or manifests[0].population
    if not title:
        return None, None
    api = HfApi(library_name="hf_zoo")
    with hub_errors("looking up the collections of", namespace):
        found = [listed.slug for listed in api.list_collections(owner=namespace) if listed.title == title]
        collection = api.get_collection(found[0]) if found else None
    with hub_errors(f"filling the collection {title!r} of", namespace):
        if collection is None:
            description = render_collection(manifests)
            collection = api.create_collection(
                title, namespace=namespace, description=description, private=spec.private, exists_ok=True
            )
        present = {item.item_id for item in collection.items}
        for manifest in manifests:
            repo = f"{namespace}/{manifest.name}"
            if repo not in present:
                note = render_note(manifest) or None
                api.add_collection_item(collection.slug, repo, "model", note=note, exists_ok=True)
    return collection.slug, collection.url


def _repo_url(revisions: Sequence[PushedRevision]) -> str | None:
    return f"{HfApi().endpoint}/{revisions[0].repo}" if revisions else None


def _failed(failures: dict[str, ZooError], num_done: int, num_members: int) -> HubError:
    """Return one error for all failures, those with the same words together."""
    by_message: dict[str, list[str]] = {}
    for name, error in failures.items():
        by_message.setdefault(str(error).replace(name, "NAME"), []).append(name)
    lines = []
    for message, names in by_message.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        text = message.replace("NAME", names[0]) if len(names) == 1 else message
        lines.append(f"  - {', '.join(names[:_MOST_NAMED])}{more}: {text}")
    return HubError(
        f"{len(failures)} not published, {num_done} of {num_members} members are: run the same command again\n"
        + "\n".join(lines)
    )
