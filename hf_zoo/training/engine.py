"""A population, member after member: what is finished is skipped, what was interrupted goes on."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, lockf
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_zoo.errors import PopulationError, TrainingError, ZooError
from hf_zoo.files import write_json
from hf_zoo.population import POPULATION_FILE, SCHEMA, Manifest, Population, read_index
from hf_zoo.recipe.grid import MemberPlan, canonical, differences, digest, expand, select
from hf_zoo.recipe.schema import TrainRecipe
from hf_zoo.training.estimate import Estimate, estimate
from hf_zoo.training.member import check_folder, mark_failed, train_member

LOCK_FILE = ".lock"
Result = TypeVar("Result")


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
        elsewhere: Members another run on the same folder is training.
    """

    population: Population
    failures: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


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
    waiting = _on_main(lambda: _waiting(recipe, plans, folder))
    if waiting:
        costs = estimate(waiting, PartialState().num_processes)
        _on_main(lambda: check_space(costs, folder))
        _on_main(lambda: _write_index(recipe, folder))
    if PartialState().is_main_process:
        listener.begin(folder, plans, len(plans) - len(waiting))
    failures: dict[str, str] = {}
    elsewhere: list[str] = []
    with _cheap_collections():
        for plan in waiting:
            with _locked(folder / plan.name) as free:
                if free:
                    _train_one(plan, folder, recipe.name, listener, failures)
                else:
                    elsewhere.append(plan.name)
    PartialState().wait_for_everyone()
    return Outcome(Population.open(folder), failures, elsewhere)


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


def _waiting(recipe: TrainRecipe, plans: Sequence[MemberPlan], folder: Path) -> list[MemberPlan]:
    """Return the members that are not finished, after checking that all the folder holds is of this recipe."""
    check_population(recipe, folder)
    return [plan for plan in plans if not _is_finished(plan, folder)]


def _train_one(plan: MemberPlan, folder: Path, population: str, listener: Listener, failures: dict[str, str]) -> None:
    main, alone = PartialState().is_main_process, PartialState().num_processes == 1
    if main:
        listener.member(plan)
    try:
        manifest = train_member(plan, folder / plan.name, population, listener.step if main else _unheard)
    except (TrainingError, torch.OutOfMemoryError) as error:
        # A diverged loss is seen by all processes alike; too little memory by one, whose end then ends the launch.
        if isinstance(error, torch.OutOfMemoryError) and not alone:
            raise
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


def _on_main(body: Callable[[], Result]) -> Result:
    """Do something in the main process alone; every process gets its result, or its error.

    Raises:
        ZooError: What the main process met, so that all of them stop.
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = body()
        except ZooError as error:
            answer[1] = str(error)
            if PartialState().num_processes == 1:
                raise
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ZooError(answer[1])
    return answer[0]


def _write_index(recipe: TrainRecipe, folder: Path) -> None:
    if (folder / POPULATION_FILE).is_file():
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
    """Hold a member against other runs on the same folder.

    Yields:
        Whether the member was free, in every process alike.
    """
    free = [True]
    file = None
    if PartialState().is_main_process:
        member.mkdir(parents=True, exist_ok=True)
        file = (member / LOCK_FILE).open("w")
        try:
            lockf(file, LOCK_EX | LOCK_NB)  # not flock, which worker processes would inherit and outlive us with
        except OSError:
            free = [False]
    broadcast_object_list(free)
    try:
        yield free[0]
    finally:
        if file is not None:
            if free[0]:
                (member / LOCK_FILE).unlink(missing_ok=True)
                if not any(member.iterdir()):
                    os.rmdir(member)
            file.close()


def _unheard(done: int, total: int) -> None:
    """Hear nothing: only the main process reports."""
