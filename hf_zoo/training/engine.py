"""A population, member after member: what is finished is skipped, what was interrupted goes on."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState

from hf_zoo.errors import PopulationError, TrainingError
from hf_zoo.files import write_json
from hf_zoo.population import POPULATION_FILE, SCHEMA, Manifest, Population, read_index
from hf_zoo.recipe.grid import MemberPlan, canonical, differences, digest, expand, select
from hf_zoo.recipe.schema import TrainRecipe
from hf_zoo.training.estimate import Estimate, estimate
from hf_zoo.training.member import check_folder, mark_failed, train_member

LOCK_FILE = ".lock"


class Listener(Protocol):
    """Somebody who is told how a population comes along."""

    def begin(self, folder: Path, plans: Sequence[MemberPlan], finished: int) -> None:
        """A population begins, some of its members finished before."""

    def member(self, plan: MemberPlan) -> None:
        """A member begins."""

    def step(self, done: int, total: int) -> None:
        """The member did a step."""

    def finished(self, manifest: Manifest) -> None:
        """The member is finished."""

    def failed(self, plan: MemberPlan, reason: str) -> None:
        """The member failed, the next one begins."""


@dataclass(frozen=True)
class Outcome:
    """What became of a population.

    Attributes:
        population: Its members so far.
        failures: Member's name -> why it failed.
    """

    population: Population
    failures: dict[str, str] = field(default_factory=dict)


def train_population(recipe: TrainRecipe, listener: Listener) -> Outcome:
    """Train the members a recipe selects, one after another; every process of `accelerate launch` calls it alike.

    Args:
        recipe: The whole recipe.
        listener: Told of the progress, on the main process.

    Raises:
        ZooError: If the folder belongs to another recipe, or data, parents and models do not fit together; nothing is
            written then.
    """
    folder = Path(recipe.output) / recipe.name
    plans = select(expand(recipe), recipe.members)
    check_population(recipe, folder)
    waiting = [plan for plan in plans if not _is_finished(plan, folder)]
    if waiting:
        check_space(estimate(waiting), folder)
        _write_index(recipe, folder)
    if PartialState().is_main_process:
        listener.begin(folder, plans, len(plans) - len(waiting))
    failures: dict[str, str] = {}
    with _cheap_collections():
        for plan in waiting:
            _train_one(plan, folder, recipe.name, listener, failures)
    PartialState().wait_for_everyone()
    return Outcome(Population.open(folder), failures)


def check_population(recipe: TrainRecipe, folder: Path) -> None:
    """Check that a population's folder is new or of the same recipe.

    Raises:
        PopulationError: If it is of another recipe, with the differences, or no folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise PopulationError(f"{folder} cannot be a folder: {existing} is a file: choose another `output` or `name`")
    if not (folder / POPULATION_FILE).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise PopulationError(
                f"{folder} is not empty and no population (no {POPULATION_FILE}): choose another `output` or `name`"
            )
        return
    index = read_index(folder)
    if index.get("digest") != digest(recipe):
        changes = differences(index.get("recipe", {}), canonical(recipe))
        raise PopulationError(
            f"{folder} was made from another recipe; what differs (old -> new):\n  "
            + "\n  ".join(changes or ["the order of the factors"])
            + "\nChoose another `name` or `output`, or delete the folder"
        )


def check_space(needed: Estimate, folder: Path) -> None:
    """Check that the disk has room for what will be written.

    Raises:
        PopulationError: If it has not.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed.num_bytes > free:
        raise PopulationError(
            f"{folder}: {needed.num_bytes / 2**30:.2f} GiB will be written and {free / 2**30:.2f} GiB are free: "
            "make room, or keep fewer snapshots (snapshots.every_epochs, snapshots.keep_last)"
        )


def _train_one(plan: MemberPlan, folder: Path, population: str, listener: Listener, failures: dict[str, str]) -> None:
    main = PartialState().is_main_process
    with _locked(folder / plan.name) as free:
        if not free:
            return  # another process on this folder trains it
        if main:
            listener.member(plan)
        try:
            manifest = train_member(plan, folder / plan.name, population, listener.step if main else _unheard)
        except (TrainingError, torch.OutOfMemoryError) as error:
            failures[plan.name] = str(error)
            if main:
                mark_failed(folder / plan.name, str(error))
                listener.failed(plan, str(error))
        else:
            if main:
                listener.finished(manifest)


def _is_finished(plan: MemberPlan, folder: Path) -> bool:
    manifest = check_folder(plan, folder / plan.name)
    return manifest is not None and manifest.status == "finished"


def _write_index(recipe: TrainRecipe, folder: Path) -> None:
    if not PartialState().is_main_process or (folder / POPULATION_FILE).is_file():
        return
    members = [{"name": plan.name, "factors": plan.factors} for plan in expand(recipe)]
    content = {
        "schema": SCHEMA,
        "name": recipe.name,
        "description": recipe.description,
        "recipe": canonical(recipe),
        "digest": digest(recipe),
        "members": members,
    }
    write_json(folder / POPULATION_FILE, content)


@contextmanager
def _cheap_collections() -> Generator[None]:
    """Keep what the libraries hold out of garbage collections.

    The Trainer collects once a member, which keeps memory flat; each time it would look through everything the
    libraries hold, two thirds of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _locked(member: Path) -> Generator[bool]:
    """Hold a member against other runs on the same folder; processes of one launch share the main one's lock.

    Yields:
        Whether the member was free.
    """
    if not PartialState().is_main_process:
        yield True
        return
    member.mkdir(parents=True, exist_ok=True)
    with (member / LOCK_FILE).open("w") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            (member / LOCK_FILE).unlink(missing_ok=True)
            if not any(member.iterdir()):
                os.rmdir(member)


def _unheard(done: int, total: int) -> None:
    """Hear nothing: only the main process reports."""
