"""Model cards: a pure function of the manifest and a template of `hub_cards/`.

Equal manifests give equal bytes. Nothing here touches the network or looks at the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from hf_zoo.files import json_text, write_bytes, write_text
from hf_zoo.hub import diagnostics
from hf_zoo.hub.figures import draw_learning_curve, main_metric, shows
from hf_zoo.hub.markdown import code, fence, link, number, one_line, sentence, table
from hf_zoo.hub.metadata import SPLITS, metadata_yaml
from hf_zoo.hub.usage import has_own_code, population_usage, revision_usage, task_usage, usage
from hf_zoo.population import Manifest, Parent, Snapshot
from hf_zoo.recipe.schema import MergeRecipe, TrainRecipe

if TYPE_CHECKING:
    from jinja2 import Template

CARD_FILE = "README.md"
PICTURE_FILE = "learning_curve.png"
_FIRST_COLUMNS = ("epoch", "step", "learning_rate", "running_loss")
MOST_ROWS = 25
MOST_COLUMNS = 12
MOST_LABELS = 20
MOST_NAMES = 12

CITATION = """\
@software{hf_zoo,
  title = {hf_zoo: populations of neural networks as one native Hugging Face tool},
  author = {{The hf_zoo maintainers}},
  license = {Apache-2.0}
}"""

_WHAT_IT_DOES = {
    "image_classification": "classifies images",
    "contrastive": "embeds images, trained to tell two views of one image from those of others (SimCLR)",
    "masked_lm": "fills in masked words",
    "sequence_classification": "classifies texts",
}

_PURPOSE = {
    "image_classification": "image classification",
    "contrastive": "contrastive learning",
    "masked_lm": "masked language modelling",
    "sequence_classification": "text classification",
}


def render_card(manifest: Manifest, repo: str | None = None, revision: str | None = None) -> str:
    """Render the card of a member or a merge.

    Args:
        manifest: What is known of the model.
        repo: `org/name` it is published under; null for the name alone.
        revision: The snapshot the manifest describes; null for the last state.

    Returns:
        A `README.md` with metadata.
    """
    # As read back from `zoo.json`, so that a manifest in memory and the one on disk give the same bytes.
    manifest = Manifest.from_dict(json.loads(json_text(manifest.to_dict())), manifest.name)
    repo = repo or manifest.name
    title = one_line(manifest.name) + (f" at {code(revision)}" if revision else "")
    values: dict[str, Any] = {
        "metadata": metadata_yaml(manifest),
        "title": title,
        "description": sentence(manifest.description),
        "lineage": _lineage(manifest.parents),
        "loading": _facts(manifest.loading),
        "dataset": _facts(manifest.dataset),
        "digest": code(manifest.digest) if manifest.digest else "",
        "recipe": fence(_recipe(manifest.recipe), "yaml") if manifest.recipe else "",
        "versions": _pairs("Library", "Version", dict(sorted(manifest.versions.items()))),
        "license": _license(manifest),
        "citation": fence("\n\n".join([CITATION, *_paper_entry(manifest)]), "bibtex"),
    }
    if manifest.kind == "merge":
        return _template("merge.md").render(values | _merge_values(manifest, repo))
    return _template("member.md").render(values | _member_values(manifest, repo, revision))


def render_collection(manifests: Sequence[Manifest], limit: int = 150) -> str:
    """Render the description of a population's collection, cut at a word to what a Hub takes."""
    factors = list(dict.fromkeys(path.rpartition(".")[2] for m in manifests for path in m.factors))
    purposes = {m.objective or "" for m in manifests}
    descriptions = {m.description for m in manifests}
    text = _template("collection.md").render(
        count=len(manifests),
        purpose=_PURPOSE.get(purposes.pop(), "") if len(purposes) == 1 else "",
        factors=", ".join(factor.replace("_", " ") for factor in factors),
        description=descriptions.pop() if len(descriptions) == 1 else "",
    )
    return shorten(text, limit)


def render_note(manifest: Manifest, limit: int = 500) -> str:
    """Render a member's note in its population's collection: its factors, or what a merge was made of."""
    if manifest.kind == "merge":
        names = ", ".join(parent.repo.rpartition("/")[2] for parent in manifest.parents if parent.role != "base")
        return shorten(f"{manifest.method.get('name', 'merge')} of {names}", limit)
    return shorten(", ".join(f"{path} = {_plain(value)}" for path, value in sorted(manifest.factors.items())), limit)


