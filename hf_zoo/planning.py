"""What a merge will be made of and how: members found and fitted together, methods chosen, data opened."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_zoo.errors import MergeError, nearest
from hf_zoo.files import PRIVATE_FOLDERS, remembered_sha256
from hf_zoo.finding import find_base, find_members
from hf_zoo.ingredients import STATISTICS_FOLDER, Ingredient, check_one_label_space, check_one_trunk, labels_of
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import STATISTICS, Joined, join, statistics_for, task_reader
from hf_zoo.methods.base import make_method
from hf_zoo.population import MANIFEST_FILE, SNAPSHOT_FOLDER, Manifest, Parent
from hf_zoo.presenting import heads_of, owner_of_tokens, present
from hf_zoo.recipe.grid import differences, digest, portable
from hf_zoo.recipe.rules import EVERY_METHOD
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.varying import Merger, fixed_values, idle_keys

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

MAX_NAME = 64
# Sub-folders of a repo with a meaning of their own, or that are not published.
FOLDER_NAME = re.compile(r"(?!checkpoint-)\w[\w.-]*")
RESERVED = PRIVATE_FOLDERS | {SNAPSHOT_FOLDER, STATISTICS_FOLDER}


@dataclass(frozen=True)
class MergePlan:
    """A merge whose members were found and fit together; nothing is written yet.

    Attributes:
        recipe: The recipe.
        joined: Their tensors, alike.
        merger: The methods and the tensors each of them makes.
        members: The members, in order.
        base: The model task vectors are taken against; null where the method needs none.
        heads_apart: Whether each task keeps its own head in a sub-folder, or heads are merged too.
        name: Name of the merge.
        sources: The models the members are made of, as they were found: the members themselves, unless they are
            stacked of others' blocks.
        root: The base as it was found; null where none was looked for.
        owner_of_tokens: A model that is no member and gives tokens and their rows; null for none.
    """

    recipe: MergeRecipe
    joined: Joined
    merger: Merger
    members: tuple[Ingredient, ...]
    base: Ingredient | None
    heads_apart: bool
    name: str
    sources: tuple[Ingredient, ...]
    root: Ingredient | None = None
    owner_of_tokens: Ingredient | None = None

    @property
    def folder(self) -> Path:
        """Where the merge lies."""
        return Path(self.recipe.output) / self.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """The members' tasks, each once, in order."""
        return tuple(dict.fromkeys(member.task for member in self.members if member.task is not None))

    def of_task(self, task: str) -> tuple[Ingredient, ...]:
        """Return the members of a task; all of them where heads are merged, since each can do every task then."""
        return tuple(member for member in self.members if member.task == task or not self.heads_apart)

    def of(self, recipe: MergeRecipe) -> MergePlan:
        """Return the plan of a recipe that differs in method, parameters and rules alone; members stay open."""
        merger = self.joined.merger(recipe.method, recipe.parameters, recipe.rules)
        base, joined = (self.base, self.joined) if merger.uses_base else (None, replace(self.joined, base=None))
        return replace(self, recipe=recipe, merger=merger, base=base, joined=joined)

    @cached_property
    def statistics(self) -> dict[str, dict[str, str]]:
        """Name of a model -> kind -> SHA-256 of the statistics the merge is made with."""
        needs = self.merger.needs
        return self._hashed([kind for need, kind in STATISTICS.items() if need in needs])

    @cached_property
    def every_statistic(self) -> dict[str, dict[str, str]]:
        """As `statistics`, of all kinds there are: what trying several methods depends on."""
        return self._hashed(list(STATISTICS.values()))

    def _hashed(self, kinds: Sequence[str]) -> dict[str, dict[str, str]]:
        models = [*self.sources, *(() if self.base is None else (self.base,))]
        found = {
            label: {kind: remembered_sha256(path) for kind in kinds if (path := one.statistics_file(kind)) is not None}
            for label, one in zip(labels_of(models), models, strict=True)
        }
        return {label: hashes for label, hashes in found.items() if hashes}

    @cached_property
    def parents(self) -> tuple[Parent, ...]:
        """How the manifest names what it was made from."""
        base = self.owner_of_tokens if self.base is None else self.root
        return (*(source.parent() for source in self.sources), *(() if base is None else (base.parent("base"),)))


