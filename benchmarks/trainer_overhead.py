"""What ZooTrainer costs over the plain Trainer on the same job, side by side in one run.

Both train the same network on the same batches (same collator, same objective through `compute_loss_func`, same
optimizer, one checkpoint and one evaluation of validation and test split an epoch); rounds alternate, so that
whatever else the machine does meets both alike. Run it with `python -m benchmarks.trainer_overhead`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_zoo.evaluation import evaluate_model
from hf_zoo.losses import compute_loss
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import PretrainRecipe, TrainRecipe
from hf_zoo.training.arguments import optimizer_choice, training_arguments
from hf_zoo.training.callbacks import RecordCallback, SnapshotCallback
from hf_zoo.training.member import Prepared, evaluate_splits
from hf_zoo.training.preparing import prepare
from hf_zoo.training.trainer import ZooTrainer

JOBS = {
    "vit": {
        "objective": "image_classification",
        "data": {"path": "digits"},
        "model": {"type": "vit", "config": {"patch_size": 2, "hidden_size": 96, "num_hidden_layers": 4,
                                            "num_attention_heads": 4, "intermediate_size": 192}},
        "training": {"epochs": 4, "batch_size": 64, "evaluate_train": False},
    },
    "bert": {
        "objective": "masked_lm",
        "data": {"path": "docs", "max_length": 64, "num_train": 100, "num_eval": 20},
        "tokenizer": {"vocab_size": 2000},
        "model": {"type": "bert", "config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                                             "intermediate_size": 512}},
        "training": {"epochs": 2, "batch_size": 32, "evaluate_train": False},
    },
}  # fmt: skip


class PlainEvaluation(TrainerCallback):
    """Evaluate after each epoch and save, as a user of the plain Trainer would have it."""

    def __init__(self, evaluate):
        self.evaluate = evaluate

    def on_train_begin(self, args, state, control, **kwargs):
        self.evaluate()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.evaluate()
        control.should_save = True
        return control


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--job", choices=JOBS, nargs="*", default=list(JOBS))
    arguments = parser.parse_args()
    for name in arguments.job:
        recipe = build_recipe({"name": "bench", **JOBS[name]}, PretrainRecipe, "benchmark")
        runs = {"Trainer": plain, "ZooTrainer": zoo}
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for run in runs.values():
            timed(run, recipe)  # warm-up
        for index in range(arguments.rounds):
            for key in list(runs) if index % 2 else list(runs)[::-1]:
                seconds[key].append(timed(runs[key], recipe))
        report(name, seconds)


def report(job: str, seconds: dict[str, list[float]]) -> None:
    ratios = [zoo / plain for zoo, plain in zip(seconds["ZooTrainer"], seconds["Trainer"], strict=True)]
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    print(
        f"| {job} | {middle['Trainer']:.2f} | {middle['ZooTrainer']:.2f} | {middle['ZooTrainer'] / middle['Trainer']:.3f} "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
    )


def timed(run, recipe: TrainRecipe) -> float:
    """Return the processor seconds of one training, which other processes on the machine do not add to."""
    prepared = prepare(recipe)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        run(recipe, prepared, Path(folder))
        return time.process_time() - started


def zoo(recipe: TrainRecipe, prepared: Prepared, folder: Path) -> None:
    trainer = ZooTrainer(
        prepared.model,
        training_arguments(recipe, folder / ".training"),
        objective=recipe.objective,
        training=recipe.training,
        train_dataset=prepared.tables.train,
        data_collator=prepared.tables.train_collator,
        processing_class=prepared.tables.processor,
    )
    records = RecordCallback(trainer, folder, lambda: evaluate_splits(trainer, recipe, prepared))
    trainer.add_callback(records)
    trainer.add_callback(SnapshotCallback(trainer, folder, recipe.snapshots, records))
    trainer.train()


def plain(recipe: TrainRecipe, prepared: Prepared, folder: Path) -> None:
    tables = prepared.tables

    def loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        return compute_loss(recipe.objective, outputs.logits, labels, statistics=False).loss

    trainer = Trainer(
        prepared.model,
        training_arguments(recipe, folder / "trainer"),
        train_dataset=tables.train,
        data_collator=tables.train_collator,
        processing_class=tables.processor,
        compute_loss_func=loss,
        optimizer_cls_and_kwargs=optimizer_choice(recipe.training),
    )
    trainer.pop_callback(PrinterCallback)

    def evaluate() -> None:
        for split, table in tables.items():
            if split != "train":
                evaluate_model(trainer.model, table, tables.eval_collators[split], recipe.objective,
                               batch_size=trainer.args.per_device_eval_batch_size, device=trainer.args.device)  # fmt: skip

    trainer.add_callback(PlainEvaluation(evaluate))
    trainer.train()


if __name__ == "__main__":
    main()