def write_card(folder: Path, repo: str | None = None, manifest: Manifest | None = None) -> None:
    """Write a member's or a merge's card and, where there are results, its picture; unchanged files stay untouched.

    Args:
        folder: The folder with `zoo.json`.
        repo: `org/name` it is published under; null for the name alone.
        manifest: What the card shows, if that is not the folder's `zoo.json`.

    Raises:
        PopulationError: If there is no manifest.
    """
    manifest = manifest or Manifest.read(folder)
    card = render_card(manifest, repo)
    path = folder / CARD_FILE
    if not path.is_file() or path.read_bytes() != card.encode():
        write_text(path, card)
    picture = folder / PICTURE_FILE
    if has_picture(manifest) and not (picture.is_file() and shows(picture.read_bytes(), manifest.results)):
        write_bytes(picture, draw_learning_curve(manifest.results))
    for section in diagnostics.sections_of(manifest.diagnostics) if manifest.kind == "merge" else ():
        picture, shown = folder / section.picture, section.own(manifest.diagnostics)
        if not (picture.is_file() and shows(picture.read_bytes(), shown)):
            write_bytes(picture, section.draw(shown))


def has_picture(manifest: Manifest) -> bool:
    """Whether the card shows a learning curve: a member with at least two records."""
    return manifest.kind != "merge" and len(manifest.results) > 1


def shorten(text: str, limit: int) -> str:
    """Cut text on one line to so many characters, at a word where there is one."""
    text = one_line(text)
    if len(text) <= limit:
        return text
    head = text[: limit - 1]
    whole_words = head if text[limit - 1] == " " else head.rpartition(" ")[0]
    return (whole_words or head).rstrip(" ,;.") + "…"


@functools.cache
def _template(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    from hf_zoo.resources import find_resource

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )  # autoescape is HTML's; values are escaped for Markdown by `hf_zoo.hub.markdown`
    return environment.from_string(find_resource(f"hub_cards/{name}").read_text(encoding="utf-8"))


def _member_values(manifest: Manifest, repo: str, revision: str | None) -> dict[str, Any]:
    snapshots = () if revision else manifest.snapshots
    records, thinned = _thinned(manifest.results)
    return {
        "summary": _member_summary(manifest),
        "own_code": has_own_code(manifest),
        "usage": fence(revision_usage(manifest, repo, revision) if revision else usage(manifest, repo), "python"),
        "snapshots": _snapshot_names(snapshots),
        "num_snapshots": len(snapshots),
        "revision_usage": fence(revision_usage(manifest, repo, _middle(snapshots)), "python"),
        "population": code(manifest.population) if manifest.population else "",
        "population_usage": fence(population_usage(manifest, repo), "python") if manifest.population else "",
        "factors": _pairs("Factor", "Value", manifest.factors),
        "results": _records_table(records),
        "results_note": " ".join(_results_notes(manifest.results) + ([thinned] if thinned else [])),
        "final": _final_table(manifest.metrics),
        "picture": has_picture(manifest) and not revision,
        "statistics": _statistics(manifest),
    }


def _merge_values(manifest: Manifest, repo: str) -> dict[str, Any]:
    method = manifest.method
    title = sentence(method.get("title") or "")
    cited = ", ".join(part for part in (title and f"*{title}*", sentence(method.get("paper") or "")) if part)
    url = str(method.get("url") or "")
    if url and cited:
        cited = f"{cited}, {link(sentence(url), url)}"
    results, caption = _merge_results(manifest)
    return {
        "summary": _merge_summary(manifest),
        "usage": fence(usage(manifest, repo), "python"),
        "task_usage": fence(task_usage(manifest, repo), "python")
        if manifest.tasks and manifest.auto_class == "AutoModel"
        else "",
        "method": f"{code(method.get('name', 'unknown'))}" + (f": {cited}." if cited else "."),
        "method_description": sentence(method.get("description") or ""),
        "report": _facts(method.get("report") or {}),
        "parameters": _pairs("Parameter", "Value", method.get("parameters") or {}),
        "results": results,
        "results_caption": caption,
        "diagnostics": diagnostics.render(manifest.diagnostics),
    }


def _member_summary(manifest: Manifest) -> str:
    kind = code(manifest.architecture or manifest.auto_class or "model")
    size = f" with {number(manifest.num_parameters)} parameters" if manifest.num_parameters else ""
    does = _WHAT_IT_DOES.get(manifest.objective or "")
    does = f" that {does}" if does else ""
    data = manifest.dataset.get("path")
    data = f", trained on {code(data)}" if data else ""
    text = f"**{sentence(manifest.name)}** is a {kind}{size}{does}{data}."
    if manifest.population:
        text += (
            f" It belongs to {_population_link(manifest.population)}: models made alike but for the factors below,"
            " so that they can be compared, merged and studied together."
        )
    metric = main_metric([manifest.metrics])
    for split in ("test", "validation"):
        if isinstance(value := manifest.metrics.get(f"{split}_{metric}"), int | float):
            return f"{text} It ends at a {split} {_words(str(metric))} of {number(value)}."
    return text