def plan_merge(recipe: MergeRecipe, others: Sequence[MergeRecipe] = ()) -> MergePlan:
    """Find the members of a recipe and check that they fit together, without reading their weights.

    Args:
        recipe: The recipe.
        others: Recipes of the same members that `MergePlan.of` will be asked for: the base is kept where one needs it.

    Raises:
        ZooError: If a task, member, method, hyper-parameter or device is unknown, or members do not fit together.
    """
    if recipe.method == EVERY_METHOD:
        raise MergeError("`method: all` compares methods: use `hf-zoo merge`, or hf_zoo.contest.run_contest")
    _check_device(recipe.device)
    sources = find_members(recipe)
    root = find_base(recipe, sources, any(map(_asks_for_base, (recipe, *others))))
    heads_apart = _heads_apart(recipe, sources)
    members, base = present(recipe, sources, root, heads_apart)
    check_one_trunk(members)
    joined = join(members, heads_apart, base, _dtype(recipe), recipe.extras)
    merger = joined.merger(recipe.method, recipe.parameters, recipe.rules)
    written = {f"parameters.{key}": value for key, value in recipe.parameters.items()}
    for place, rule in enumerate(recipe.rules):
        written |= {f"rules[{place}].parameters.{key}": value for key, value in rule.parameters.items()}
    idle = [key for path, value in written.items() for key in idle_keys(value, joined.places, [*joined.layout], path)]
    if idle:
        logger.warning("these keys fit no tensor and have no effect: %s", "; ".join(idle))
    owner = owner_of_tokens(recipe, sources, root)
    if recipe.base is not None and not merger.uses_base and not others and owner is None:
        logger.warning("%s does not use a base: %s is left out", recipe.method, recipe.base)
    if not merger.uses_base and not others:
        base, joined = None, replace(joined, base=None)
    name = recipe.name or _default_name(recipe, sources)
    plan = MergePlan(recipe, joined, merger, members, base, heads_apart, name, sources, root, owner)
    for task in plan.tasks if heads_apart else ():
        task_reader(plan.of_task(task), members[0].trunk)
    return plan


def existing_merge(plan: MergePlan) -> Manifest | None:
    """Return the manifest of the same merge made earlier, or null where the folder is free.

    Raises:
        MergeError: If the folder holds something else; says what differs.
    """
    if not plan.folder.exists():
        return None
    if not (plan.folder / MANIFEST_FILE).is_file():
        raise MergeError(f"{plan.folder}: exists and is no merge: set `name` or `output`, or remove it")
    manifest = Manifest.read(plan.folder)
    changes = []
    if manifest.digest != digest(plan.recipe):
        changes = differences(manifest.recipe, portable(plan.recipe))
        changes = changes or ["nothing but the digest: it was made by another version"]
    before = [(parent.role, parent.sha256) for parent in manifest.parents]
    for parent, old in zip(plan.parents, before, strict=False):
        if (parent.role, parent.sha256) != old:
            changes.append(f"{parent.role} {parent.repo}: its weights are others than then")
    if (manifest.method.get("statistics") or {}) != plan.statistics:
        changes.append("the members' statistics are others than then")
    if len(before) != len(plan.parents):
        changes.append(f"{len(before)} models were merged then, {len(plan.parents)} now")
    if changes:
        raise MergeError(
            f"{plan.folder}: holds another merge; set `name` or remove it. What differs (then -> now):\n  "
            + "\n  ".join(changes)
        )
    return manifest


