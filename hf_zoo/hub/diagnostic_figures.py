"""The pictures of a merge's diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from hf_zoo.hub.figures import tidy, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by colour-blind readers too (Okabe and Ito); the dashes tell more lines apart than there are colours.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":")
_MOST_WRITTEN = 12  # members up to which numbers are written into a matrix
_MOST_NAMED = 24  # members up to which a matrix has their names
_MOST_TICKS = 16


def draw_angles(found: Mapping[str, Any]) -> bytes:
    """Draw the matrix of cosines, or of conflicts, over pairs, and the course of both through the network."""
    kind, key = ("cosines", "cosine") if "cosines" in found else ("conflicts", "conflict")
    content = found[kind]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _draw_matrix(left, content["members"], content["pairs"], key)
        for name, column, label, color in (
            ("cosines", "mean", "mean cosine", _COLORS[0]),
            ("conflicts", "conflict", "signs in conflict", _COLORS[1]),
        ):
            if name in found:
                of_group = [(row["group"], row.get(column)) for row in found[name]["groups"][:-1]]
                _draw_course(right, of_group, label, color)
        tidy(right, "through the network")
        right.legend(frameon=False, fontsize=8)

    return to_png((8.8, 3.8), draw, dict(found))


def draw_weights(found: Mapping[str, Any]) -> bytes:
    """Draw the histogram of every member's effective weights."""
    content = found["effective_weights"]["histogram"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (member, shares), style in zip(content["shares"].items(), _styles(), strict=False):
            axes.stairs(shares, content["edges"], label=_short(member), linewidth=1.6, **style)
        axes.set_xlabel("effective weight")
        axes.set_ylabel("share of entries")
        tidy(axes, "how much members' entries count")
        if content["shares"]:
            axes.legend(frameon=False, fontsize=8)

    return to_png((6.4, 3.4), draw, dict(found))


def draw_mismatch(found: Mapping[str, Any]) -> bytes:
    """Draw the mismatch of every group of tensors."""
    content = found["mismatch"]
    keys = ["norm", *["natural"] * bool(content["curvature"])]

    def draw(figure: Figure) -> None:
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            _draw_course(axes, [(row["group"], row[key]) for row in content["groups"][:-1]], key)
            axes.set_ylim(bottom=0)
            tidy(axes, "gradient mismatch" if key == "norm" else "its natural length")

    return to_png((4.8 * len(keys), 3.6), draw, dict(found))


def draw_sweep(found: Mapping[str, Any]) -> bytes:
    """Draw the score of every task, and their mean, against the scale."""
    content = found["alpha_sweep"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for area, style in zip(content["areas"], _styles(), strict=False):
            own = [row for row in content["rows"] if row["task"] == area["task"] and row["score"] is not None]
            label = _short(area["task"]) + ("" if area["area"] is None else f" (area {area['area']:.3f})")
            points = [row["scale"] for row in own], [row["score"] for row in own]
            axes.plot(*points, marker="o", markersize=3, linewidth=1.6, label=label, **style)
        axes.set_xlabel(content["axis"])
        axes.set_ylabel(f"{content['split']} score")
        tidy(axes, "score against the scale")
        axes.legend(frameon=False, fontsize=8)

    return to_png((6.4, 3.4), draw, dict(found))


def _styles() -> Any:
    return cycle({"color": color, "linestyle": dash} for dash in _DASHES for color in _COLORS)


def _draw_matrix(axes: Axes, members: Sequence[str], pairs: Sequence[Mapping[str, Any]], key: str) -> None:
    places = {member: place for place, member in enumerate(members)}
    diagonal = 1.0 if key == "cosine" else 0.0
    matrix = [[diagonal if i == j else float("nan") for j in range(len(members))] for i in range(len(members))]
    for row in pairs:
        i, j = places[row["first"]], places[row["second"]]
        matrix[i][j] = matrix[j][i] = float("nan") if row[key] is None else row[key]
    axes.imshow(matrix, cmap="RdBu_r" if key == "cosine" else "viridis", vmin=-1 if key == "cosine" else 0, vmax=1)
    axes.set_title("cosines" if key == "cosine" else "signs that differ", fontsize=11)
    named = range(len(members)) if len(members) <= _MOST_NAMED else ()
    names = [_short(members[place]) for place in named]
    axes.set_xticks(list(named), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(list(named), names, fontsize=7)
    for i, row_values in enumerate(matrix if len(members) <= _MOST_WRITTEN else ()):
        for j, value in enumerate(row_values):
            dark = abs(value) > 0.6 if key == "cosine" else value < 0.6
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _draw_course(
    axes: Axes, of_group: Sequence[tuple[str, float | None]], label: str, color: str = _COLORS[0]
) -> None:
    """Draw a value of every group of tensors, in the network's order."""
    values = [float("nan") if value is None else value for _, value in of_group]
    axes.plot(range(len(values)), values, marker="o", markersize=3.5, linewidth=1.6, label=label, color=color)
    step = -(-len(values) // _MOST_TICKS)
    shown = range(0, len(values), step or 1)
    names = [_short(of_group[place][0]) for place in shown]
    axes.set_xticks(list(shown), names, rotation=45, ha="right", fontsize=7)


def _short(name: str, limit: int = 22) -> str:
    """Return the end of a name, and text matplotlib does not take for a formula."""
    shown = name if len(name) <= limit else "…" + name[-limit + 1 :]
    return shown.replace("$", r"\$").lstrip("_")