def _merge_summary(manifest: Manifest) -> str:
    merged = [parent for parent in manifest.parents if parent.role != "base"]
    kind = code(manifest.architecture or manifest.auto_class or "model")
    size = f" with {number(manifest.num_parameters)} parameters" if manifest.num_parameters else ""
    tasks = f" for {', '.join(code(task) for task in manifest.tasks)}" if manifest.tasks else ""
    text = (
        f"**{sentence(manifest.name)}** is a {kind}{size}{tasks}: {len(merged)} models merged into one with"
        f" {code(manifest.method.get('name', 'an unknown method'))}, without further training."
    )
    if manifest.population:
        text += f" Its parts come from {_population_link(manifest.population)}."
    return text


def _population_link(population: str) -> str:
    """Return a link to the Hub's list of everything tagged with the population, on whichever Hub shows the card."""
    return link(f"the population {code(population)}", f"/models?other={quote('population:' + population, safe=':')}")


def _snapshot_names(snapshots: Sequence[Snapshot]) -> str:
    names = [code(snapshot.name) for snapshot in snapshots]
    if len(names) > MOST_NAMES:
        names = [*names[: MOST_NAMES - 1], "…", names[-1]]
    return ", ".join(names)


def _middle(snapshots: Sequence[Snapshot]) -> str:
    return snapshots[len(snapshots) // 2].name if snapshots else ""


def _lineage(parents: Sequence[Parent]) -> str:
    if not parents:
        return ""
    rows = []
    for parent in parents:
        name, revision = code(parent.repo), code(parent.revision) if parent.revision else "last state"
        if "/" in parent.repo:
            name = link(name, f"/{parent.repo}")
            if parent.revision:
                revision = link(code(parent.revision[:12]), f"/{parent.repo}/tree/{parent.revision}")
        weights = code(parent.sha256[:16]) if parent.sha256 else "unknown"
        rows.append([sentence(parent.role), name, revision, sentence(parent.task) if parent.task else "-", weights])
    return table(["Role", "Model", "Revision", "Task", "Weights (SHA-256)"], rows)


def _pairs(first: str, second: str, values: dict[str, Any]) -> str:
    """Return a table of names and values as they were written, or nothing when there are none."""
    return table([first, second], [[code(k), code(_plain(v))] for k, v in values.items()]) if values else ""


def _facts(facts: dict[str, Any]) -> str:
    """Return a table of a mapping; a long list says how many it holds and shows the first."""
    rows = [[sentence(_words(key)), _fact(value)] for key, value in facts.items() if value is not None]
    return table(["Item", "Value"], rows) if rows else ""


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple) and all(not isinstance(item, dict | list) for item in value):
        shown = ", ".join(code(item) for item in value[:MOST_LABELS])
        more = f" and {len(value) - MOST_LABELS} more" if len(value) > MOST_LABELS else ""
        return f"{len(value)}: {shown}{more}" if value else "none"
    if isinstance(value, dict) and value:
        items = sorted(value.items(), key=lambda pair: SPLITS.index(pair[0]) if pair[0] in SPLITS else len(SPLITS))
        separator = "; " if any(isinstance(item, list | dict) for _, item in items) else ", "
        return separator.join(f"{sentence(_words(key))} {_fact(item)}" for key, item in items if item is not None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return code(_plain(value))


def _statistics(manifest: Manifest) -> str:
    """Return a table of the files in `statistics/`, or nothing when there are none."""
    rows = []
    for entry in manifest.statistics:
        draws = entry.get("num_samples_per_example")
        estimator = f"{entry['estimator']}, {draws} a prediction" if draws else entry.get("estimator")
        what = [sentence(_words(entry.get("kind", "unknown"))), sentence(estimator) if estimator else "-"]
        counted = [_measured(entry.get("num_examples")), _measured(entry.get("trace"))]
        data = (entry.get("dataset") or {}).get("path")
        rows.append([code(entry.get("file", "unknown")), *what, *counted, code(data) if data else "-"])
    return table(["File", "Statistic", "Labels", "Examples", "Trace", "Data"], rows, numeric=(3, 4)) if rows else ""


def _thinned(results: Sequence[dict[str, Any]]) -> tuple[Sequence[dict[str, Any]], str]:
    """Return at most `MOST_ROWS` records, first and last among them, and a sentence that says so."""
    if len(results) <= MOST_ROWS:
        return results, ""
    last = len(results) - 1
    places = sorted({round(place * last / (MOST_ROWS - 1)) for place in range(MOST_ROWS)})
    kept = [results[place] for place in places]
    return kept, f"{len(kept)} of {len(results)} records are shown; all are in `results.jsonl`."


def _results_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return what a reader must know of the records, as far as it concerns them."""
    keys = {key for record in results for key in record}
    notes = ["The first record is of the untrained network."] if results and not results[0].get("step") else []
    if any(key.startswith("train_") for key in keys):
        notes.append("Train figures are measured on clean samples at the end of the epoch.")
    if len(_columns(results)) < len(keys):
        notes.append("All metrics are in `results.jsonl`.")
    if "running_loss" in keys:
        notes.append("The running loss is the mean over the epoch, as it was trained.")
    return notes


def _records_table(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return ""
    keys = _columns(records)
    rows = [[_measured(record.get(key)) for key in keys] for record in records]
    return table([sentence(_words(key)) for key in keys], rows, numeric=range(len(keys)))


def _columns(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the records' keys in order; of very many only loss and main metric of each split."""
    keys = sorted({key for record in records for key in record}, key=_column_order)
    if len(keys) <= MOST_COLUMNS:
        return keys
    shown = {"loss", main_metric(records)}
    return [key for key in keys if key.partition("_")[0] not in SPLITS or key.partition("_")[2] in shown]


def _column_order(key: str) -> tuple[int, int, str]:
    """Order columns as time, schedule, then each split with its loss first."""
    if key in _FIRST_COLUMNS:
        return 0, _FIRST_COLUMNS.index(key), key
    split, _, metric = key.partition("_")
    if split in SPLITS:
        return 1 + SPLITS.index(split), int(metric != "loss"), metric
    return 1 + len(SPLITS), 0, key


def _final_table(metrics: dict[str, Any]) -> str:
    splits = [split for split in SPLITS if any(key.startswith(f"{split}_") for key in metrics)]
    keys = sorted((key for key in metrics if key.partition("_")[0] in splits), key=_column_order)
    names = list(dict.fromkeys(key.partition("_")[2] for key in keys))
    if not names:
        return ""
    rows = [[_words(name), *(_measured(metrics.get(f"{split}_{name}")) for split in splits)] for name in names]
    return table(["At the end", *splits], rows, numeric=range(1, len(splits) + 1))


def _merge_results(manifest: Manifest) -> tuple[str, str]:
    """Return a table model x task of the main metric, and a sentence on what it shows."""
    records = [record for record in manifest.results if "task" in record and "model" in record]
    metric = main_metric(records) or "loss"
    key = next((f"{s}_{metric}" for s in ("test", "validation") if any(f"{s}_{metric}" in r for r in records)), metric)
    tasks = list(dict.fromkeys(str(record["task"]) for record in records))
    models = list(dict.fromkeys(str(record["model"]) for record in records))
    values = {(str(record["model"]), str(record["task"])): record.get(key) for record in records}
    rows = []
    for model in models:
        row = [values.get((model, task)) for task in tasks]
        finite = [value for value in row if isinstance(value, int | float) and math.isfinite(value)]
        mean = _measured(sum(finite) / len(finite)) if len(finite) == len(tasks) else "-"
        rows.append([code(model), *(_measured(value) for value in row), *([mean] if len(tasks) > 1 else [])])
    if not rows:
        return "", ""
    header = ["Model", *(code(task) for task in tasks), *(["mean"] if len(tasks) > 1 else [])]
    caption = f"{_words(key).capitalize()} of the merge and of the models it was made from; `-`: not measured."
    return table(header, rows, numeric=range(1, len(header))), caption


def _license(manifest: Manifest) -> str:
    if manifest.license:
        return f"The weights are published under {code(manifest.license)}."
    return "None was chosen for these weights: ask their authors before using them."


def _paper_entry(manifest: Manifest) -> list[str]:
    method = manifest.method
    if not (method.get("title") or method.get("paper")):
        return []
    fields = {"title": method.get("title"), "note": method.get("paper"), "url": method.get("url")}
    lines = [f"  {key} = {{{_braces(value)}}}" for key, value in fields.items() if value]
    name = "".join(c for c in str(method.get("name") or "method") if c.isalnum() or c in "-_")
    return [f"@misc{{{name},\n" + ",\n".join(lines) + "\n}"]


def _braces(text: Any) -> str:
    return one_line(text).replace("{", "(").replace("}", ")").replace("\\", "/")


def _recipe(content: dict[str, Any]) -> str:
    """Return a recipe as YAML, its keys in the schema's order."""
    recipe = MergeRecipe if "method" in content else TrainRecipe
    order = [field.name for field in dataclasses.fields(recipe) if field.name in content]
    content = {key: content[key] for key in [*order, *(key for key in content if key not in order)]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _measured(value: Any) -> str:
    return "-" if value is None else sentence(number(value))


def _plain(value: Any) -> str:
    """Return a factor's value as YAML spells it, on one line."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _words(name: str) -> str:
    return str(name).replace("_", " ")
