"""Parents that are on the Hub themselves: a local name becomes `org/name` at the commit with those very weights."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from hf_zoo.errors import HubError, PopulationError
from hf_zoo.hub.client import HubAnswerError, check_repo_name, fetch_manifest
from hf_zoo.population import Manifest, Parent

ADAPTER_FILE = "adapter_config.json"

_INVISIBLE = frozenset({401, 403, 404})  # a Hub may answer any of these for a repo the token may not see


class ParentFinder:
    """Looks parents up in one namespace, each once.

    Args:
        namespace: User or organisation.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._found: dict[tuple[str, str | None], tuple[Manifest, str] | None] = {}
        self._lock = threading.Lock()

    def resolve(self, manifest: Manifest) -> Manifest:
        """Return the manifest with every parent that is published in the namespace as `org/name` and its commit.

        A parent is taken for the published one only if the hash of its weights is the same; others stay as they are.

        Args:
            manifest: What is known of the child.

        Raises:
            HubError: If the Hub cannot be reached or refuses.
        """
        return manifest.replace(parents=tuple(self._resolved(parent) for parent in manifest.parents))

    def _resolved(self, parent: Parent) -> Parent:
        if "/" in parent.repo or parent.sha256 is None:
            return parent
        found = self._look_up(parent.repo, parent.revision)
        if found is None:
            return parent
        published, commit = found
        if published.sha256 == parent.sha256:
            return self._at(parent, commit)
        # The weights may be those of a kept moment, although the name alone was noted.
        for snapshot in published.snapshots:
            if snapshot.sha256 == parent.sha256 and (kept := self._look_up(parent.repo, snapshot.name)):
                return self._at(parent, kept[1])
        return parent

    def _at(self, parent: Parent, commit: str) -> Parent:
        return Parent(
            repo=f"{self.namespace}/{parent.repo}",
            revision=commit,
            sha256=parent.sha256,
            role=parent.role,
            task=parent.task,
        )

    def _look_up(self, name: str, revision: str | None) -> tuple[Manifest, str] | None:
        with self._lock:  # held while asking: a hundred children of one parent ask once
            if (name, revision) in self._found:
                return self._found[name, revision]
            try:
                found = fetch_manifest(check_repo_name(self.namespace, name), revision)
            except HubAnswerError as error:
                if error.status not in _INVISIBLE:
                    raise
                return None  # not noted: it may be published before the next child asks
            except (HubError, PopulationError):
                return None  # no name for a repo, or no repo of hf_zoo: not the parent
            self._found[name, revision] = found
            return found


def adapter_for_hub(path: Path, manifest: Manifest) -> bytes:
    """Return an adapter's config that names its base model as the Hub knows it.

    Args:
        path: The folder's `adapter_config.json`.
        manifest: The adapter's manifest, parents resolved.

    Raises:
        HubError: If the base model is not on a Hub, so that nobody could load the adapter.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise HubError(f"{path}: is not JSON: {error}") from error
    base = str(config.get("base_model_name_or_path"))
    parent = next((parent for parent in manifest.parents if parent.role == "parent"), None)
    if parent is not None and "/" in parent.repo:
        config["base_model_name_or_path"], config["revision"] = parent.repo, parent.revision
    elif parent is not None or Path(base).exists():
        name = parent.repo if parent is not None else base
        raise HubError(f"{manifest.name}: its adapter needs {name}, which is not on the Hub: publish that first")
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
