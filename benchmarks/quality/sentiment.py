"""Every merge method on four sentiment experts of one model, against base, experts, joint training and ensembles.

    python -m benchmarks.quality.sentiment --data FOLDER

FOLDER holds the sets named in `sentiment_data.SETS`. What is done already is skipped, so that it may be interrupted.
Hyper-parameters are chosen on validation splits; the test splits are looked at once, for the chosen ones.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.quality.sentiment_data import SETS, prepare

FOLDER = Path(__file__).parent / "sentiment"
RUNS = Path("runs/sentiment")
TASKS = tuple(SETS)
EXPERTS = tuple(task for task in SETS if task != "imdb")
STAGES = {"base": 1, "experts": len(EXPERTS), "joint": 1}  # members a seed
NUM_CHOOSE, NUM_REPORT = 200, 600  # samples of each validation split to choose by, of each test split to report
SWEPT = ("task_arithmetic", "gradient_matching")
COMPARED = {"average": {}, "fisher": {}, "task_arithmetic": {"scale": 1.0}, "gradient_matching": {"scale": 1.0}}
UNTUNED = {"regmean_plus": {}}  # with the paper's values
ENSEMBLE = "ensemble (mean probabilities)"


def candidates() -> list[dict[str, Any]]:
    """Return every method with every combination of its hyper-parameters, as a search writes them."""
    found = []
    for method, grids in yaml.safe_load((FOLDER / "candidates.yaml").read_text()).items():
        for grid in grids if isinstance(grids, list) else [grids]:
            for values in itertools.product(*grid.values()):
                found.append({"method": method, **{f"parameters.{k}": v for k, v in zip(grid, values, strict=True)}})
    return found


def shared(seed: int, population: str = "sentiment-experts", **more: Any) -> Any:
    """Return the merge recipe of a seed's experts."""
    from hf_zoo.population import Population
    from hf_zoo.recipe.loader import build_recipe
    from hf_zoo.recipe.schema import MergeRecipe

    content = yaml.safe_load((FOLDER / "merge.yaml").read_text())
    experts = Population.open(RUNS / population).where(seed=seed)
    by_task = {member.manifest.task: str(member.folder) for member in experts}
    content |= {
        "members": [by_task[task] for task in EXPERTS],
        "base": str(RUNS / f"sentiment-base/sentiment-base-{seed:03d}"),
        "name": f"sentiment-{seed}",
        "seed": seed,
    }
    return build_recipe(content | more, MergeRecipe, "sentiment")


def choose(seed: int) -> list[dict[str, Any]]:
    """Return the table of all candidates, measured on validation splits."""
    from hf_zoo.search import search

    found = search(shared(seed, search={"over": {"candidate": candidates()}}, num_eval=NUM_CHOOSE, evaluate=False))
    return [{**record, "values": record["values"]["candidate"]} for record in found.records]


def strong(seed: int) -> list[dict[str, Any]]:
    """Return the table of a few candidates of experts far from their base; nothing is chosen by it."""
    from hf_zoo.search import search

    scales = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
    tried = [{"method": "average"}, {"method": "fisher"}, {"method": "fisher", "parameters.floor": 1e-12}]
    tried += [{"method": method, "parameters.scale": scale} for method in SWEPT for scale in scales]
    over = {"candidate": tried}
    found = search(shared(
        seed, "sentiment-strong", name=f"strong-{seed}", search={"over": over}, num_eval=NUM_CHOOSE, evaluate=False
    ))  # fmt: skip
    return [{**record, "values": record["values"]["candidate"]} for record in found.records]


def strong_report(tables: Sequence[Any]) -> Iterator[str]:
    """Yield a table of the candidates of `strong`."""
    yield "| merge of far experts | validation accuracy, mean of five |"
    yield "|---|---|"
    for records in zip(*tables, strict=True):
        told = ", ".join(f"{key} {value:g}" for key, value in chosen(records[0]).items())
        yield f"| `{records[0]['values']['method']}` {told} | {spread([record['score'] for record in records])} |"


