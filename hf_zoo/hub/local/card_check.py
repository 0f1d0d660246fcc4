"""What the Hub would refuse, or warn of, in a card's metadata."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hf_zoo.hub.local.metadata import PIPELINE_TAGS, RELATIONS, front_matter

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def check_card(readme: str, kind: str) -> tuple[list[str], list[str]]:
    """Check a card's metadata.

    Args:
        readme: The whole card.
        kind: `model`, `dataset` or `space`.

    Returns:
        Errors, for which the Hub refuses the card, and warnings.
    """
    metadata, problem = front_matter(readme)
    if problem is not None:
        return [problem], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        message for key, check in _CHECKS[kind].items() if key in metadata for message in check(key, metadata[key])
    ]
    warnings = []
    task = metadata.get("pipeline_tag")
    if kind == "model" and isinstance(task, str) and task not in PIPELINE_TAGS:
        warnings.append(f'The pipeline tag "{task}" is not in the official list: {", ".join(sorted(PIPELINE_TAGS))}')
    if metadata.get("base_model_relation") is not None and not metadata.get("base_model"):
        warnings.append('"base_model_relation" says nothing without "base_model"')
    return errors, warnings


def _string(key: str, value: Any) -> list[str]:
    return [] if isinstance(value, str) and value else [f'"{key}" must be a string']


def _string_or_strings(key: str, value: Any) -> list[str]:
    return [] if isinstance(value, str) and value else _strings(key, value)


def _strings(key: str, value: Any) -> list[str]:
    if value is None or (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        return []
    return [f'"{key}" must be an array of strings']


def _repo_ids(key: str, value: Any) -> list[str]:
    if problem := _string_or_strings(key, value):
        return problem
    ids = [value] if isinstance(value, str) else value or []
    return [
        f'"{key}" with value "{name}" is not valid. Use a model id from the Hub'
        for name in ids
        if not _REPO_ID.fullmatch(name)
    ]


def _relation(key: str, value: Any) -> list[str]:
    return [] if value in RELATIONS else [f'"{key}" must be one of [{", ".join(RELATIONS)}]']


def _model_index(key: str, value: Any) -> list[str]:
    """Check the results, which the Hub shows only if they are complete."""
    if not isinstance(value, list):
        return [f'"{key}" must be an array']
    errors = []
    for number, model in enumerate(value):
        where = f"{key}[{number}]"
        if not isinstance(model, dict):
            errors.append(f'"{where}" must be an object')
            continue
        errors += _required(where, model, "name", str)
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"{where}.results" must be an array')
            continue
        for index, result in enumerate(results):
            errors += _result(f"{where}.results[{index}]", result)
    return errors


def _result(where: str, result: Any) -> list[str]:
    """Check one result of a model index."""
    if not isinstance(result, dict):
        return [f'"{where}" must be an object']
    errors = []
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        if not isinstance(result.get(part), dict):
            errors.append(f'"{where}.{part}" is required')
        else:
            errors += [error for key in keys for error in _required(f"{where}.{part}", result[part], key, str)]
    metrics = result.get("metrics")
    if not isinstance(metrics, list):
        return [*errors, f'"{where}.metrics" is required']
    for index, metric in enumerate(metrics):
        inner = f"{where}.metrics[{index}]"
        if not isinstance(metric, dict):
            errors.append(f'"{inner}" must be an object')
            continue
        errors += _required(inner, metric, "type", str)
        if metric.get("value") is None:
            errors.append(f'"{inner}.value" is required')
    return errors


def _required(where: str, content: dict[str, Any], key: str, kind: type) -> list[str]:
    return [] if isinstance(content.get(key), kind) and content[key] else [f'"{where}.{key}" is required']


_COMMON: dict[str, Callable[[str, Any], list[str]]] = {
    "license": _string_or_strings,
    "language": _string_or_strings,
    "tags": _strings,
}
_CHECKS: dict[str, dict[str, Callable[[str, Any], list[str]]]] = {
    "model": {
        **_COMMON,
        "datasets": _string_or_strings,
        "metrics": _string_or_strings,
        "library_name": _string,
        "pipeline_tag": _string,
        "base_model": _repo_ids,
        "base_model_relation": _relation,
        "model-index": _model_index,
    },
    "dataset": {**_COMMON, "pretty_name": _string, "task_categories": _strings, "size_categories": _string_or_strings},
    "space": {**_COMMON, "sdk": _string, "title": _string},
}
