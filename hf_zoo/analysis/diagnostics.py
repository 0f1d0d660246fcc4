"""Everything a merge recipe's `diagnostics` asks for, as plain data for the manifest and the card."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.analysis.angles import Relations, conflict_row, cosine_row, pair_rows, relate_all, total_of
from hf_zoo.analysis.effective import effective_weights, histogram, measured_parts, weight_row
from hf_zoo.analysis.groups import TOTAL, groups_of
from hf_zoo.analysis.sweep import at_scale, sweep
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.files import write_text
from hf_zoo.finding import find_base
from hf_zoo.ingredients import labels_of
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import Joined, join, statistics_for
from hf_zoo.methods.base import Method, Need
from hf_zoo.planning import MergePlan, inputs_of, open_trials
from hf_zoo.presenting import present
from hf_zoo.recipe.diagnostics import Kind
from hf_zoo.streaming import merge_in_memory

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

TENSORS_FILE = "diagnostics.jsonl"
DIGITS = 6

Table = list[dict[str, Any]]


def check(plan: MergePlan, trials: Sequence[Trial], kinds: Sequence[Kind]) -> None:
    """Refuse what cannot be measured, before anything is written.

    Args:
        plan: The merge.
        trials: The tasks' held-out data, as far as it is open.
        kinds: What to measure.

    Raises:
        MergeError: If task vectors are asked for and no base is known, a sweep of a method without a scale or without
            validation data, weights of a method that has none, or gradients of losses that are no sums over examples
            or are not weighted one a member.
    """
    if "cosines" in kinds or "conflicts" in kinds:
        _with_base(plan)
    if "mismatch" in kinds:
        from hf_zoo.analysis.mismatch import check_loss

        for member in plan.members:
            check_loss(member)
    for trial in trials if "alpha_sweep" in kinds else ():
        trial.check_validation()
    alphas, count = plan.recipe.diagnostics.alphas, len(plan.members)
    if alphas is not None and len(alphas) != count:
        raise MergeError(f"diagnostics.alphas needs one value a member: got {len(alphas)} for {count} members")
    if "alpha_sweep" in kinds and "scale" not in {field.name for field in fields(plan.merger.method)}:
        raise MergeError(
            f"diagnostics: alpha_sweep varies the `scale` of a method, and {plan.recipe.method} has none: leave it "
            "out of `diagnostics.kinds`"
        )
    if "effective_weights" in (plan.recipe.diagnostics.kinds or ()) and not measured_parts(plan.merger):
        raise MergeError(
            f"diagnostics: {plan.recipe.method} does not merge entry by entry, or learns from data how to, so its "
            "effective weights are not known: leave them out of `diagnostics.kinds`"
        )


def diagnose(
    plan: MergePlan, inputs: MergeInputs, trials: Sequence[Trial], folder: Path, kinds: Sequence[Kind]
) -> dict[str, Any]:
    """Measure a merge that has been written.

    Args:
        plan: The merge.
        inputs: What it was made from.
        trials: The tasks' held-out data, as far as it is open.
        folder: The merge's folder; it gets `diagnostics.jsonl`, one line a kind and tensor.
        kinds: What to measure.

    Returns:
        Kind -> what was found, as JSON can hold it, numbers to six digits. Tables are lists of flat rows.

    Raises:
        ZooError: If task vectors are asked for and no base is known, or data cannot be read or has no validation
            split.
    """
    found: dict[str, Any] = {}
    tensors: Table = []
    if "cosines" in kinds or "conflicts" in kinds:
        of_angles, rows = _angles(plan, kinds)
        found |= of_angles
        tensors += rows
    if "effective_weights" in kinds and measured_parts(plan.merger):
        logger.info("measuring effective weights")
        found["effective_weights"], rows = _effective(plan, inputs)
        tensors += rows
    if "mismatch" in kinds:
        found["mismatch"] = _mismatch(plan, inputs, folder)
    if "alpha_sweep" in kinds:
        found["alpha_sweep"] = _alpha_sweep(plan, trials)
    if tensors:
        lines = (json.dumps(_rounded(row), ensure_ascii=False, allow_nan=False) + "\n" for row in tensors)
        write_text(folder / TENSORS_FILE, "".join(lines))
    return _rounded({kind: found[kind] for kind in kinds if kind in found})


def _angles(plan: MergePlan, kinds: Sequence[Kind]) -> tuple[dict[str, Any], Table]:
    joined = _with_base(plan)
    names = [
        name
        for name, info in joined.layout.items()
        if info.dtype.is_floating_point and name not in joined.owners and name not in joined.untrained
    ]
    logger.info("measuring the angles of %d task vectors", len(plan.members))
    inputs = MergeInputs(members=joined.members, layout=joined.layout, base=joined.base, device=plan.recipe.device)
    relations = relate_all(inputs, names, plan.recipe.num_threads)
    count = len(plan.members)
    groups = {group: [relations[name] for name in own] for group, own in groups_of(joined.places, names).items()}
    by_group = {group: total_of(own, count) for group, own in groups.items()}
    total = total_of(by_group.values(), count)
    labels = labels_of(plan.members)
    found: dict[str, Any] = {}
    tensors: Table = []
    for kind, row, values, key in (
        ("cosines", cosine_row, total.cosines_KK, "cosine"),
        ("conflicts", conflict_row, total.conflicts_KK, "conflict"),
    ):
        if kind in kinds:
            of_group: Table = [{"group": group, **row(one)} for group, one in [*by_group.items(), (TOTAL, total)]]
            found[kind] = {"members": labels, "pairs": pair_rows(values, labels, key), "groups": of_group}
            tensors += [{"kind": kind, "tensor": name, **row(one)} for name, one in relations.items()]
    if "cosines" in found:
        found["cosines"]["lengths"] = _lengths(total, labels)
    return found, tensors


def _lengths(total: Relations, labels: Sequence[str]) -> Table:
    norms = total.gram_KK.diagonal().sqrt().tolist()
    return [{"member": label, "length": norm} for label, norm in zip(labels, norms, strict=True)]


def _with_base(plan: MergePlan) -> Joined:
    """Return the members joined with a base, also where the method uses none.

    Raises:
        MergeError: If none is known.
    """
    if plan.joined.base is not None:
        return plan.joined
    root = find_base(plan.recipe, plan.sources, needed=True)
    if root is None:
        raise MergeError(
            "diagnostics: task vectors are differences to the model all members were trained from, and no manifest "
            "names it: set `base`, or leave cosines and conflicts out of `diagnostics.kinds`"
        )
    members, base = present(plan.recipe, plan.sources, root, plan.heads_apart)
    return join(members, plan.heads_apart, base, None, plan.recipe.extras)


def _effective(plan: MergePlan, inputs: MergeInputs) -> tuple[dict[str, Any], Table]:
    weights = effective_weights(plan.merger, inputs, plan.recipe.num_threads)
    labels = labels_of(plan.members)
    groups = [*groups_of(plan.joined.places, weights).items(), (TOTAL, list(weights))]
    found = {
        "members": labels,
        "groups": [
            {"group": group, "member": label, **weight_row([weights[name] for name in names], place)}
            for group, names in groups
            for place, label in enumerate(labels)
        ],
        "histogram": histogram(list(weights.values()), labels),
        "tensors": {"measured": len(weights), "merged otherwise": _num_floating(inputs) - len(weights)},
    }
    tensors = [
        {"kind": "effective_weights", "tensor": name, "member": label, **weight_row([one], place)}
        for name, one in weights.items()
        for place, label in enumerate(labels)
    ]
    return found, tensors


def _num_floating(inputs: MergeInputs) -> int:
    return sum(info.dtype.is_floating_point for info in inputs.layout.values())


def _mismatch(plan: MergePlan, inputs: MergeInputs, folder: Path) -> dict[str, Any]:
    from hf_zoo.analysis.mismatch import (
        SPLIT,
        MemberLoss,
        alphas_of,
        base_curvature,
        gradient_mismatch,
        mismatch_rows,
    )

    recipe, labels = plan.recipe, labels_of(plan.members)
    spec, method = recipe.diagnostics, _main_method(plan)
    alphas = spec.alphas or alphas_of(method, inputs)
    losses = []
    for member in plan.members:
        logger.info("opening the training data of %s", member.label)
        data = recipe.data.get(member.task or "task")
        losses.append(MemberLoss.open(member, data, plan.heads_apart, spec, recipe.seed))
    merged = CheckpointReader.open(folder, plan.name)
    mismatch = gradient_mismatch(losses, alphas, merged, plan.joined.members)
    curvature, source = None, None
    if all(member.statistics("fisher") is not None for member in plan.members):
        given = statistics_for({Need.FISHER}, plan.members, plan.heads_apart, plan.base)
        known = given.pop("num_examples") or tuple(float(loss.num_examples) for loss in losses)
        joined = replace(inputs, **given, num_examples=known)
        curvature = base_curvature(method, joined)
        source = "the base's Fisher" if joined.base_fisher is not None else "the mean of the members' Fishers"
    rows = mismatch_rows(mismatch, plan.joined.places, curvature)
    about = [
        {"member": label, "alpha": alpha, "examples": len(loss.examples), "of": loss.num_examples}
        for label, alpha, loss in zip(labels, alphas, losses, strict=True)
    ]
    return {"split": SPLIT, "members": about, "curvature": source, "groups": rows}


def _main_method(plan: MergePlan) -> Method:
    """Return the method of most tensors among those of the recipe's own."""
    own = [part for part in plan.merger.parts if type(part.method) is plan.merger.method]
    return max(own or plan.merger.parts, key=lambda part: len(part.names)).method


