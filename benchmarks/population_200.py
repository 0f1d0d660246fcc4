"""A population of 200 tiny members, end to end: does the time or the memory of a member grow with their number?

Trains 200 seeds of a small ViT for a few steps each, lists and filters the population, publishes it to a Hub on this
machine, and publishes it again. Run it with `python -m benchmarks.population_200`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

RECIPE = {
    "name": "zoo-200",
    "objective": "image_classification",
    "data": {"path": "digits", "num_train": 128, "num_eval": 64},
    "model": {"type": "vit", "config": {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1,
                                        "num_attention_heads": 2, "intermediate_size": 32}},
    "training": {"epochs": 2, "batch_size": 32},
}  # fmt: skip
WATCHED = 20  # members at either end whose times are compared


def resident_mib() -> float:
    """Return the memory this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Watch:
    """Note after each member how long it took and what memory is held."""

    def __init__(self) -> None:
        self.seconds, self.memory = [], []
        self.began = 0.0

    def begin(self, folder, plans, finished):
        self.began = time.perf_counter()

    def member(self, plan):
        pass

    def step(self, done, total):
        pass

    def finished(self, manifest):
        self.seconds.append(time.perf_counter() - self.began)
        self.memory.append(resident_mib())
        self.began = time.perf_counter()

    def failed(self, plan, reason):
        raise AssertionError(f"{plan.name}: {reason}")


def timed(rows, what, action):
    """Run something and note what it took."""
    began = time.perf_counter()
    answer = action()
    rows.append((what, f"{time.perf_counter() - began:.2f} s"))
    return answer


def run(output: Path, num_members: int) -> list[tuple[str, str]]:
    """Run the whole job in a folder and return the table's rows."""
    from hf_zoo.hub.local import FolderHub

    rows: list[tuple[str, str]] = []
    with FolderHub(output / "hub", port=0) as hub:
        # Before anything imports the Hub's client, which reads its environment once.
        os.environ["HF_ENDPOINT"] = hub.url
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from hf_zoo.display import format_table, quieten, results_of
        from hf_zoo.hub.publish import publish_population
        from hf_zoo.population import Population
        from hf_zoo.recipe.loader import build_recipe
        from hf_zoo.recipe.schema import PretrainRecipe, PublishSpec
        from hf_zoo.training.engine import train_population

        quieten()
        content = RECIPE | {"output": str(output), "vary": {"seed": list(range(num_members))}}
        recipe = build_recipe(content, PretrainRecipe, "benchmark")
        watch = Watch()
        timed(rows, f"train {num_members} members", lambda: train_population(recipe, watch))
        first, last = watch.seconds[1:WATCHED], watch.seconds[-WATCHED:]
        rows.append((f"seconds a member, 2 to {WATCHED} (median)", f"{statistics.median(first):.2f} s"))
        rows.append((f"seconds a member, the last {WATCHED} (median)", f"{statistics.median(last):.2f} s"))
        for place in sorted({min(WATCHED, num_members), num_members // 2, num_members}):
            rows.append((f"resident memory after member {place}", f"{watch.memory[place - 1]:.0f} MiB"))
        timed(rows, "train again: all are finished", lambda: train_population(recipe, Watch()))
        population = timed(rows, "Population.open", lambda: Population.open(output / RECIPE["name"]))
        timed(rows, "where(seed=[...]) and to_dataframe()", lambda: population.where(seed=[3, 7]).to_dataframe())
        timed(rows, "table of all members", lambda: format_table(results_of(population)))
        spec = PublishSpec(namespace="org")
        report = timed(rows, "publish", lambda: publish_population(output / RECIPE["name"], spec))
        rows.append(("commits made", str(len(report.commits))))
        again = timed(rows, "publish again", lambda: publish_population(output / RECIPE["name"], spec))
        rows.append(("commits made again", str(len(again.commits))))
        there = timed(rows, 'Population.open("org/zoo-200")', lambda: Population.open(f"org/{RECIPE['name']}"))
        assert [member.name for member in there] == [member.name for member in population]
        assert [member.metrics for member in there] == [member.metrics for member in population]
        rows.append(("resident memory at the end", f"{resident_mib():.0f} MiB"))
        size = sum(path.stat().st_size for path in (output / RECIPE["name"]).rglob("*") if path.is_file())
        rows.append(("size of the population's files", f"{size / 2**20:.0f} MiB"))
    return rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/hf-home"
        rows = run(Path(folder), options.members)
    width = max(len(what) for what, _ in rows)
    print(f"| {'what'.ljust(width)} | {options.members} members |\n|{'-' * (width + 2)}|---|")
    for what, value in rows:
        print(f"| {what.ljust(width)} | {value} |")


if __name__ == "__main__":
    main()
