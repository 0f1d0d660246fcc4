"""The merge job: find members, check them, merge, measure, and put a finished repo in place."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, nearest
from hf_zoo.files import json_text, weights_digest
from hf_zoo.finding import find_base, find_members
from hf_zoo.folders import new_folder, require_space
from hf_zoo.ingredients import STATISTICS_FOLDER, Ingredient, check_one_label_space, check_one_trunk
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import Joined, join, statistics_for, task_reader
from hf_zoo.lineage import measure_kinship
from hf_zoo.methods.base import Need, get_method
from hf_zoo.population import MANIFEST_FILE, SNAPSHOT_FOLDER, Manifest, Parent
from hf_zoo.recipe.grid import differences, digest, portable
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.shards import TensorInfo, write_weights
from hf_zoo.streaming import write_merge
from hf_zoo.varying import Merger
from hf_zoo.versions import installed_versions

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

MAX_NAME = 64
RESERVED = frozenset({SNAPSHOT_FOLDER, STATISTICS_FOLDER})  # sub-folders of a repo with a meaning of their own


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
    """

    recipe: MergeRecipe
    joined: Joined
    merger: Merger
    members: tuple[Ingredient, ...]
    base: Ingredient | None
    heads_apart: bool
    name: str

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

    @cached_property
    def parents(self) -> tuple[Parent, ...]:
        """How the manifest names what it was made from."""
        base = () if self.base is None else (self.base.parent("base"),)
        return tuple(member.parent() for member in self.members) + base


@dataclass(frozen=True)
class MergeOutcome:
    """What a merge came to.

    Attributes:
        folder: Where it lies.
        manifest: What is known of it.
        made: Whether it was made now; false where it was there already.
        url: Address of its repo; null where it was not published.
    """

    folder: Path
    manifest: Manifest
    made: bool
    url: str | None = None


def run_merge(recipe: MergeRecipe) -> MergeOutcome:
    """Make the merge of a recipe, or find it made already, and publish it where the recipe says so.

    Args:
        recipe: The recipe.

    Raises:
        ZooError: If members cannot be found or do not fit together, the method lacks something, the disk is full, the
            folder holds another merge, or a Hub refuses. Nothing half-made is left behind.
    """
    plan = plan_merge(recipe)
    manifest = existing_merge(plan)
    made = manifest is None
    if manifest is None:
        manifest = _make(plan)
    url = None
    if recipe.publish.namespace is not None:
        from huggingface_hub import constants

        from hf_zoo.hub.publish import publish_member

        report = publish_member(plan.folder, recipe.publish.namespace, recipe.publish)
        url = f"{constants.ENDPOINT}/{report.repos[0]}"
        manifest = Manifest.read(plan.folder)
    return MergeOutcome(plan.folder, manifest, made, url)


def plan_merge(recipe: MergeRecipe) -> MergePlan:
    """Find the members of a recipe and check that they fit together, without reading their weights.

    Raises:
        ZooError: If a task, member, method or hyper-parameter is unknown, or members do not fit together.
    """
    members = find_members(recipe)
    check_one_trunk(members)
    heads_apart = _heads_apart(recipe, members)
    base = find_base(recipe, members, _asks_for_base(recipe))
    joined = join(members, heads_apart, base, _dtype(recipe), recipe.extras)
    merger = joined.merger(recipe.method, recipe.parameters, recipe.rules)
    if recipe.base is not None and not merger.uses_base:
        logger.warning("%s does not use a base: %s is left out", recipe.method, recipe.base)
    if not merger.uses_base:
        base, joined = None, replace(joined, base=None)
    plan = MergePlan(recipe, joined, merger, members, base, heads_apart, recipe.name or _default_name(recipe, members))
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
    if len(before) != len(plan.parents):
        changes.append(f"{len(before)} models were merged then, {len(plan.parents)} now")
    if changes:
        raise MergeError(
            f"{plan.folder}: holds another merge; set `name` or remove it. What differs (then -> now):\n  "
            + "\n  ".join(changes)
        )
    return manifest


def results_table(manifest: Manifest) -> list[dict[str, Any]]:
    """Return one row a model with its main metric on every task, the merge last, for people to read."""
    records = manifest.results
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault(str(record["model"]), {"model": record["model"]})
        split = "test" if any(key.startswith("test_") for key in record) else "validation"
        metric = next((m for m in ("accuracy", "top1", "loss") if f"{split}_{m}" in record), None)
        if metric is not None:
            row[f"{record['task']} ({split} {metric})"] = f"{record[f'{split}_{metric}']:.4f}"
    return list(rows.values())


def _heads_apart(recipe: MergeRecipe, members: Sequence[Ingredient]) -> bool:
    tasks = {member.task for member in members}
    apart = len(tasks) > 1 if recipe.heads is None else recipe.heads == "per_task"
    if not apart:
        check_one_label_space(members)
        return False
    unknown = [str(member.reference) for member in members if member.task is None]
    if unknown:
        raise MergeError(f"{unknown[0]}: no manifest says its task, so its head has no name: set `heads: merge`")
    reserved = [task for task in tasks if task in RESERVED or not re.fullmatch(r"\w[\w.-]*", task or "")]
    if reserved:
        raise MergeError(f"task {reserved[0]!r} cannot be the name of a sub-folder: name the task otherwise")
    return True


