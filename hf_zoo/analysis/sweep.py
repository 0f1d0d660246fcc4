"""How a merge's score depends on how far it goes along the task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OVER_TASKS = "all tasks"


def sweep(scales: Sequence[float], score: Callable[[float], Mapping[str, float]]) -> dict[str, Any]:
    """Score a merge at several scales.

    The robustness score is the area under the curve divided by the width of the sweep, by the trapezoidal rule: the
    mean score over the range, so that sweeps of different widths can be compared. It says how well a method does
    without a choice of its scale; nothing is chosen by it.

    Args:
        scales: Ascending, two or more.
        score: Returns task -> score of the merge at a scale.

    Returns:
        `rows`: one a scale and task (`all tasks` for their mean), with `scale`, `task` and `score`, null where it is
        not finite; `areas`: one a task with `area` and the `lowest` and `highest` score, null where a score is.
    """
    curves: dict[str, list[float]] = {}
    for scale in scales:
        found = dict(score(scale))
        if len(found) > 1:
            found[OVER_TASKS] = sum(found.values()) / len(found)
        for task, value in found.items():
            curves.setdefault(task, []).append(float(value))
    rows = [
        {"scale": scale, "task": task, "score": _finite(values[place])}
        for place, scale in enumerate(scales)
        for task, values in curves.items()
    ]
    areas = [
        {
            "task": task,
            "area": _finite(area_under(scales, values)),
            "lowest": _finite(min(values)),
            "highest": _finite(max(values)),
        }
        for task, values in curves.items()
    ]
    return {"rows": rows, "areas": areas}


def area_under(positions: Sequence[float], values: Sequence[float]) -> float:
    """Return the area under a piecewise linear curve divided by its width: the mean height.

    Args:
        positions: Ascending, two or more.
        values: One each.
    """
    area = sum(
        (right - left) * (first + second) / 2
        for left, right, first, second in zip(positions, positions[1:], values, values[1:], strict=False)
    )
    return area / (positions[-1] - positions[0])


def at_scale(written: Any, scale: float) -> Any:
    """Return what a recipe's `scale` becomes in a sweep.

    Args:
        written: The recipe's; null where it has none.
        scale: The sweep's.

    Returns:
        The sweep's own where a single number stands there; a negative one (which takes tasks away), and numbers that
        vary over members or layers, times the sweep's.
    """
    if isinstance(written, Mapping):
        return {key: _times(value, scale) for key, value in written.items()}
    if isinstance(written, list | tuple):
        return [_times(value, scale) for value in written]
    return _times(written, scale) if written is not None and written < 0 else scale


def _times(value: Any, scale: float) -> Any:
    if isinstance(value, Mapping):
        return {key: _times(content, scale) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_times(content, scale) for content in value]
    return value * scale


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