def _alpha_sweep(plan: MergePlan, trials: Sequence[Trial]) -> dict[str, Any]:
    """Merge at every scale and measure on the validation splits; the test splits are not looked at."""
    from hf_zoo.trials import CHOOSING_SPLIT, task_scores

    recipe = plan.recipe
    trials = trials or open_trials(plan, with_test=False)
    for trial in trials:
        trial.check_validation()
    written = recipe.parameters.get("scale")

    def score(scale: float) -> dict[str, float]:
        logger.info("measuring the merge at scale %g", scale)
        changed = plan.of(replace(recipe, parameters={**recipe.parameters, "scale": at_scale(written, scale)}))
        tensors = merge_in_memory(changed.merger, inputs_of(changed, trials), num_threads=recipe.num_threads)
        return task_scores(trials, plan.heads_apart, tensors)

    replaces = written is None or (isinstance(written, int | float) and written >= 0)
    axis = "scale" if replaces else "multiple of the recipe's scale"
    return {"split": CHOOSING_SPLIT, "axis": axis, **sweep(recipe.diagnostics.scales, score)}


def _rounded(value: Any) -> Any:
    """Return plain data with numbers to six significant digits, and null for those that are not finite."""
    if isinstance(value, dict):
        return {key: _rounded(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(content) for content in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
