"""The diagnostics of a merge on its card: a sentence, tables and a picture each, from the manifest alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_zoo.hub.diagnostic_figures import draw_angles, draw_mismatch, draw_sweep, draw_weights
from hf_zoo.hub.markdown import code, number, sentence, table

MOST_ROWS = 25
TOTAL = "total"


@dataclass(frozen=True)
class Section:
    """What a card shows of some diagnostics.

    Attributes:
        title: Its heading.
        kinds: The diagnostics it shows.
        picture: File of its picture.
        draw: Draws it from kind -> what was found.
        write: Returns sentence and tables, paragraph by paragraph.
    """

    title: str
    kinds: tuple[str, ...]
    picture: str
    draw: Callable[[Mapping[str, Any]], bytes]
    write: Callable[[Mapping[str, Any]], list[str]]

    def own(self, diagnostics: Mapping[str, Any]) -> dict[str, Any]:
        """Return its part of a manifest's diagnostics."""
        return {kind: diagnostics[kind] for kind in self.kinds if kind in diagnostics}


def sections_of(diagnostics: Mapping[str, Any]) -> list[Section]:
    """Return the sections a merge's card has."""
    return [section for section in SECTIONS if section.own(diagnostics)]


def render(diagnostics: Mapping[str, Any]) -> str:
    """Return the sections of a card, Markdown; empty where nothing was measured."""
    parts: list[str] = []
    for section in sections_of(diagnostics):
        picture = f"![{section.title}]({section.picture})"
        parts += [f"### {section.title}", picture, *section.write(section.own(diagnostics))]
    return "\n\n".join(part for part in parts if part)


def _write_angles(found: Mapping[str, Any]) -> list[str]:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in found.values():
        for row in kind["pairs"]:
            pairs.setdefault((row["first"], row["second"]), {}).update(row)
    told = ["A task vector is what training added to the base."]
    if "cosines" in found:
        told.append("A cosine near 0 says that tasks changed different things.")
    if "conflicts" in found:
        whole = found["conflicts"]["groups"][-1]
        told.append(
            f"Members that moved an entry disagree about its direction at {_percent(whole['conflict'])} of the entries"
            f" two or more of them moved, and {_percent(whole['cancelled'])} of all movement cancels when task vectors"
            " are added."
        )
    keys = [key for kind, key in (("cosines", "cosine"), ("conflicts", "conflict")) if kind in found]
    if not pairs:
        return [" ".join(told)]
    shown = list(pairs.values())[:MOST_ROWS]
    if len(pairs) > len(shown):
        told.append(f"{len(shown)} of {len(pairs)} pairs are shown; all are in `zoo.json`.")
    rows = [[code(row["first"]), code(row["second"]), *(_shown(row.get(key)) for key in keys)] for row in shown]
    titles = {"cosine": "Cosine", "conflict": "Signs that differ"}
    return [" ".join(told), table(["Task vector", "and", *(titles[key] for key in keys)], rows, (2, 3))]


def _write_weights(found: Mapping[str, Any]) -> list[str]:
    content = found["effective_weights"]
    rows = [
        [code(row["member"]), *(_shown(row[key]) for key in ("mean", "q05", "median", "q95"))]
        for row in content["groups"]
        if row["group"] == TOTAL
    ]
    told = (
        "How far the merge follows when a member's entry moves: 1 is all the way, 0 not at all. Over a sample of the "
        "entries each member moved; tensor by tensor in `diagnostics.jsonl`."
    )
    if left := content["tensors"]["merged otherwise"]:
        told += f" {number(left)} tensors are not merged entry by entry and are left out."
    return [told, table(["Member", "Mean", "5 %", "Median", "95 %"], rows[:MOST_ROWS], range(1, 5))]


def _write_mismatch(found: Mapping[str, Any]) -> list[str]:
    content = found["mismatch"]
    told = (
        "The length of the weighted sum of the tasks' gradients at the merge minus those at the tasks' own models: "
        f"the smaller, the nearer to training on all tasks. Losses are summed over the {sentence(content['split'])} "
        "split"
    )
    told += ", a sample scaled up." if any(row["examples"] < row["of"] for row in content["members"]) else "."
    titles = {"norm": "Mismatch"}
    if content["curvature"]:
        titles |= {"natural": "Natural", "scaled": "Scaled"}
        told += (
            f" With the base's curvature, after {sentence(content['curvature'])}: the natural length is in units of "
            "loss and the one to compare merges by; the scaled one is a distance in weights, most of it along those "
            "that hardly matter."
        )
    header = ["Tensors", *titles.values()]
    kept = content["groups"] if len(content["groups"]) <= MOST_ROWS else content["groups"][-1:]
    rows = [[sentence(row["group"]), *(_shown(row.get(key)) for key in titles)] for row in kept]
    weights = [
        [code(row["member"]), _shown(row["alpha"]), number(row["examples"]), number(row["of"])]
        for row in content["members"][:MOST_ROWS]
    ]
    of_members = table(["Member", "Weight of its loss", "Examples", "of"], weights, (1, 2, 3))
    return [told, table(header, rows, range(1, len(header))), of_members]


def _write_sweep(found: Mapping[str, Any]) -> list[str]:
    content = found["alpha_sweep"]
    scales = sorted({row["scale"] for row in content["rows"]})
    told = (
        f"The {sentence(content['split'])} score with {sentence(content['axis'])} from {number(scales[0])} to "
        f"{number(scales[-1])}. The area under the curve, as a mean height, is what the method scores without a "
        "choice of its scale; nothing was chosen by it."
    )
    rows = [
        [sentence(row["task"]), *(_shown(row[key]) for key in ("area", "lowest", "highest"))]
        for row in content["areas"]
    ]
    return [told, table(["Task", "Area under the curve", "Lowest", "Highest"], rows, (1, 2, 3))]


def _shown(value: Any) -> str:
    return "-" if value is None else number(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


SECTIONS: Sequence[Section] = (
    Section("Task vectors", ("cosines", "conflicts"), "task_vectors.png", draw_angles, _write_angles),
    Section("Effective weights", ("effective_weights",), "effective_weights.png", draw_weights, _write_weights),
    Section("Gradient mismatch", ("mismatch",), "gradient_mismatch.png", draw_mismatch, _write_mismatch),
    Section("Robustness in the scale", ("alpha_sweep",), "alpha_sweep.png", draw_sweep, _write_sweep),
)