def open_trials(plan: MergePlan, with_test: bool = True) -> list[Trial]:
    """Load the held-out data of a plan's tasks; without the test split on request.

    Raises:
        ZooError: If it is not known what to measure a task on, or the data is not what it needs.
    """
    from hf_zoo.trials import Trial

    recipe = plan.recipe
    unknown = [task for task in recipe.data if plan.heads_apart and task not in plan.tasks]
    if unknown:
        raise MergeError(f"data.{unknown[0]}: no member has this task{nearest(unknown[0], plan.tasks)}")
    tasks = dict.fromkeys([*plan.tasks, *recipe.data]) or dict.fromkeys(["task"])
    return [
        Trial.open(task, plan.of_task(task), recipe.data.get(task), recipe.eval_batch_size, recipe.num_eval, with_test)
        for task in tasks
    ]


def inputs_of(plan: MergePlan, trials: Sequence[Trial]) -> MergeInputs:
    """Return what the methods of a plan are given.

    Raises:
        MergeError: If a member lacks statistics a method needs.
    """
    recipe = plan.recipe
    return plan.joined.inputs(
        score=_score(plan, trials) if trials else None,
        trials=tuple(trials) or None,
        seed=recipe.seed,
        device=recipe.device,
        dtype=getattr(torch, recipe.compute_dtype),
        **statistics_for(plan.merger.needs, plan.members, plan.heads_apart, plan.base),
    )


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without the device
        reason = str(error).partition("\n")[0]
        raise MergeError(f"device: {name!r} cannot be used on this machine, set `device: cpu`: {reason}") from error


def _heads_apart(recipe: MergeRecipe, members: Sequence[Ingredient]) -> bool:
    members = heads_of(recipe, members)
    tasks = {member.task for member in members}
    if recipe.slices and recipe.heads == "per_task":
        raise MergeError("heads: per_task: a model stacked of several has the head of its last slice: set `merge`")
    apart = not recipe.slices and len(tasks) > 1 if recipe.heads is None else recipe.heads == "per_task"
    if not apart:
        check_one_label_space(members)
        return False
    unknown = [str(member.reference) for member in members if member.task is None]
    if unknown:
        raise MergeError(f"{unknown[0]}: no manifest says its task, so its head has no name: set `heads: merge`")
    reserved = [
        task for task in tasks if task in RESERVED or not re.fullmatch(r"(?!checkpoint-)\w[\w.-]*", task or "")
    ]
    if reserved:
        raise MergeError(f"task {reserved[0]!r} cannot be the name of a sub-folder: name the task otherwise")
    return True


def _asks_for_base(recipe: MergeRecipe) -> bool:
    """Whether a method or rule of a recipe uses a base, as far as can be told before anything is opened."""
    named = [(recipe.method, recipe.parameters), *((rule.method, rule.parameters) for rule in recipe.rules)]
    return any(rule.keep == "base" for rule in recipe.rules) or any(
        make_method(name, fixed_values(parameters), "merge recipe").uses_base
        for name, parameters in named
        if name is not None
    )


def _default_name(recipe: MergeRecipe, members: Sequence[Ingredient]) -> str:
    """Make a name of what departs from the plain average, and of tasks or members."""
    method = "" if recipe.method == MergeRecipe().method else f"-{recipe.method}"
    parts = list(recipe.tasks) or [member.name.rpartition("/")[2] for member in members]
    name = f"merge{method}-{'-'.join(parts)}"
    return name if len(name) <= MAX_NAME else f"merge{method}-{parts[0]}-and-{len(parts) - 1}-more"


def _score(plan: MergePlan, trials: Sequence[Trial]) -> Callable[[Mapping[str, Tensor]], float]:
    from hf_zoo.trials import mean_score

    return mean_score(trials, plan.heads_apart)


def _dtype(recipe: MergeRecipe) -> torch.dtype | None:
    return None if recipe.dtype is None else getattr(torch, recipe.dtype)
