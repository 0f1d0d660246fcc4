"""What a grid will cost, before anything is written: parameters, steps, disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_zoo.building import REFUSALS, first_line, num_parameters
from hf_zoo.errors import ModelError
from hf_zoo.evaluation import evaluate_model
from hf_zoo.recipe.grid import MemberPlan, canonical
from hf_zoo.recipe.schema import TrainRecipe
from hf_zoo.training.arguments import training_arguments
from hf_zoo.training.callbacks import score_of
from hf_zoo.training.preparing import Prepared, prepare
from hf_zoo.training.snapshots import snapshot_steps

BYTES_A_WEIGHT = 4
# Adam keeps two moments, SGD one, beside the weights of the checkpoint to resume from.
MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}
REHEARSED = 2  # samples; contrastive learning compares at least two
# What does not change the model's shape, the data or how often is saved.
IRRELEVANT = ("seed", "seeds", "augmentation", "name", "description", "task")


@dataclass(frozen=True)
class MemberEstimate:
    """The cost of one member.

    Attributes:
        num_parameters: Parameters, tied ones once.
        num_saved: Weights in a snapshot: the adapter's alone where there is one.
        num_steps: Optimizer steps.
        num_snapshots: Snapshots kept.
        num_bytes: Bytes that stay on disk.
        num_resume_bytes: Bytes of the checkpoint to resume from, which lies there while the member is trained.
    """

    num_parameters: int
    num_saved: int
    num_steps: int
    num_snapshots: int
    num_bytes: int
    num_resume_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """The cost of several members.

    Attributes:
        members: Each member's name -> its cost.
    """

    members: dict[str, MemberEstimate]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk at the most: one member is trained at a time."""
        members = self.members.values()
        return sum(m.num_bytes for m in members) + max((m.num_resume_bytes for m in members), default=0)


def estimate(plans: Sequence[MemberPlan], num_processes: int = 1) -> Estimate:
    """Estimate what members cost, building each different model once, which also checks data, parents and shapes.

    Args:
        plans: The members.
        num_processes: Processes that share a member's batches.

    Raises:
        ZooError: If data, parent and model of any member do not fit together.
    """
    known: dict[str, MemberEstimate] = {}
    members = {}
    for plan in plans:
        key = _shape_key(plan.recipe)
        if key not in known:
            known[key] = _estimate_member(plan.recipe, num_processes)
        members[plan.name] = known[key]
    return Estimate(members)


def rehearse(recipe: TrainRecipe, prepared: Prepared) -> None:
    """Measure the untrained network on two samples, to meet now what a training would meet after its first files.

    Args:
        recipe: The member's own recipe.
        prepared: Its data and model.

    Raises:
        ModelError: If the network cannot read the samples.
        RecipeError: If the best epoch is chosen by a metric there is not.
    """
    tables = dict(prepared.tables.items())
    split = "validation" if "validation" in tables else "train"
    try:
        metrics = evaluate_model(
            prepared.model,
            tables[split],
            prepared.tables.eval_collators[split],
            recipe.objective,
            batch_size=REHEARSED,
            device="cpu",
            num_samples=REHEARSED,
        )
    except REFUSALS as error:
        kind = recipe.model.type or type(prepared.model).__name__
        raise ModelError(
            f"model: {kind} cannot read the samples of {recipe.data.path}: {first_line(error)}. Change model.config, "
            "or data.image_size where they are images"
        ) from error
    if recipe.snapshots.best is not None:
        score_of(recipe.snapshots.best, {f"{split}_{name}": value for name, value in metrics.items()})


def _shape_key(recipe: TrainRecipe) -> str:
    content = {key: value for key, value in canonical(recipe).items() if key not in IRRELEVANT}
    content.get("model", {}).pop("init", None)
    training = content.get("training", {})
    kept = ("epochs", "max_steps", "batch_size", "accumulation", "optimizer", "arguments")
    content["training"] = {key: value for key, value in training.items() if key in kept}
    return repr(content)


def _estimate_member(recipe: TrainRecipe, num_processes: int) -> MemberEstimate:
    training_arguments(recipe, folder=None)
    prepared = prepare(recipe)
    rehearse(recipe, prepared)
    spec = recipe.training
    batches = math.ceil(len(prepared.tables.train) / (spec.batch_size * num_processes))
    steps_per_epoch = math.ceil(batches / spec.accumulation)
    num_steps = spec.max_steps or steps_per_epoch * spec.epochs
    scheduled = len(snapshot_steps(recipe.snapshots, num_steps, steps_per_epoch))
    kept = min(scheduled, recipe.snapshots.keep_last or scheduled) + (recipe.snapshots.best is not None)
    total = num_parameters(prepared.model)
    trainable = sum(math.prod(p.shape) for p in prepared.model.parameters() if p.requires_grad)
    saved = trainable if recipe.model.adapter is not None else total
    weights = saved * BYTES_A_WEIGHT
    checkpoint = weights + trainable * BYTES_A_WEIGHT * MOMENTS[spec.optimizer]
    # The root holds the weights once more. A checkpoint goes when the next one is whole: for a moment there are two.
    return MemberEstimate(total, saved, num_steps, kept, weights * (kept + 1), 2 * checkpoint)
