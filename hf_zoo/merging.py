"""The merge job: find members, check them, merge, measure, and put a finished repo in place."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo import __version__
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.files import json_text, weights_digest
from hf_zoo.folders import new_folder, require_space
from hf_zoo.ingredients import labels_of
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import task_reader
from hf_zoo.lineage import check_lineage
from hf_zoo.methods.base import Need
from hf_zoo.planning import MergePlan, existing_merge, inputs_of, open_trials, plan_merge
from hf_zoo.population import Manifest
from hf_zoo.recipe.grid import digest, portable
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.shards import TensorInfo, write_weights
from hf_zoo.streaming import Written, write_merge
from hf_zoo.versions import installed_versions

if TYPE_CHECKING:
    from hf_zoo.search import Found
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeOutcome:
    """What a merge came to.

    Attributes:
        folder: Where it lies.
        manifest: What is known of it.
        made: Whether it was made now; false where it was there already.
        url: Address of its repo; null where it was not published.
        search: The search that found its hyper-parameters; null where there was none.
    """

    folder: Path
    manifest: Manifest
    made: bool
    url: str | None = None
    search: Found | None = None


def run_merge(recipe: MergeRecipe) -> MergeOutcome:
    """Make the merge of a recipe, or find it made already, and publish it where the recipe says so.

    Args:
        recipe: The recipe.

    Raises:
        ZooError: If members cannot be found or do not fit together, the method lacks something, the disk is full, the
            folder holds another merge, or a Hub refuses. Nothing half-made is left behind.
    """
    found = None
    if recipe.search is not None:
        from hf_zoo.search import search

        found = search(recipe)
        recipe = found.recipe
    plan = plan_merge(recipe)
    manifest = existing_merge(plan)
    made = manifest is None
    if manifest is None:
        manifest = _make(plan, found)
    url = None
    if recipe.publish.namespace is not None:
        from huggingface_hub import constants

        from hf_zoo.hub.publish import publish_member

        report = publish_member(plan.folder, recipe.publish.namespace, recipe.publish)
        url = f"{constants.ENDPOINT}/{report.repos[0]}"
        manifest = Manifest.read(plan.folder)
    return MergeOutcome(plan.folder, manifest, made, url, found)


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


def _make(plan: MergePlan, found: Found | None = None) -> Manifest:
    recipe, needs = plan.recipe, plan.merger.needs
    trials = open_trials(plan) if recipe.evaluate or needs & {Need.SCORE, Need.DATA} else []
    inputs = inputs_of(plan, trials)
    plan.merger.check(inputs)
    wanted = recipe.diagnostics.wanted(recipe.evaluate, plan.base is not None)
    if wanted:
        from hf_zoo.analysis import diagnostics

        diagnostics.check(plan, trials, wanted)
    check_lineage(recipe.lineage, plan.members, inputs, plan.base)
    _require_space(plan, inputs)
    if found is not None:
        inputs.report["search"] = found.report
    with (
        new_folder(plan.folder, resume_key=_identity(plan), sync=False) as folder,
        ThreadPoolExecutor(1, "aside") as aside,
    ):
        ready = aside.submit(_import_cards)  # while the cores' threads merge
        if found is not None:
            shutil.copyfile(found.table, folder / found.table.name)
        written = _write_root(plan, inputs, folder)
        ready.result()
        hashed = aside.submit(lambda: written.digest or weights_digest(folder))
        readers = {trial.task: _written(plan, trial.task, folder) for trial in trials}
        for task in plan.tasks if plan.heads_apart else ():
            _write_task(plan, task, folder)
        manifest = _manifest(plan, inputs, folder, trials).replace(sha256=hashed.result())
        if recipe.evaluate:
            results = _measure(plan, trials, readers)
            manifest = manifest.replace(results=results, metrics=_mean_metrics(results, plan.name))
        if wanted:
            manifest = manifest.replace(diagnostics=diagnostics.diagnose(plan, inputs, trials, folder, wanted))
        manifest.write(folder)
        from hf_zoo.hub.cards import write_card

        write_card(folder)
    return manifest


def _import_cards() -> None:
    import jinja2  # ruff: ignore[unused-import]

    import hf_zoo.hub.cards  # ruff: ignore[unused-import]


def _identity(plan: MergePlan) -> str:
    """Return what a merge's weights depend on: what was written of them under the same is not made again."""
    parents = [[parent.role, parent.sha256] for parent in plan.parents]
    return json.dumps([digest(plan.recipe), parents, plan.statistics, __version__], sort_keys=True)


def _require_space(plan: MergePlan, inputs: MergeInputs) -> None:
    trunk = sum(info.nbytes for info in inputs.layout.values())
    heads = sum(member.head.nbytes for member in plan.members) if plan.heads_apart else 0
    require_space(plan.folder, trunk * (1 + len(plan.tasks) * plan.heads_apart) + heads)


def _write_root(plan: MergePlan, inputs: MergeInputs, folder: Path) -> Written:
    """Write the merged trunk, or the whole merged model where heads are merged, with config and processor."""
    recipe = plan.recipe
    written = write_merge(
        folder,
        plan.merger,
        inputs,
        num_threads=recipe.num_threads,
        max_shard_bytes=int(recipe.max_shard_size * 1e9),
        resume=True,
    )
    first = plan.members[0]
    content = first.config
    files = first.processor_files()
    if plan.heads_apart:
        content = json.loads(first.structure.trunk_config.to_json_string())
        files.pop("generation_config.json", None)
        files = {name: path for name, path in files.items() if path.suffix != ".py"}
    _write_rest(folder, content, inputs.layout, files)
    return written


def _write_task(plan: MergePlan, task: str, folder: Path) -> None:
    """Write a task's whole model, merged trunk and own head, into its sub-folder."""
    members = plan.of_task(task)
    tensors = task_reader(members, CheckpointReader.open(folder, plan.name))
    (folder / task).mkdir(exist_ok=True)
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
        for member, label in zip(trial.members, labels_of(trial.members), strict=True):
            logger.info("measuring %s on %s", label, trial.task)
            records.append({"task": trial.task, "model": label, **trial.measure(member.reader)})
        if plan.recipe.ensembles:
            from hf_zoo.ensembles import measure_ensembles

            records += measure_ensembles(trial)
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
        names = zip(plan.members, labels_of(plan.members), strict=True)
        method["report"] = _renamed(inputs.report, {str(one.reference): label for one, label in names})
    if plan.statistics:
        method["statistics"] = plan.statistics
    if inputs.choices:
        method["choices"] = inputs.choices
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
