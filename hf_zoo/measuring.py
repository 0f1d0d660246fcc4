"""`hf-zoo curvature MEMBER_OR_RECIPE [key=value ...]`: measure the statistics that merges of members need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_zoo.cli import guarded
from hf_zoo.recipe.curvature import CurvatureRecipe

HELP = """usage: hf-zoo curvature MEMBER_OR_RECIPE [key=value ...] [--dry-run]

Measure members' diagonal Fisher information and Gram matrices on their own training splits, and keep them in
`statistics/` beside the weights, where merges find them. Run the same command again after a kill: it goes on.

  MEMBER_OR_RECIPE  a member's folder, a population's (every finished member), org/name, or a YAML file
  key=value         overrides a key: kinds=[fisher,gram], estimator=sampled, num_samples=4, max_examples=2000,
                    batch_size=64, dtype=float64, device=cuda, data.path=FOLDER, output=FOLDER, seed=1
  --dry-run         list the members and what they have already, and stop"""

SUFFIXES = (".yaml", ".yml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the members a command line names and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    from hf_zoo.recipe.loader import build_recipe, load_recipe, parse_arguments

    source, overrides, flags = parse_arguments(arguments)
    if "--help" in flags:
        print(HELP)
        return 0
    if source.endswith(SUFFIXES) or Path(source).is_file():
        recipe = load_recipe(source, CurvatureRecipe, overrides)
    else:
        recipe = build_recipe({"members": [source]}, CurvatureRecipe, "command line", overrides)
    return _measure(recipe, "--dry-run" in flags)


def _measure(recipe: CurvatureRecipe, dry_run: bool) -> int:
    import torch

    from hf_zoo.curvature.members import measure_member, members_of
    from hf_zoo.curvature.saved import read_description
    from hf_zoo.display import format_table, quieten

    quieten()
    members = [member for where in recipe.members for member in members_of(where)]
    if dry_run:
        rows: list[dict[str, Any]] = []
        for member, revision in members:
            folder = Path(recipe.output) / member.name if recipe.output else member.path(revision)
            has = [kind for kind in ("fisher", "gram") if read_description(folder, kind) is not None]
            rows.append({"member": member.name, "objective": member.manifest.objective, "has": ", ".join(has) or "-"})
        print(format_table(rows))
        print(f"{', '.join(recipe.kinds)} of {len(members)} members; nothing was done")
        return 0
    device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for member, revision in members:
        progress = _Progress(member.name)
        output = None if recipe.output is None else Path(recipe.output) / member.name
        found = measure_member(
            member, recipe, data=recipe.data, device=device, output=output, revision=revision, report=progress
        )
        progress.close()
        for description in found:
            estimator = description.get("estimator", "-")
            rows.append({"member": member.name, "statistic": description["kind"], "estimator": estimator,
                         "examples": description["num_examples"], "trace": f"{description['trace']:.4g}",
                         "zeros": f"{_zeros(description):.1%}"})  # fmt: skip
    print(format_table(rows))
    return 0


def _zeros(description: dict[str, Any]) -> float:
    """Return the mean share of zeros over tensors: many mean parameters the data never reached."""
    shares = [tensor["zeros"] for tensor in description["tensors"].values()]
    return sum(shares) / max(1, len(shares))


class _Progress:
    """A bar for each kind of statistics of a member, on a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.kind, self.bar = name, "", None

    def __call__(self, kind: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if kind != self.kind:
            self.close()
            self.kind = kind
            silent = not sys.stderr.isatty()
            self.bar = tqdm(total=total, desc=f"{self.name} {kind}", unit="example", disable=silent, leave=False)
        bar: Any = self.bar
        bar.update(done - bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


if __name__ == "__main__":
    sys.exit(main())
