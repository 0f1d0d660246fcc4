"""Keys of a recipe that need or exclude one another, and names a Hub would refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_zoo.errors import nearest
from hf_zoo.recipe.binding import Mistake, overlap
from hf_zoo.recipe.curvature import CurvatureRecipe
from hf_zoo.recipe.schema import (
    AugmentationSpec,
    FinetuneRecipe,
    MergeRecipe,
    ObjectiveSpec,
    TokenizerSpec,
    TrainingSpec,
    TrainRecipe,
)
from hf_zoo.recipe.search import check_search
from hf_zoo.recipe.statistics import StatisticsSpec

IMAGE_OBJECTIVES = ("image_classification", "contrastive")
EVERY_METHOD = "all"
EMBEDDED_IMAGES = ("digits",)
EMBEDDED_TEXTS = ("docs", "docs-sentences", "docs-pairs", "docs-topics")
MAX_REPO_CHARACTERS = 96
MEMBER_DIGITS = 3


# Arguments of the Trainer that a recipe says in its own words; said twice, one of the two would silently lose.
OWN_ARGUMENTS = {
    "output_dir": "output",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "optim": "training.optimizer",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.betas",
    "adam_beta2": "training.betas",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "report_to": "training.report_to",
    "seed": "seed",
    "data_seed": "seeds.order",
    "label_smoothing_factor": "augmentation.label_smoothing",
    "eval_strategy": "training.evaluate_train",
    "save_strategy": "snapshots",
    "save_steps": "snapshots.every_steps",
    "save_total_limit": "snapshots.keep_last",
    "load_best_model_at_end": "snapshots.best",
    "metric_for_best_model": "snapshots.best",
    "adam_epsilon": "training.optimizer, whose own default it keeps",
    "optim_args": "training.optimizer",
    "save_only_model": "nothing: a run could not be resumed",
    "ignore_data_skip": "nothing: a resumed run would see other samples",
    "auto_find_batch_size": "training.batch_size",
    "resume_from_checkpoint": "nothing: a run resumes by itself",
    "push_to_hub": "publish.namespace",
    "hub_model_id": "publish.namespace",
    "hub_private_repo": "publish.private",
    "hub_strategy": "publish.snapshots",
    "remove_unused_columns": "nothing: the tables hold only what is used",
    "label_names": "nothing: the objective knows its labels",
}


def check_rules(recipe: Any, mistaken: Sequence[str] = ()) -> list[Mistake]:
    """Return where keys contradict or lack one another.

    Args:
        recipe: The recipe of one member, its factors applied, or of a merge.
        mistaken: Paths that have a mistake already; rules that look at them are left out.
    """
    rules = TRAIN_RULES
    for kind, own in ((MergeRecipe, MERGE_RULES), (CurvatureRecipe, CURVATURE_RULES)):
        rules = own if isinstance(recipe, kind) else rules
    mistakes = []
    for looks_at, rule in rules.items():
        if not any(overlap(path, other) for path in looks_at for other in mistaken):
            mistakes += [Mistake(path, message) for path, message in rule(recipe)]
    return mistakes


def check_repo_name(name: str, namespace: str | None, reserved: int = 0) -> str | None:
    """Return why a Hub would refuse a repo name, or null.

    Args:
        name: The repo's name, or the part of it a recipe gives.
        namespace: User or organisation it goes to, where known.
        reserved: Characters that will be put behind the name.
    """
    longest = MAX_REPO_CHARACTERS - reserved - (len(namespace) + 1 if namespace else 0)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        wrong = sorted(set(re.sub(r"[A-Za-z0-9._-]", "", name)))
        came = f"not {' '.join(map(repr, wrong))}" if wrong else "and not nothing"
        return f"a Hub refuses {name!r}: letters, digits, `-`, `_`, `.` only, {came}"
    if "--" in name or ".." in name:
        return f"a Hub refuses {name!r}: no `--` and no `..`"
    if name[0] in "-." or (name[-1] in "-." and not reserved):
        return f"a Hub refuses {name!r}: no `-` or `.` at either end"
    if reserved and name[-1] == "-":
        return f"a Hub refuses {name!r}: no `-` at its end, the members' numbers follow behind another one"
    if name.endswith((".git", ".ipynb")) and not reserved:
        return f"a Hub refuses {name!r}: no `.git` or `.ipynb` at its end"
    if len(name) > longest:
        return (
            f"a Hub refuses names longer than {MAX_REPO_CHARACTERS}: {len(name)} characters, {longest} are free here"
        )
    return None


def method_names() -> list[str]:
    """Return the names of the merge methods, read off their files without importing any."""
    folder = Path(__file__).resolve().parent.parent / "methods"
    return sorted(path.stem for path in folder.glob("[a-z]*.py") if path.stem != "base")


def _check_name(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    if problem := check_repo_name(recipe.name, recipe.publish.namespace, MEMBER_DIGITS + 1):
        yield "name", problem


def _check_namespace(recipe: TrainRecipe | MergeRecipe) -> Iterator[tuple[str, str]]:
    namespace = recipe.publish.namespace
    if namespace is not None and not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", namespace):
        yield "publish.namespace", f"expected a user or organisation of a Hub, got {namespace!r}"


def _check_output(recipe: TrainRecipe | MergeRecipe) -> Iterator[tuple[str, str]]:
    if not recipe.output.strip():
        yield "output", "expected a folder, got an empty text"


def _check_start(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    finetuning = isinstance(recipe, FinetuneRecipe)
    if recipe.parent is None:
        if finetuning:
            yield "parent", "is missing: fine-tuning starts from a member's folder, or org/name on a Hub"
        elif recipe.objective.mode == "continued" and recipe.objective.name == "masked_lm":
            yield "parent", "is missing: objective.mode `continued` continues a parent"
        elif recipe.model.type is None:
            yield "model.type", "is missing: without a parent, name a model type of transformers, or timm"
        if recipe.model.head.reuse:
            yield "model.head.reuse", "keeps the parent's head, but there is no parent"
        if recipe.model.adapter is not None:
            yield "model.adapter", "adapts a parent's weights, but there is no parent"
    elif not recipe.parent.strip():
        yield "parent", "expected a member's folder, or org/name on a Hub, got an empty text"
    if recipe.model.type == "timm" and recipe.parent is None and not recipe.model.config.get("architecture"):
        yield "model.config.architecture", "is missing: name a model of timm (`resnet18`)"


def _check_head(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    head = recipe.model.head
    if head.type == "mlp" and not head.hidden:
        yield "model.head.hidden", "is missing: an mlp head needs the widths of its hidden layers"
    if head.type == "linear" and head.hidden:
        yield "model.head.hidden", "is for an mlp head: set model.head.type to mlp"
    if head.type == "linear" and head.dropout:
        yield "model.head.dropout", "is for an mlp head: set model.head.type to mlp"
    if head.type == "mlp" and recipe.objective.name == "masked_lm":
        yield "model.head.type", "`mlp` is for classification and contrastive objectives, not for masked_lm"


def _check_adapter(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    if recipe.model.adapter is None:
        return
    if recipe.model.freeze_encoder:
        yield "model.freeze_encoder", "trains the head alone, model.adapter trains an adapter: keep one of the two"
    if recipe.model.head.type == "mlp":
        yield "model.head.type", "`mlp` ships its own code, an adapter's repo cannot: use linear, or no adapter"
    if not recipe.model.adapter.target_modules:
        yield "model.adapter.target_modules", "is empty: name linear layers, or all-linear"


def _check_objective(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    name = recipe.objective.name
    if recipe.objective.mode != "scratch" and name != "masked_lm":
        yield "objective.mode", f"is for masked_lm, not for {name}"
    if name == "masked_lm" and recipe.objective.mode == "scratch" and recipe.parent is not None:
        yield "objective.mode", "`scratch` starts from random weights: set it to continued, or leave out the parent"
    default = ObjectiveSpec(name=name)
    for key in ("temperature", "projection_dim"):
        if name != "contrastive" and getattr(recipe.objective, key) != getattr(default, key):
            yield f"objective.{key}", f"is for contrastive, not for {name}"
    if name != "masked_lm" and recipe.objective.mlm_probability != default.mlm_probability:
        yield "objective.mlm_probability", f"is for masked_lm, not for {name}"
    if name == "contrastive" and recipe.training.batch_size < 2:
        yield "training.batch_size", "must be 2 or more: contrastive learning compares the images of a batch"


def _check_kind_of_data(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    name, data = recipe.objective.name, recipe.data
    images = name in IMAGE_OBJECTIVES
    if data.path in (EMBEDDED_TEXTS if images else EMBEDDED_IMAGES):
        known = ", ".join(EMBEDDED_IMAGES if images else EMBEDDED_TEXTS)
        kinds = ("images", "texts") if images else ("texts", "images")
        yield "data.path", f"{name} needs {kinds[0]}, and {data.path} holds {kinds[1]}: embedded are {known}"
    for key in ("text", "text_pair") if images else ("image", "image_size"):
        if getattr(data, key) is not None:
            yield f"data.{key}", f"is not used by {name}"
    if images and recipe.tokenizer != TokenizerSpec():
        yield "tokenizer", f"is not used by {name}"
    if not images and recipe.augmentation != AugmentationSpec():
        yield "augmentation", f"changes images, and {name} reads texts"


def _check_augmentation(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    for key in ("mixup", "cutmix", "label_smoothing"):
        if recipe.objective.name == "contrastive" and getattr(recipe.augmentation, key):
            yield f"augmentation.{key}", "changes labels, and contrastive learning has none"
    if recipe.augmentation.blur and recipe.augmentation.blur % 2 == 0:
        yield "augmentation.blur", f"must be odd, or 0 for none, got {recipe.augmentation.blur}"


def _check_splits(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    data = recipe.data
    for key in ("train_split", "validation_split", "test_split"):
        if getattr(data, key) == "":
            yield f"data.{key}", "expected the name of a split, got an empty text"
    if not data.path.strip():
        yield "data.path", "expected an embedded set, a file, a folder or a Hub dataset id, got an empty text"
    if data.validation_split == data.train_split:
        yield (
            "data.validation_split",
            f"is the training split {data.train_split!r}: choices need samples not trained on",
        )
    if data.test_split in {data.train_split, data.validation_split} and data.test_split is not None:
        yield "data.test_split", f"{data.test_split!r} is used for training or choices too: set it to null"
    best = recipe.snapshots.best
    if best is not None and not best.startswith("validation_"):
        yield "snapshots.best", f"chooses by the validation split: expected validation_METRIC, got {best!r}"
    if best is not None and data.validation_split is None and data.validation_fraction == 0:
        yield "snapshots.best", "needs a validation split: set data.validation_split or data.validation_fraction"


def _check_optimizer(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    training = recipe.training
    if training.optimizer != "sgd" and training.momentum:
        yield "training.momentum", f"is for sgd, not for {training.optimizer}"
    if training.optimizer == "sgd" and training.betas != TrainingSpec().betas:
        yield "training.betas", "are for adamw and adam, not for sgd"
    if training.nesterov and (training.optimizer != "sgd" or not training.momentum):
        yield "training.nesterov", "needs training.optimizer sgd and a training.momentum above 0"
    if training.schedule == "one_cycle" and training.warmup:
        yield "training.warmup", "has no effect beside one_cycle, which warms up by itself"
    if training.warmup >= 1 and training.warmup != int(training.warmup):
        yield "training.warmup", f"must be a whole number of steps, or a share below 1, got {training.warmup:g}"


def _check_arguments(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    for key in recipe.training.arguments:
        if "token" in key and key.startswith(("hub_", "push_")):
            yield f"training.arguments.{key}", "a token never goes into a file: log in, or set HF_TOKEN"
        elif key in OWN_ARGUMENTS:
            yield f"training.arguments.{key}", f"is said in a recipe by {OWN_ARGUMENTS[key]}"


def _check_snapshots(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    kept = recipe.snapshots
    if kept.keep_last is not None and kept.every_epochs is kept.every_steps is kept.log_spaced is None:
        yield "snapshots.keep_last", "keeps the last of none: set every_epochs, every_steps or log_spaced"


def _check_seeds(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    seeds = {"seed": recipe.seed} | {f"seeds.{key}": value for key, value in vars(recipe.seeds).items()}
    for path, value in seeds.items():
        if value is not None and value < 0:
            yield path, f"must be 0 or more, got {value}"


def _check_merge_members(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    if recipe.members and recipe.tasks:
        yield "members", "name the models, tasks look for them: give one of the two"
    elif recipe.tasks and recipe.population is None:
        yield "population", "is missing: tasks are looked for in a population's folder, or org/name on a Hub"
    elif not recipe.members and not recipe.tasks and not recipe.slices:
        yield "members", "is missing: name the models to merge, or give a population and tasks"
    for key, value in (("population", recipe.population), ("where", recipe.where)):
        if value and recipe.members and not recipe.tasks:
            yield key, "goes with tasks, not with members"
    for key in ("members", "tasks"):
        values = getattr(recipe, key)
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            yield key, f"{', '.join(repeated)} stands there more than once"
        if any(not value.strip() for value in values):
            yield key, "holds an empty text"


def _check_merge_data(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    for task in recipe.data:
        if recipe.tasks and task not in recipe.tasks:
            yield f"data.{task}", f"is none of the tasks {', '.join(recipe.tasks)}{nearest(task, recipe.tasks)}"


def _check_merge_name(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    if recipe.name is not None and (problem := check_repo_name(recipe.name, recipe.publish.namespace)):
        yield "name", problem


def _check_method(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    known = method_names()
    if recipe.method not in (*known, EVERY_METHOD):
        yield (
            "method",
            f"unknown method {recipe.method!r}{nearest(recipe.method, known)}: known are {', '.join(known)}",
        )


def _check_contest(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    if recipe.method != EVERY_METHOD:
        if recipe.joint is not None:
            yield "joint", f"is compared with by `method: {EVERY_METHOD}` alone"
        return
    for method, parameters in recipe.parameters.items():
        if method not in method_names() or not isinstance(parameters, Mapping):
            yield f"parameters.{method}", "with `method: all`, parameters are given a method: ties: {density: 0.3}"
    if recipe.rules:
        yield "rules", "name methods of their own: leave them out, or name one `method`"
    if recipe.search is not None:
        yield "search", "is over one method, or several that `search.over.method` names: `method: all` searches none"
    if not recipe.evaluate:
        yield "evaluate", "methods are compared by what they score: leave it true"


def _check_diagnostics(recipe: MergeRecipe) -> Iterator[tuple[str, str]]:
    scales = recipe.diagnostics.scales
    if len(scales) < 2 or any(left >= right for left, right in pairwise(scales)):
        yield "diagnostics.scales", f"must be two or more ascending numbers, got {list(scales)}"


def _check_training_statistics(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    spec = recipe.statistics
    if spec is None:
        return
    yield from _check_statistics(spec, "statistics.")
    if recipe.objective.name == "contrastive" and "fisher" in spec.kinds:
        yield (
            "statistics.kinds",
            "contrastive learning compares images, so it has no Fisher information: use [gram]",
        )
    if recipe.objective.name == "masked_lm" and spec.estimator == "exact":
        yield "statistics.estimator", "exact needs a backward pass a token of the vocabulary: use sampled"


def _check_curvature(recipe: CurvatureRecipe) -> Iterator[tuple[str, str]]:
    yield from _check_statistics(recipe, "")
    if recipe.seed < 0:
        yield "seed", f"must be 0 or more, got {recipe.seed}"
    if not recipe.members:
        yield "members", "is missing: name a member's folder, a population's, or org/name on a Hub"
    if any(not member.strip() for member in recipe.members):
        yield "members", "holds an empty text"
    if recipe.output is not None and not recipe.output.strip():
        yield "output", "expected a folder, got an empty text"


def _check_statistics(spec: StatisticsSpec, prefix: str) -> Iterator[tuple[str, str]]:
    if not spec.kinds:
        yield f"{prefix}kinds", "is empty: expected fisher, gram or both"
    if not spec.per_example and spec.estimator in ("exact", "empirical"):
        yield f"{prefix}per_example", f"false is unbiased for sampled labels alone, not for {spec.estimator}"
    if spec.num_samples != 1 and spec.estimator in ("exact", "empirical"):
        yield f"{prefix}num_samples", f"is for sampled labels, not for {spec.estimator}"


Rule = Callable[[Any], Iterator[tuple[str, str]]]

TRAIN_RULES: Mapping[tuple[str, ...], Rule] = {
    ("name", "publish.namespace"): _check_name,
    ("publish.namespace",): _check_namespace,
    ("output",): _check_output,
    ("parent", "objective", "model"): _check_start,
    ("model.head", "objective"): _check_head,
    ("model.adapter", "model.freeze_encoder", "model.head"): _check_adapter,
    ("objective", "training.batch_size"): _check_objective,
    ("objective", "data", "tokenizer", "augmentation"): _check_kind_of_data,
    ("objective", "augmentation"): _check_augmentation,
    ("data", "snapshots.best"): _check_splits,
    (
        "training.optimizer",
        "training.momentum",
        "training.betas",
        "training.nesterov",
        "training.warmup",
    ): _check_optimizer,
    ("training.arguments",): _check_arguments,
    ("snapshots",): _check_snapshots,
    ("seed", "seeds"): _check_seeds,
    ("statistics", "objective"): _check_training_statistics,
}
CURVATURE_RULES: Mapping[tuple[str, ...], Rule] = {
    ("members", "kinds", "estimator", "num_samples", "per_example", "seed", "output"): _check_curvature,
}
MERGE_RULES: Mapping[tuple[str, ...], Rule] = {
    ("name", "publish.namespace"): _check_merge_name,
    ("publish.namespace",): _check_namespace,
    ("output",): _check_output,
    ("members", "tasks", "population", "where"): _check_merge_members,
    ("data", "tasks"): _check_merge_data,
    ("method",): _check_method,
    ("search", "rules"): check_search,
    ("diagnostics.scales",): _check_diagnostics,
    ("method", "parameters", "rules", "search", "joint", "evaluate"): _check_contest,
}