def _asks_for_base(recipe: MergeRecipe) -> bool:
    methods = [recipe.method, *(rule.method for rule in recipe.rules if rule.method is not None)]
    return any(Need.BASE in get_method(name).needs for name in methods) or any(
        rule.keep == "base" for rule in recipe.rules
    )


def _default_name(recipe: MergeRecipe, members: Sequence[Ingredient]) -> str:
    """Make a name of what departs from the plain average, and of tasks or members."""
    method = "" if recipe.method == MergeRecipe().method else f"-{recipe.method}"
    parts = list(recipe.tasks) or [member.name.rpartition("/")[2] for member in members]
    name = f"merge{method}-{'-'.join(parts)}"
    return name if len(name) <= MAX_NAME else f"merge{method}-{parts[0]}-and-{len(parts) - 1}-more"


def _make(plan: MergePlan) -> Manifest:
    recipe, needs = plan.recipe, plan.merger.needs
    trials = _open_trials(plan) if recipe.evaluate or needs & {Need.SCORE, Need.DATA} else []
    inputs = plan.joined.inputs(
        score=_score(plan, trials) if trials else None,
        trials=tuple(trials) or None,
        seed=recipe.seed,
        device=recipe.device,
        dtype=getattr(torch, recipe.compute_dtype),
        **statistics_for(needs, plan.members, plan.heads_apart, plan.base),
    )
    plan.merger.check(inputs)
    _check_lineage(plan, inputs)
    _require_space(plan, inputs)
    with new_folder(plan.folder) as folder:
        _write_root(plan, inputs, folder)
        readers = {trial.task: _written(plan, trial.task, folder) for trial in trials}
        for task in plan.tasks if plan.heads_apart else ():
            _write_task(plan, task, folder)
        manifest = _manifest(plan, inputs, folder, trials)
        if recipe.evaluate:
            results = _measure(plan, trials, readers)
            manifest = manifest.replace(results=results, metrics=_mean_metrics(results, plan.name))
        manifest.write(folder)
        from hf_zoo.hub.cards import write_card

        write_card(folder)
    return manifest


def _check_lineage(plan: MergePlan, inputs: MergeInputs) -> None:
    """Warn, or refuse, when models do not seem to come from one; what was measured goes into the report."""
    how = plan.recipe.lineage
    if how == "ignore" or len(plan.members) + (plan.base is not None) < 2:
        return
    base = None if plan.base is None or inputs.base is None else (plan.base, inputs.base)
    kinship = measure_kinship(plan.members, inputs.members, inputs.layout, base)
    if kinship.cosines:
        inputs.report["smallest cosine of weights"] = round(min(kinship.cosines.values()), 4)
    if not kinship.strangers:
        return
    shown = "; ".join(kinship.strangers[:3])
    told = (
        f"these models do not seem to come from one ({shown}): the merge of unrelated networks is as a rule worse "
        "than each of them. Align them first, or choose models with one parent"
    )
    if how == "refuse":
        raise MergeError(f"{told}, or set `lineage: warn`")
    logger.warning("%s", told)
    inputs.report["lineage"] = kinship.strangers


def _score(plan: MergePlan, trials: Sequence[Trial]) -> Callable[[Mapping[str, Tensor]], float]:
    from hf_zoo.trials import mean_score

    return mean_score(trials, plan.heads_apart)


def _open_trials(plan: MergePlan) -> list[Trial]:
    from hf_zoo.trials import Trial

    recipe = plan.recipe
    unknown = [task for task in recipe.data if plan.heads_apart and task not in plan.tasks]
    if unknown:
        raise MergeError(f"data.{unknown[0]}: no member has this task{nearest(unknown[0], plan.tasks)}")
    tasks = dict.fromkeys([*plan.tasks, *recipe.data]) or dict.fromkeys(["task"])
    return [
        Trial.open(task, plan.of_task(task), recipe.data.get(task), recipe.eval_batch_size, recipe.num_eval)
        for task in tasks
    ]


def _require_space(plan: MergePlan, inputs: MergeInputs) -> None:
    trunk = sum(info.nbytes for info in inputs.layout.values())
    heads = sum(member.head.nbytes for member in plan.members) if plan.heads_apart else 0
    require_space(plan.folder, trunk * (1 + len(plan.tasks) * plan.heads_apart) + heads)


def _write_root(plan: MergePlan, inputs: MergeInputs, folder: Path) -> None:
    """Write the merged trunk, or the whole merged model where heads are merged, with config and processor."""
    recipe = plan.recipe
    write_merge(
        folder,
        plan.merger,
        inputs,
        num_threads=recipe.num_threads,
        max_shard_bytes=int(recipe.max_shard_size * 1e9),
    )
    first = plan.members[0]
    content = first.config
    files = first.processor_files()
    if plan.heads_apart:
        content = json.loads(first.structure.trunk_config.to_json_string())
        files.pop("generation_config.json", None)
        files = {name: path for name, path in files.items() if path.suffix != ".py"}
    _write_rest(folder, content, inputs.layout, files)


