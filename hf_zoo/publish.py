"""`python -m hf_zoo.publish FOLDER namespace=ORG [key=value ...]`: push a population, a member or a merge to a Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_zoo.cli import guarded
from hf_zoo.errors import PopulationError, RecipeError
from hf_zoo.population import MANIFEST_FILE, POPULATION_FILE
from hf_zoo.recipe.schema import PublishSpec

if TYPE_CHECKING:
    from hf_zoo.hub.publish import PublishReport

MOST_NAMED = 5

HELP = """usage: hf-zoo publish FOLDER namespace=ORG [key=value ...]

Push a population, one member or a merge to the Hub of HF_ENDPOINT (default https://huggingface.co), with the token of
HF_TOKEN or `hf auth login`. What is there already is not sent again: run the same command again after a failure.

  FOLDER            a population's folder (runs/zoo-vit), a member's in it, or a merge's
  namespace=ORG     user or organisation
  private=false     make new repos public (default: private)
  snapshots=false   push the last state only, no branches
  collection=TITLE  title of the collection (default: the population's name)
  license=mit       licence on the cards
  language=[en]     language codes on the cards
  workers=4         members pushed at the same time"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish a folder and return the exit status: 2 when something could not be published."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def body() -> int:
        if not given or {"-h", "--help"} & set(given):
            print(HELP)
            return 0 if given else 2
        folder, spec = _read(given)
        publish_folder(folder, spec)
        return 0

    return guarded(body)


def publish_folder(folder: Path, spec: PublishSpec) -> PublishReport:
    """Publish a population's, a member's or a merge's folder and print what was done.

    Args:
        folder: The folder.
        spec: How it appears.

    Returns:
        What was done.

    Raises:
        HubError: If something could not be published.
        PopulationError: If the folder holds none of these.
    """
    from huggingface_hub.utils import disable_progress_bars

    from hf_zoo.hub.publish import publish_member, publish_population

    disable_progress_bars()  # a bar a file of every member at once hides what is going on
    if (folder / POPULATION_FILE).is_file():
        report = publish_population(folder, spec, _show_progress)
    elif (folder / MANIFEST_FILE).is_file():
        report = publish_member(folder, None, spec)
    else:
        raise PopulationError(
            f"{folder}: neither a population ({POPULATION_FILE}) nor a member or merge ({MANIFEST_FILE})"
        )
    print(_table(report))
    return report


def _read(arguments: Sequence[str]) -> tuple[Path, PublishSpec]:
    """Bind the command line as strictly as a recipe."""
    from hf_zoo.recipe.binding import INVALID, Binder
    from hf_zoo.recipe.reading import ReadingError, read_yaml

    folders = [argument for argument in arguments if "=" not in argument or Path(argument).is_dir()]
    mistakes = [f"{flag}: unknown flag: keys are written key=value" for flag in folders if flag.startswith("-")]
    if len(folders) != 1:
        mistakes.append(f"expected one folder before the keys, got {', '.join(folders) or 'none'}")
    values = {}
    for argument in arguments:
        if argument in folders:
            continue
        key, _, text = argument.partition("=")
        try:
            values[key.removeprefix("publish.")] = read_yaml(text)
        except ReadingError as error:
            mistakes.append(f"{key}: {text!r} is not a YAML value ({error}): quote it")
    binder = Binder(PublishSpec, {})
    spec = binder.bind(values, PublishSpec, "")
    mistakes += [str(mistake) for mistake in binder.mistakes]
    if mistakes or spec is INVALID:
        raise RecipeError("command line", mistakes)
    return Path(folders[0]), spec


def _show_progress(name: str, done: int, total: int) -> None:
    """Show how far the population is: one line that is written over on a terminal, one a member elsewhere."""
    end = "\n" if done == total or not sys.stderr.isatty() else ""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start}[{done}/{total}] {name}", end=end, file=sys.stderr, flush=True)


def _table(report: PublishReport) -> str:
    """Return one line a repo, and where to look at them."""
    rows = []
    for repo in report.repos:
        revisions = [revision for revision in report.revisions if revision.repo == repo]
        sent = sum(revision.uploaded for revision in revisions)
        skipped = sum(revision.skipped for revision in revisions)
        rows.append((repo, str(len(revisions)), str(sent), str(skipped), revisions[-1].commit[:12]))
    header = ("repo", "revisions", "sent", "there", "commit")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    titles = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    lines = [titles, "  ".join("-" * width for width in widths), *lines]
    if report.waiting:
        lines.append(f"not finished, so not published: {_some(report.waiting)}")
    if report.left_out:
        lines.append(f"not part of a repo: {_some(report.left_out)}")
    lines.append(f"{len(report.commits)} commits, {report.uploaded_files} files sent: {report.url}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


if __name__ == "__main__":
    sys.exit(main())
