"""A population of 200 tiny members, end to end: does the time or the memory of a member grow with their number?

Trains 200 seeds of a small ViT for a few steps each in one process; then lists and filters the population, publishes
it to a Hub on this machine and publishes it again, with the commands a person would use. Times are those of the
processor, so that whatever else the machine does is left out. Run it with `python -m benchmarks.population_200`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
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
        self.began = time.process_time()

    def member(self, plan):
        pass

    def step(self, done, total):
        pass

    def finished(self, manifest):
        self.seconds.append(time.process_time() - self.began)
        self.memory.append(resident_mib())
        self.began = time.process_time()

    def failed(self, plan, reason):
        raise AssertionError(f"{plan.name}: {reason}")


def train(output: Path, num_members: int) -> list[tuple[str, str]]:
    """Train the population and return the table's rows."""
    from hf_zoo.display import quieten
    from hf_zoo.recipe.loader import build_recipe
    from hf_zoo.recipe.schema import PretrainRecipe
    from hf_zoo.training.engine import train_population

    quieten()
    content = RECIPE | {"output": str(output), "vary": {"seed": list(range(num_members))}}
    recipe = build_recipe(content, PretrainRecipe, "benchmark")
    watch = Watch()
    train_population(recipe, watch)
    first, last = watch.seconds[1:WATCHED], watch.seconds[-WATCHED:]
    rows = [
        (f"training a member, the 2nd to {WATCHED}th (median)", f"{statistics.median(first):.2f} s"),
        (f"training a member, the last {WATCHED} (median)", f"{statistics.median(last):.2f} s"),
    ]
    for place in sorted({min(WATCHED, num_members), num_members // 2, num_members}):
        rows.append((f"resident memory after member {place}", f"{watch.memory[place - 1]:.0f} MiB"))
    began = time.process_time()
    train_population(recipe, Watch())
    rows.append(("training again: all are finished", f"{time.process_time() - began:.2f} s"))
    return rows


def timed(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Run a command; return its processor seconds and the last line it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{seconds:.2f} s", done.stdout.strip().splitlines()[-1]


def use(output: Path) -> list[tuple[str, str]]:
    """List, filter and publish the population with commands, and return the table's rows."""
    hf_zoo = [sys.executable, "-m", "hf_zoo.cli"]
    environment = os.environ | {"HF_HOME": str(output / "hf-home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    hub = subprocess.Popen(
        [*hf_zoo, "hub", "serve", str(output / "hub"), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        environment["HF_ENDPOINT"] = hub.stdout.readline().split()[-1]
        folder = str(output / RECIPE["name"])
        there = f"org/{RECIPE['name']}"
        rows = []
        for what, command in (
            ("`hf-zoo list FOLDER`", ["list", folder]),
            ("`hf-zoo list FOLDER seed=[3,7]`", ["list", folder, "seed=[3,7]"]),
            ("`hf-zoo publish FOLDER namespace=org`", ["publish", folder, "namespace=org"]),
            ("`hf-zoo publish FOLDER namespace=org`, again", ["publish", folder, "namespace=org"]),
            (f"`hf-zoo list {there}`", ["list", there]),
        ):
            seconds, said = timed([*hf_zoo, *command], environment)
            rows.append((what, f"{seconds} ({said.partition(': http')[0]})"))
        used = os.sysconf("SC_CLK_TCK")
        fields = Path(f"/proc/{hub.pid}/stat").read_text().rpartition(")")[2].split()
        rows.append(("the Hub for all of these", f"{(int(fields[11]) + int(fields[12])) / used:.2f} s"))
    finally:
        hub.terminate()
        hub.wait()
    return rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = train(Path(folder), options.members) + use(Path(folder))
    print(f"| what | {options.members} members |\n|---|---|")
    for what, value in rows:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
