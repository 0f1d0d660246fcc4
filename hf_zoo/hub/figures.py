"""The pictures on a card, with the same bytes for the same results: here the learning curve of one member."""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_zoo.hub.metadata import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"train": "#0072b2", "validation": "#d55e00", "test": "#009e73"}  # told apart by colour-blind readers too
_MARKERS = {"train": "o", "validation": "s", "test": "^"}
_PREFERRED = ("accuracy", "top1", "perplexity", "f1")
_MOST_MARKED = 40
_KEYWORD = "hf_zoo results"

# Style contexts are process-wide state of matplotlib.
_DRAWING = threading.Lock()


def draw_learning_curve(results: Sequence[dict[str, Any]]) -> bytes:
    """Draw loss and main metric of every split against the epoch.

    Args:
        results: One record an epoch: `epoch`, and `SPLIT_METRIC` values.

    Returns:
        A PNG without date or software version; `shows` tells whether a PNG was drawn from given results.
    """
    metrics = _plotted(results)

    def draw(figure: Figure) -> None:
        for axes, metric in zip(figure.subplots(1, max(1, len(metrics)), squeeze=False)[0], metrics, strict=False):
            _draw(axes, results, metric)

    return to_png((4.4 * max(1, len(metrics)), 3.2), draw, list(results))


def to_png(size: tuple[float, float], draw: Callable[[Figure], None], shown: Any) -> bytes:
    """Draw a picture whose bytes depend on what it shows alone.

    Args:
        size: Width and height in inches.
        draw: Draws onto the figure, in matplotlib's own style.
        shown: What the picture shows, as JSON can hold it; `shows` compares with it.

    Returns:
        A PNG without date or software version.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with _DRAWING, rc_context(rcParamsDefault):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        draw(figure)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None, _KEYWORD: _digest(shown)})
    return target.getvalue()


def shows(picture: bytes, shown: Any) -> bool:
    """Whether a PNG of `to_png` was drawn from this."""
    return f"{_KEYWORD}\0{_digest(shown)}".encode() in picture


def main_metric(results: Sequence[dict[str, Any]]) -> str | None:
    """Return the metric the results are judged by, beside the loss; null when there is none."""
    present = {key.partition("_")[2] for record in results for key in record if key.partition("_")[0] in SPLITS}
    for metric in _PREFERRED:
        if metric in present:
            return metric
    return min(present - {"loss"}, default=None)


def tidy(axes: Axes, title: str) -> None:
    """Give axes the look the pictures share: a small title, a light grid, no box."""
    axes.set_title(title, fontsize=11)
    axes.grid(color="#d9d9d9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _digest(shown: Any) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _plotted(results: Sequence[dict[str, Any]]) -> list[str]:
    candidates = ["loss", main_metric(results)]
    return [metric for metric in candidates if metric and any(_series(results, s, metric)[0] for s in SPLITS)]


def _series(results: Sequence[dict[str, Any]], split: str, metric: str) -> tuple[list[float], list[float]]:
    points = [
        (float(record.get("epoch", place)), float(value))
        for place, record in enumerate(results)
        if isinstance(value := record.get(f"{split}_{metric}"), int | float) and math.isfinite(value)
    ]
    return [x for x, _ in points], [y for _, y in points]


def _draw(axes: Axes, results: Sequence[dict[str, Any]], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for split in SPLITS:
        x, y = _series(results, split, metric)
        if not x:
            continue
        marker = _MARKERS[split] if len(x) <= _MOST_MARKED else None
        axes.plot(x, y, color=_COLORS[split], marker=marker, markersize=3.5, linewidth=1.6, label=split)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes, metric.replace("_", " "))
    axes.legend(frameon=False, fontsize=8)