def best_of(table: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return each method's first best candidate."""
    best: dict[str, Mapping[str, Any]] = {}
    for record in table:
        method = record["values"]["method"]
        if "score" in record and (method not in best or record["score"] > best[method]["score"]):
            best[method] = record
    return best


def chosen(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a candidate's hyper-parameters."""
    return {key.removeprefix("parameters."): value for key, value in record["values"].items() if key != "method"}


def compare(seed: int, best: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return row -> task -> test metrics of every method with its chosen values, and of what they are against.

    `method: all` would tell the same; here rows are measured on the test splits alone, which costs half.
    """
    from hf_zoo.candidates import CandidateTable
    from hf_zoo.checkpoint import CheckpointReader
    from hf_zoo.ensembles import measure_ensembles
    from hf_zoo.ingredients import open_ingredient
    from hf_zoo.planning import plan_merge
    from hf_zoo.search import Bench

    parameters = UNTUNED | {method: chosen(record) for method, record in best.items()}
    lines = CandidateTable(RUNS / f"test-{seed}.jsonl", {"seed": seed, "num_eval": NUM_REPORT, "chosen": parameters})
    rows: dict[str, Any] = {line["name"]: line["results"] for line in lines}
    if "end" in rows:
        return {name: row for name, row in rows.items() if name != "end"}
    recipe = shared(seed, num_eval=NUM_REPORT)
    recipes = {name: replace(recipe, method=name, parameters=own) for name, own in parameters.items()}
    bench = Bench(plan_merge(recipe, list(recipes.values())), with_test=True)
    trials = [replace(trial, tables={"test": trial.tables["test"]}) for trial in bench.trials]
    joint = open_ingredient(RUNS / f"sentiment-joint/sentiment-joint-{seed:03d}")
    others = {"base": bench.plan.base, "joint training": joint}
    others |= {f"expert: {member.task}": member for member in bench.plan.members}

    def add(name: str, results: Mapping[str, Any]) -> None:
        rows[name] = lines.append({"name": name, "results": results})["results"]

    for name, model in others.items():
        if name not in rows:
            add(name, {trial.task: trial.measure(model.reader) for trial in trials})
    if ENSEMBLE not in rows:
        records = {trial.task: {one["model"]: one for one in measure_ensembles(trial)} for trial in trials}
        add(ENSEMBLE, {task: {"test_accuracy": of[ENSEMBLE]["test_accuracy"]} for task, of in records.items()})
    for name, own in recipes.items():
        if name not in rows:
            merged = CheckpointReader.of(bench.merge(own), name)
            add(name, {trial.task: trial.measure(merged) for trial in trials})
    add("end", {})
    return {name: row for name, row in rows.items() if name != "end"}


def mismatch(seed: int) -> dict[str, dict[str, Any]]:
    """Return method -> the gradient it leaves unmatched, over the whole model."""
    from hf_zoo.merging import run_merge

    found = {}
    for method, parameters in COMPARED.items():
        name = f"mismatch-{seed}-{method.replace('_', '-')}"
        outcome = run_merge(shared(
            seed, name=name, method=method, parameters=parameters, evaluate=False,
            diagnostics={"kinds": ["mismatch"], "max_examples": 256, "alphas": [1.0] * len(EXPERTS)},
        ))  # fmt: skip
        found[method] = outcome.manifest.diagnostics["mismatch"]["groups"][-1]
    return found


def spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation in percent."""
    rest = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{rest}"


def report(seeds: Sequence[int], tables: Sequence[Any], rows: Sequence[Any], left: Sequence[Any]) -> Iterator[str]:
    """Yield the lines of the tables."""
    from hf_zoo.methods.base import list_methods

    yield f"Test accuracy in percent, mean ± standard deviation over {len(seeds)} seeds:"
    yield ""
    yield (
        "| model | mean of five | above `average` | mean of the four | "
        + " | ".join(SETS)
        + " | chosen, seed by seed |"
    )
    yield "|---|" + "---|" * (len(SETS) + 4)
    best = [best_of(table) for table in tables]

    def means(name: str, tasks: Sequence[str]) -> list[float]:
        return [mean(row[name][task]["test_accuracy"] for task in tasks) for row in rows]

    def line(name: str) -> str:
        above = [one - other for one, other in zip(means(name, TASKS), means("average", TASKS), strict=True)]
        told = [chosen(one[name]) if name in one else {} for one in best]
        values = [f"{key} {' / '.join(str(one.get(key)) for one in told)}" for key in told[0]]
        is_method = name in list_methods()
        untuned = "the paper's, not tuned" if is_method and name not in best[0] else ", ".join(values)
        cells = [
            f"`{name}`" if is_method else name,
            spread(means(name, TASKS)),
            spread(above),
            spread(means(name, EXPERTS)),
        ]
        return f"| {' | '.join(cells + [spread(means(name, [task])) for task in SETS])} | {untuned} |"

    common = [name for name in rows[0] if all(name in row for row in rows)]
    methods = sorted(set(common) & set(list_methods()), key=lambda name: -mean(means(name, TASKS)))
    yield from map(line, [*(name for name in common if name not in methods), *methods])
    yield ""
    yield "Validation accuracy along `scale`, mean of the five sets and of the seeds:"
    yield ""
    scales = sorted({chosen(record)["scale"] for record in tables[0] if record["values"]["method"] in SWEPT})
    yield "| method | " + " | ".join(f"{scale:g}" for scale in scales) + " |"
    yield "|---|" + "---|" * len(scales)
    for method in SWEPT:
        curve = {scale: [] for scale in scales}
        for table in tables:
            for record in table:
                if record["values"]["method"] == method:
                    curve[chosen(record)["scale"]].append(record["score"])
        yield f"| `{method}` | " + " | ".join(f"{100 * mean(values):.1f}" for values in curve.values()) + " |"
    if left:
        yield ""
        yield "Gradient left unmatched (all weights of tasks 1), seed by seed:"
        yield ""
        keys = [key for key, value in left[0]["average"].items() if isinstance(value, float)]
        yield "| method | " + " | ".join(keys) + " |"
        yield "|---|" + "---|" * len(keys)
        for method in COMPARED:
            cells = ["; ".join(f"{one[method][key]:.4g}" for one in left) for key in keys]
            yield f"| `{method}` | " + " | ".join(cells) + " |"


def main() -> int:
    """Run what is not done yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mismatch", action="store_true", help="also measure the gradients left unmatched")
    parser.add_argument("--strong", action="store_true", help="also merge experts far from their base")
    arguments = parser.parse_args()
    from hf_zoo.finetune import main as finetune

    prepare(arguments.data, RUNS / "data")
    for stage, each in STAGES.items():
        members = ",".join(str(seed * each + place) for seed in arguments.seeds for place in range(each))
        if finetune([str(FOLDER / f"{stage}.yaml"), f"members={members}"]):
            return 1
    tables, rows = [], []
    for seed in arguments.seeds:
        tables.append(choose(seed))
        rows.append(compare(seed, best_of(tables[-1])))
    left = [mismatch(seed) for seed in arguments.seeds] if arguments.mismatch else []
    print("\n".join(report(arguments.seeds, tables, rows, left)))
    if arguments.strong:
        members = ",".join(
            str(seed * len(EXPERTS) + place) for seed in arguments.seeds for place in range(len(EXPERTS))
        )
        if finetune([str(FOLDER / "strong.yaml"), f"members={members}"]):
            return 1
        print("\n".join(["", *strong_report([strong(seed) for seed in arguments.seeds])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
