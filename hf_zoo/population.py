"""What exists: a member is a repo, a population is a folder of members or their repos on a Hub.

A member's folder is its Hub repo, byte for byte: weights, config, processor, card (`README.md`), manifest (`zoo.json`)
and one line of results an epoch (`results.jsonl`). Snapshots lie in `snapshots/NAME` locally and are the revision
`NAME` on a Hub; what training needs to resume lies in `.training` and is never published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.errors import PopulationError, nearest
from hf_zoo.files import write_json

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from hf_zoo.checkpoint import CheckpointReader

MANIFEST_FILE = "zoo.json"
POPULATION_FILE = "population.json"
RESULTS_FILE = "results.jsonl"
SNAPSHOT_FOLDER = "snapshots"
TRAINING_FOLDER = ".training"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A model another one was made from.

    Attributes:
        repo: `org/name`, or the member's name where it was never on a Hub.
        revision: Commit on a Hub, or the snapshot's name; null for the last state.
        sha256: Hash of its weights file, as 64 hexadecimal digits.
        role: `parent` (fine-tuned from), `member` (merged) or `base` (task vectors were taken against it).
        task: Its task.
    """

    repo: str
    revision: str | None = None
    sha256: str | None = None
    role: str = "parent"
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A kept moment of a training run; on a Hub it is the revision of the same name.

    Attributes:
        name: `epoch-010`, `step-001000` or `best`.
        step: Optimizer steps done.
        epoch: Passes over the training split done.
        sha256: Hash of its weights file.
        metrics: The record of that moment, where one was taken.
    """

    name: str
    step: int
    epoch: float
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known of a member or a merge: the content of `zoo.json`. Holds no times and no paths of a machine.

    Attributes:
        name: The repo's name without namespace.
        population: Name of the population; for a merge, of its members' population where there is one.
        kind: `member` or `merge`.
        status: `planned`, `training`, `finished` or `failed`.
        objective: What was learned.
        task: Short name of what it can do.
        tasks: For a merge, its tasks in order.
        description: One sentence.
        factors: Generating factors as used: dotted path -> value.
        parents: Where it comes from.
        recipe: The member's own recipe, every default spelt out.
        digest: SHA-256 of that recipe.
        results: One record an epoch, the first of the untrained network; for a merge, one record a task and model.
        metrics: The last record; for a merge, the mean over tasks.
        snapshots: Kept moments.
        statistics: Descriptions of the files in `statistics/`.
        dataset: `path`, `name`, `revision`, `labels`, and the number of samples of each split.
        loading: What was taken from the parent and what was replaced.
        method: For a merge: `name`, `parameters`, `title`, `paper`, `url`.
        diagnostics: For a merge, what was measured of it beside its scores: kind -> tables.
        auto_class: The Auto class that loads it (`AutoModelForMaskedLM`).
        architecture: The class it loads as (`BertForMaskedLM`).
        model_type: Its config's model type.
        library: `transformers`, `timm` or `peft`.
        num_parameters: Number of parameters, tied ones once.
        sha256: Hash of the weights file.
        versions: Library -> version it was made with.
        license: Licence of the weights, as the Hub spells it; set when it is published.
        language: Language codes, as the Hub spells them; set when it is published.
        failure: Why it failed.
    """

    name: str
    population: str | None = None
    kind: str = "member"
    status: str = "planned"
    objective: str | None = None
    task: str | None = None
    tasks: tuple[str, ...] = ()
    description: str = ""
    factors: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None
    results: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    statistics: tuple[dict[str, Any], ...] = ()
    dataset: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    auto_class: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    library: str = "transformers"
    num_parameters: int | None = None
    sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    language: tuple[str, ...] = ()
    failure: str | None = None
    schema: int = SCHEMA

    def replace(self, **changes: Any) -> Manifest:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def write(self, folder: Path) -> None:
        """Write `zoo.json` into a member's folder, atomically."""
        write_json(folder / MANIFEST_FILE, self.to_dict())

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str) -> Manifest:
        """Build a manifest from JSON types.

        Args:
            content: The content of a `zoo.json`.
            source: Whose it is, for the error.

        Raises:
            PopulationError: If it is not a manifest, or one of a newer hf_zoo.
        """
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            raise PopulationError(f"{source}: {MANIFEST_FILE} is not a manifest of hf_zoo (no `name`)")
        if not isinstance(schema := content.get("schema"), int) or schema > SCHEMA:
            raise PopulationError(
                f"{source}: {MANIFEST_FILE} has schema {schema!r}, this hf_zoo knows up to {SCHEMA}: update hf_zoo"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        mappings = ("factors", "recipe", "metrics", "dataset", "loading", "method", "diagnostics", "versions")
        if wrong := [key for key in mappings if not isinstance(values.get(key, {}), dict)]:
            raise PopulationError(f"{source}: {MANIFEST_FILE} is not a manifest of hf_zoo: `{wrong[0]}` is no mapping")
        try:
            values["parents"] = tuple(Parent(**parent) for parent in values.get("parents", ()))
            values["snapshots"] = tuple(Snapshot(**snapshot) for snapshot in values.get("snapshots", ()))
            for key in ("results", "statistics", "tasks", "language"):
                values[key] = tuple(values.get(key, ()))
            return cls(**values)
        except TypeError as error:
            raise PopulationError(f"{source}: {MANIFEST_FILE} is not a manifest of hf_zoo: {error}") from error

    @classmethod
    def read(cls, folder: Path, source: str | None = None) -> Manifest:
        """Read a member folder's `zoo.json`.

        Raises:
            PopulationError: If there is none, or it is not a manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise PopulationError(f"{source or folder}: no {MANIFEST_FILE}: this is not a member's folder") from None
        except (ValueError, OSError) as error:
            raise PopulationError(f"{source or folder}: {MANIFEST_FILE} cannot be read: {error}") from error
        return cls.from_dict(content, source or str(folder))


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: `WHERE[@REVISION][#SUBFOLDER]`.

    Attributes:
        where: A folder, or `org/name` on a Hub.
        revision: A snapshot's name, a branch, tag or commit.
        subfolder: A folder inside the repo (`mnli` of a merge).
    """

    where: str
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Split `WHERE[@REVISION][#SUBFOLDER]`; an existing folder whose own name holds `@` or `#` is taken whole."""
        if Path(text).is_dir():
            return cls(text)
        rest, _, subfolder = text.partition("#")
        where, _, revision = rest.rpartition("@") if "@" in rest else (rest, "", "")
        return cls(where, revision or None, subfolder or None)

    @property
    def is_local(self) -> bool:
        """Whether it names an existing folder."""
        return Path(self.where).is_dir()

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.where + revision + (f"#{self.subfolder}" if self.subfolder else "")


@dataclass(frozen=True)
class Member:
    """A trained or merged model, in a folder or on a Hub.

    Attributes:
        manifest: What is known of it.
        folder: Its local folder; null for one on a Hub.
        repo: `org/name` on a Hub; null for a folder.
        commit: The commit its manifest was read at; null for a folder.
    """

    manifest: Manifest
    folder: Path | None = None
    repo: str | None = None
    commit: str | None = None

    @classmethod
    def open(cls, where: str | Path) -> Member:
        """Open a member's folder, or its repo `org/name[@revision]` on the Hub.

        Raises:
            PopulationError: If there is no such folder or repo, or it holds no manifest.
        """
        reference = Reference.parse(str(where))
        if reference.is_local:
            return cls(Manifest.read(Path(reference.where)), folder=Path(reference.where))
        from hf_zoo.hub.client import fetch_manifest

        manifest, commit = fetch_manifest(reference.where, reference.revision)
        return cls(manifest, repo=reference.where, commit=commit)

    @property
    def name(self) -> str:
        """Its name without namespace."""
        return self.manifest.name

    @property
    def factors(self) -> dict[str, Any]:
        """Its generating factors as used."""
        return self.manifest.factors

    @property
    def metrics(self) -> dict[str, float]:
        """Its last record."""
        return self.manifest.metrics

    def path(self, revision: str | None = None) -> Path:
        """Return a local folder with the weights of a revision, fetched from the Hub where need be.

        Args:
            revision: Name of a snapshot (on a Hub: any branch, tag or commit); null for the last state.

        Raises:
            PopulationError: If there is no such snapshot.
        """
        if self.folder is not None:
            if revision is None:
                return self.folder
            path = self.folder / SNAPSHOT_FOLDER / revision
            if not path.is_dir():
                names = [snapshot.name for snapshot in self.manifest.snapshots]
                hint = nearest(revision, names) or (f": it has {', '.join(names)}" if names else ": it has none")
                raise PopulationError(f"{self.folder}: no snapshot {revision!r}{hint}")
            return path
        from hf_zoo.hub.client import fetch_repo

        assert self.repo is not None
        return fetch_repo(self.repo, revision or self.commit)

    def load(self, revision: str | None = None, **kwargs: Any) -> PreTrainedModel:
        """Return the model through the stock Auto class of its manifest, in evaluation mode.

        Args:
            revision: Name of a snapshot; null for the last state.
            **kwargs: Passed to `from_pretrained`.
        """
        import transformers

        auto_class = getattr(transformers, self.manifest.auto_class or "AutoModel")
        if self.manifest.library == "peft":
            from hf_zoo.adapters import load_adapter

            return load_adapter(auto_class, self.path(revision), self.manifest.dataset.get("labels") or (), **kwargs)
        if self.manifest.model_type == "zoo_mlp_head":
            import_module("hf_zoo.models.mlp_head")  # registers its class with the Auto classes
        return auto_class.from_pretrained(str(self.path(revision)), **kwargs)

    def tensors(self, revision: str | None = None) -> CheckpointReader:
        """Return a lazy reader of its weights."""
        from hf_zoo.checkpoint import CheckpointReader

        return CheckpointReader.open(self.path(revision))

    def __str__(self) -> str:
        return self.repo or str(self.folder)


@dataclass(frozen=True)
class Population:
    """Members that belong together, in their grid's order.

    Attributes:
        name: The population's name.
        members: Its members.
        folder: Its local folder; null for one on a Hub.
    """

    name: str
    members: tuple[Member, ...]
    folder: Path | None = None

    @classmethod
    def open(cls, where: str | Path) -> Population:
        """Open a population's folder, or `org/name` on the Hub: every repo of `org` tagged as one of its members.

        Planned members that have no manifest yet are left out.

        Raises:
            PopulationError: If there is no such folder or population, or a manifest cannot be read.
        """
        folder = Path(where)
        if folder.is_dir():
            index = read_index(folder)
            present = [folder / entry["name"] for entry in index["members"]]
            members = tuple(Member.open(path) for path in present if (path / MANIFEST_FILE).is_file())
            return cls(index["name"], members, folder)
        from hf_zoo.hub.client import list_members

        repos = list_members(str(where))
        with ThreadPoolExecutor(max_workers=8) as pool:
            members = tuple(pool.map(Member.open, repos))
        return cls(str(where).partition("/")[2], tuple(sorted(members, key=lambda member: member.name)))

    def where(self, **factors: Any) -> Population:
        """Keep the members whose factor, or manifest field, equals each value given.

        Args:
            **factors: A factor's dotted path with `__` for the dot, its last part, or a manifest field
                (`task="sst"`, `learning_rate=1e-3`, `training__learning_rate=1e-3`); a list means any of its values.

        Raises:
            PopulationError: If no member has such a factor.
        """
        kept = list(self.members)
        for key, wanted in factors.items():
            values = [(member, lookup_factor(member.manifest, key)) for member in kept]
            if self.members and kept and all(value is MISSING for _, value in values):
                known = sorted({factor for member in self.members for factor in member.factors} | {"task", "status"})
                raise PopulationError(
                    f"{self.name}: no factor {key!r}{nearest(key, known)}: known are {', '.join(known)}"
                )
            choices = wanted if isinstance(wanted, list | tuple | set) else [wanted]
            kept = [member for member, value in values if value in choices]
        return dataclasses.replace(self, members=tuple(kept))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row a member: name, status, task, factors, `parent`, and its last record's metrics."""
        import pandas as pd

        rows = []
        for member in self.members:
            manifest = member.manifest
            row = {"name": manifest.name, "status": manifest.status, "task": manifest.task}
            parents = [parent.repo for parent in manifest.parents if parent.role == "parent"]
            row |= {"parent": parents[0] if parents else None} | manifest.factors | manifest.metrics
            rows.append(row)
        return pd.DataFrame(rows)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, key: int | str) -> Member:
        """Return a member by its place or name."""
        if isinstance(key, int):
            return self.members[key]
        for member in self.members:
            if member.name == key:
                return member
        names = [member.name for member in self.members]
        raise PopulationError(f"{self.name}: no member {key!r}{nearest(key, names)}")


MISSING = object()


def lookup_factor(manifest: Manifest, key: str) -> Any:
    """Return a factor by its dotted path (`__` for the dot) or last part, else a manifest field, else `MISSING`."""
    dotted = key.replace("__", ".")
    if dotted in manifest.factors:
        return manifest.factors[dotted]
    last = [value for path, value in manifest.factors.items() if path.rpartition(".")[2] == dotted]
    if len(last) == 1:
        return last[0]
    return getattr(manifest, key) if key in {f.name for f in dataclasses.fields(Manifest)} else MISSING


def read_index(folder: Path) -> dict[str, Any]:
    """Read a population folder's `population.json`: `name`, `recipe`, `digest`, `members` (`name`, `factors`).

    Raises:
        PopulationError: If there is none, or it is not one.
    """
    path = folder / POPULATION_FILE
    try:
        index = json.loads(path.read_text())
        if not isinstance(index["name"], str) or not all(isinstance(e["name"], str) for e in index["members"]):
            raise TypeError("`name` is not a text")
    except FileNotFoundError:
        raise PopulationError(f"{folder}: no {POPULATION_FILE}: this is not a population's folder") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PopulationError(f"{path}: not a population's index: {error}") from error
    return index
