"""`python -m hf_zoo.merge RECIPE [key.path=value ...] [--dry-run]`: merge members into one model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_zoo.cli import guarded
from hf_zoo.recipe.rules import EVERY_METHOD
from hf_zoo.recipe.schema import MergeRecipe

if TYPE_CHECKING:
    from hf_zoo.merging import MergePlan
    from hf_zoo.recipe.search import SearchSpec

HELP = """usage: hf-zoo merge RECIPE [key.path=value ...] [--dry-run]

Merge the members a recipe names, or the best member of each of its tasks, measure the merge and the members on every
task, and write a repo that the stock Auto classes load. Made again with the same members and recipe, it is left alone.
A `search` in the recipe finds hyper-parameters on the validation splits first; `method=all` compares every method that
can be tried and makes the best. Both go on where they were interrupted.

  RECIPE            a YAML file, the name of one in recipes/, or a YAML of mergekit's
  key.path=value    overrides a key: tasks=[sst,mnli], method=greedy_soup, population=org/zoo-bert-tasks,
                    members=[org/a,org/b@epoch-003], base=org/zoo-bert-000, parameters.weights=[2,1],
                    data.sst.path=FOLDER, publish.namespace=org
  --dry-run         show the members, heads and folder, and stop"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the merge of a recipe and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    from hf_zoo.recipe.loader import parse_arguments

    source, overrides, flags = parse_arguments(arguments)
    if "--help" in flags:
        print(HELP)
        return 0
    recipe = _load(source, overrides)
    from hf_zoo.display import format_table, quieten
    from hf_zoo.merging import plan_merge, results_table, run_merge

    quieten()
    if recipe.method == EVERY_METHOD:
        return _compare(recipe, "--dry-run" in flags)
    if "--dry-run" in flags:
        return _show(plan_merge(dataclasses.replace(recipe, search=None)), recipe.search)
    outcome = run_merge(recipe)
    if outcome.search is not None:
        from hf_zoo.search import search_table

        print(format_table(search_table(outcome.search)))
        print(f"{len(outcome.search.records)} candidates: {outcome.search.folder}\n")
    if outcome.manifest.results:
        print(format_table(results_table(outcome.manifest)))
    accepted = (outcome.manifest.method.get("report") or {}).get("accepted")
    if accepted is not None:
        print(f"accepted: {', '.join(accepted)}")
    print(f"{outcome.folder}" + ("" if outcome.made else ": already made from the same members and recipe"))
    if outcome.url is not None:
        print(f"published: {outcome.url}")
    return 0


def _load(source: str, overrides: list[str]) -> MergeRecipe:
    """Read a merge recipe, or a YAML of mergekit's as one."""
    from hf_zoo.mergekit import is_mergekit, translate
    from hf_zoo.recipe.loader import build_recipe, read_recipe

    content, file = read_recipe(source)
    if is_mergekit(content):
        from hf_zoo.mergekit_methods import recipe_content

        translated = translate(content, str(file))
        for note in translated["notes"]:
            print(f"{file}: {note}", file=sys.stderr)
        content = {"evaluate": False} | {
            key: value for key, value in recipe_content(translated, str(file)).items() if value is not None
        }
    return build_recipe(content, MergeRecipe, str(file), overrides)


def _compare(recipe: MergeRecipe, only_show: bool) -> int:
    from hf_zoo.contest import applicable_methods, run_contest
    from hf_zoo.display import format_table

    if only_show:
        methods, reasons = applicable_methods(recipe)
        print(f"would try {len(methods)} methods: {', '.join(methods)}")
        print(format_table([{"method": name, "cannot be tried": reason} for name, reason in reasons.items()]))
        print("nothing was done")
        return 0
    outcome = run_contest(recipe)
    print(format_table(outcome.table()))
    for name, reason in outcome.reasons.items():
        print(f"not tried: {name}: {reason}")
    print(f"best by validation: {outcome.best}, made as {outcome.merge.folder}\n{outcome.folder}")
    if outcome.merge.url is not None:
        print(f"published: {outcome.merge.url}")
    return 0


def _show(plan: MergePlan, search: SearchSpec | None) -> int:
    from hf_zoo.display import format_table

    rows = [{"role": parent.role, "model": parent.repo, "revision": parent.revision, "task": parent.task,
             "weights": (parent.sha256 or "")[:12]} for parent in plan.parents]  # fmt: skip
    print(format_table(rows))
    heads = f"one a task ({', '.join(plan.tasks)})" if plan.heads_apart else "merged"
    if search is not None:
        from hf_zoo.sampling import Space, num_candidates

        count = num_candidates(Space.of(search, len(plan.members)), search)
        print(f"a {search.sampler} of {count} candidates over {', '.join(search.over)} comes first")
    print(f"{plan.recipe.method} into {plan.folder}, heads {heads}; nothing was done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
