"""`hf-zoo list POPULATION [factor=value ...]`: the members of a population, in a folder or on a Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_zoo.cli import guarded
from hf_zoo.errors import PopulationError
from hf_zoo.population import Population

HELP = """usage: hf-zoo list POPULATION [factor=value ...] [--csv]

List the members of a population with their factors and results.

  POPULATION        its folder, or org/name on a Hub
  factor=value      keep the members with this value: seed=3, task=sst, training.learning_rate=1e-3
  --csv             every factor and metric as comma-separated values"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _list(arguments))


def _list(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    words = [word for word in arguments if word != "--csv"]
    unknown = [word for word in words if word.startswith("-")]
    if unknown or not words:
        wrong = f"unknown flag {unknown[0]}: there is --csv" if unknown else "which POPULATION? A folder, or org/name"
        raise PopulationError(f"list: {wrong}")
    where, *filters = words
    population = Population.open(where).where(**_parse(filters))
    if "--csv" in arguments:
        print(population.to_dataframe().to_csv(index=False), end="")
        return 0
    from hf_zoo.display import format_table, results_of

    print(format_table(results_of(population)))
    print(f"{len(population)} members")
    return 0


def _parse(filters: list[str]) -> dict[str, object]:
    from hf_zoo.recipe.reading import ReadingError, read_yaml

    wanted = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals:
            raise PopulationError(f"list: expected factor=value, got {text!r}")
        try:
            wanted[key.replace(".", "__")] = read_yaml(value)
        except ReadingError as error:
            raise PopulationError(f"list: {text}: {error}") from error
    return wanted


if __name__ == "__main__":
    sys.exit(main())
