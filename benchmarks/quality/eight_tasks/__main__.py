"""Merge eight vision models of one parent by every method, hyper-parameters chosen on validation, and print the table.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.eight_tasks --data FOLDER

FOLDER holds `cifar10` and `mnist`, each with `train.parquet` and `test.parquet` (columns `image` and `label`). All
stages are commands of hf-zoo and go on where they were interrupted; everything lies in runs/quality/eight-tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.eight_tasks.subsets import task_names, write_subsets
from hf_zoo.hub.markdown import table
from hf_zoo.population import Manifest
from hf_zoo.recipe.search import settings_of

RECIPES = Path(__file__).parent
ROOT = Path("runs/quality/eight-tasks")
MERGES = ROOT / "merges"
MEMBERS = "eight members, each on its task"
OF_ONE_RUN = ("ema", "epoch_soup", "passthrough")  # for moments or blocks of one training, not for eight tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and mnist/")
    parser.add_argument("--seeds", type=int, default=3, help="seeds to compare, of the three of the recipes")
    parser.add_argument("--no-joint", action="store_true", help="leave joint training out")
    arguments = parser.parse_args()
    classes = write_subsets(arguments.data, ROOT / "data")
    chosen = f"0:{arguments.seeds * len(classes)}"
    hf_zoo("pretrain", "parent.yaml")
    hf_zoo("finetune", "members.yaml", f"members={chosen}")
    if not arguments.no_joint:
        hf_zoo("finetune", "joint.yaml", f"members=0:{arguments.seeds}")
    for seed in range(arguments.seeds):
        hf_zoo("merge", "search.yaml", f"name=search-{seed}", f"where.seed={seed}")
        best = choose(MERGES / f"search-{seed}-search" / "search.jsonl")
        compare(seed, best, classes, joint=not arguments.no_joint)
    print(report([rows_of(seed) for seed in range(arguments.seeds)]))


def hf_zoo(verb: str, recipe: str, *overrides: str) -> None:
    """Run a verb as anyone would."""
    began = time.time()
    command = [sys.executable, "-m", f"hf_zoo.{verb}", str(RECIPES / recipe), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{verb} {recipe} {' '.join(overrides)[:60]}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)


def choose(file: Path) -> dict[str, dict[str, Any]]:
    """Return method -> its candidate with the best mean validation accuracy, the first of equals.

    Args:
        file: The table of a search.
    """
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for line in file.read_text().splitlines()[1:]:
        record = json.loads(line)
        settings = settings_of(record["values"])
        method = settings.pop("method")
        if "failed" in record:
            print(f"{method} {settings}: {record['failed']}", file=sys.stderr)
        elif method not in best or record["score"] > best[method][0]:
            best[method] = record["score"], {key.removeprefix("parameters."): v for key, v in settings.items()}
    return {method: parameters for method, (_, parameters) in best.items()}


def compare(seed: int, best: dict[str, dict[str, Any]], classes: dict[str, list[str]], joint: bool) -> None:
    """Measure a seed's merges, members and joint training on the test splits, and the parent's trunk.

    Args:
        seed: The seed.
        best: Method -> hyper-parameters; those of the papers where a method is not in it.
        classes: Task -> names of its classes.
        joint: Whether joint training has been done.
    """
    own = f"where.seed={seed}"
    hf_zoo("merge", "compare.yaml", f"name=parent-{seed}", own, "method=task_arithmetic", "parameters={scale: 0}")
    others = [f"joint={cut_joint(seed, classes)}"] if joint else []
    hf_zoo("merge", "compare.yaml", f"name=compare-{seed}", own, f"parameters={json.dumps(best)}", *others)


def rows_of(seed: int) -> list[dict[str, Any]]:
    """Return a seed's rows: `name`, `parameters` and `accuracy`, task -> test accuracy."""
    contest = json.loads((MERGES / f"contest-compare-{seed}" / "contest.json").read_text())
    members = {}
    rows = []
    for row in contest["rows"]:
        accuracy = {task: metrics["test_accuracy"] for task, metrics in row["results"].items()}
        if row["kind"] == "member":
            members |= accuracy
        else:
            name = row["name"] if row["kind"] == "method" else "joint training"
            rows.append({"name": name, "parameters": row.get("parameters", {}), "accuracy": accuracy})
    merged = Manifest.read(MERGES / f"parent-{seed}")
    parent = {r["task"]: r["test_accuracy"] for r in merged.results if r["model"] == merged.name}
    rows.append({"name": "the parent's trunk", "parameters": {}, "accuracy": parent})
    rows.append({"name": MEMBERS, "parameters": {}, "accuracy": members})
    for name, reason in contest["not tried"].items():
        print(f"seed {seed}: {name} was not tried: {reason}", file=sys.stderr)
    return rows


def cut_joint(seed: int, classes: dict[str, list[str]]) -> Path:
    """Write the jointly trained model with a sub-folder a task, its head cut down to the task's classes."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = ROOT / "joint" / f"joint-{seed:03d}"
    folder = ROOT / "joint-by-task" / f"seed-{seed}"
    for task, names in classes.items():
        if (folder / task / "config.json").is_file():
            continue
        model = AutoModelForImageClassification.from_pretrained(source)
        rows = [model.config.label2id[name] for name in names]
        model.classifier.weight.data = model.classifier.weight.data[rows].clone()
        model.classifier.bias.data = model.classifier.bias.data[rows].clone()
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: place for place, name in enumerate(names)}
        model.save_pretrained(folder / task)
    if not (folder / "config.json").is_file():
        AutoModelForImageClassification.from_pretrained(source).save_pretrained(folder)
    return folder


def report(results: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return the markdown table: means over tasks, and their mean and standard deviation over seeds.

    The normalised accuracy is the mean over tasks of the accuracy as a share of that task's member's; what a model is
    above the plain average is taken seed by seed.
    """
    names = [row["name"] for row in results[0] if row["name"] not in OF_ONE_RUN]
    by_name = [{row["name"]: row for row in rows} for rows in results]
    bounds = [rows[MEMBERS]["accuracy"] for rows in by_name]
    lines = []
    for name in names:
        found = [rows[name] for rows in by_name]
        taken = []
        for kinds in (("cifar", "mnist"), ("cifar",), ("mnist",)):
            tasks = [task for task in task_names() if task.startswith(kinds)]
            taken.append([_mean(row, tasks) for row in found])
        pairs = zip(found, bounds, strict=True)
        shares = [statistics.fmean(row["accuracy"][t] / bound[t] for t in task_names()) for row, bound in pairs]
        gains = [mean - _mean(rows["average"], task_names()) for mean, rows in zip(taken[0], by_name, strict=True)]
        told = (_spread(taken[0]), _spread(gains, "+"), *map(_spread, (*taken[1:], shares)))
        lines.append((statistics.fmean(taken[0]), name, _chosen(found), *told))
    lines.sort(key=lambda line: -line[0])
    columns = [
        "model",
        "chosen on validation",
        "mean of 8",
        "above average",
        "CIFAR-10 (4)",
        "MNIST (4)",
        "normalised",
    ]
    return table(columns, [line[1:] for line in lines], numeric=range(2, len(columns)))


def _mean(row: Mapping[str, Any], tasks: Sequence[str]) -> float:
    return statistics.fmean(row["accuracy"][task] for task in tasks)


def _spread(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for row in rows for key in row["parameters"])
    told = []
    for key in keys:
        values = [str(row["parameters"].get(key, "-")) for row in rows]
        told.append(f"{key} {values[0] if len(set(values)) == 1 else ', '.join(values)}")
    return "; ".join(told)


if __name__ == "__main__":
    main()