def _write_task(plan: MergePlan, task: str, folder: Path) -> None:
    """Write a task's whole model, merged trunk and own head, into its sub-folder."""
    members = plan.of_task(task)
    tensors = task_reader(members, CheckpointReader.open(folder, plan.name))
    (folder / task).mkdir()
    write_weights(folder / task, tensors.items(), tensors.layout)
    _write_rest(folder / task, members[0].config, tensors.layout, members[0].processor_files())


def _write_rest(
    folder: Path, config: Mapping[str, Any], layout: Mapping[str, TensorInfo], files: Mapping[str, Path]
) -> None:
    floating = Counter(info.dtype for info in layout.values() if info.dtype.is_floating_point)
    if floating:  # what the Auto classes load the weights as
        config = dict(config) | {"dtype": str(floating.most_common(1)[0][0]).removeprefix("torch.")}
    (folder / "config.json").write_text(json_text(config))
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _written(plan: MergePlan, task: str, folder: Path) -> CheckpointReader:
    """Return a lazy reader of a task's model as it was written."""
    root = CheckpointReader.open(folder, plan.name)
    return task_reader(plan.of_task(task), root) if plan.heads_apart else root


def _measure(
    plan: MergePlan, trials: Sequence[Trial], merged: Mapping[str, CheckpointReader]
) -> tuple[dict[str, Any], ...]:
    """Return one record a task and model: every member that can do the task, then the merge."""
    records = []
    for trial in trials:
        for member in trial.members:
            logger.info("measuring %s on %s", member.label, trial.task)
            records.append({"task": trial.task, "model": member.label, **trial.measure(member.reader)})
        logger.info("measuring the merge on %s", trial.task)
        records.append({"task": trial.task, "model": plan.name, **trial.measure(merged[trial.task])})
    return tuple(records)


def _mean_metrics(results: Sequence[Mapping[str, Any]], model: str) -> dict[str, float]:
    """Return the mean over tasks of what was measured on all of them."""
    own = [record for record in results if record["model"] == model]
    keys = [key for key in own[0] if key not in ("task", "model") and all(key in record for record in own)]
    return {key: sum(record[key] for record in own) / len(own) for key in keys}


def _manifest(plan: MergePlan, inputs: MergeInputs, folder: Path, trials: Sequence[Trial]) -> Manifest:
    first = plan.members[0]
    manifests = [member.manifest for member in plan.members if member.manifest is not None]
    config = json.loads((folder / "config.json").read_text())
    objectives = {manifest.objective for manifest in manifests}
    populations = {manifest.population for manifest in manifests}
    method = plan.merger.describe()
    if inputs.report:
        method["report"] = _renamed(inputs.report, {str(one.reference): one.label for one in plan.members})
    loading: dict[str, Any] = {"heads": "one a task, in sub-folders" if plan.heads_apart else "merged like the trunk"}
    if plan.heads_apart and first.structure.absent:
        loading["absent from the trunk, as the members have none"] = list(first.structure.absent)
    return Manifest(
        name=plan.name,
        population=populations.pop() if len(populations) == 1 else None,
        kind="merge",
        status="finished",
        objective=objectives.pop() if len(objectives) == 1 else None,
        task=plan.tasks[0] if len(plan.tasks) == 1 else None,
        tasks=plan.tasks,
        description=plan.recipe.description,
        parents=plan.parents,
        recipe=portable(plan.recipe),
        digest=digest(plan.recipe),
        dataset={trial.task: trial.description for trial in trials},
        loading=loading,
        method=method,
        auto_class="AutoModel" if plan.heads_apart else first.auto_class,
        architecture=(config.get("architectures") or [None])[0],
        model_type=config.get("model_type"),
        library=manifests[0].library if manifests and manifests[0].library != "peft" else "transformers",
        num_parameters=_num_parameters(plan, inputs),
        sha256=weights_digest(folder),
        license=plan.recipe.publish.license,
        language=plan.recipe.publish.language,
        versions=installed_versions(),
    )


def _num_parameters(plan: MergePlan, inputs: MergeInputs) -> int:
    """Return the members' own number where it must be the same, else that of the floating entries made."""
    manifest = plan.members[0].manifest
    if manifest is not None and manifest.num_parameters and not plan.heads_apart and not plan.joined.owners:
        return manifest.num_parameters
    return sum(info.numel for info in inputs.layout.values() if info.dtype.is_floating_point)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a report with other names for the members: those of messages hold paths."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(content, names) for key, content in value.items()}
    if isinstance(value, list):
        return [_renamed(content, names) for content in value]
    return names.get(value, value) if isinstance(value, str) else value


def _dtype(recipe: MergeRecipe) -> torch.dtype | None:
    return None if recipe.dtype is None else getattr(torch, recipe.dtype)
