"""Ensembles of a task's members, the baselines a merge is compared with: they cost a pass of every member."""

# K = members, N = samples, C = classes

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_zoo.evaluation import evaluate_model, predict

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

CLASSIFYING = frozenset({"image_classification", "sequence_classification"})
VOTE = "majority vote"


def measure_ensembles(trial: Trial) -> list[dict[str, Any]]:
    """Measure the ensembles of a task's members: mean logits, mean probabilities and majority vote.

    Members are run one after another, and their logits kept.

    Args:
        trial: The task.

    Returns:
        One record an ensemble, like those of models: `task`, `model` and the metrics as `SPLIT_METRIC`. A vote has no
        loss, as it gives no probabilities, and no `top5`. None where there are fewer than two members, or the task is
        no classification of whole samples.
    """
    if len(trial.members) < 2 or trial.objective.name not in CLASSIFYING:
        return []
    logits: dict[str, list[Tensor]] = {split: [] for split in trial.tables}
    for member in trial.members:
        model = trial.model(member.reader).to(torch.device(trial.device))  # type: ignore[arg-type]
        for split, table in trial.tables.items():
            logits[split].append(predict(model, table, trial.collators[split], trial.batch_size, trial.device))
    records: dict[str, dict[str, Any]] = {}
    for split, table in trial.tables.items():
        for name, combined_NC in combine(torch.stack(logits[split])).items():
            record = records.setdefault(name, {"task": trial.task, "model": f"ensemble ({name})"})
            metrics = evaluate_model(
                _Answers(combined_NC), table, trial.collators[split], trial.objective, trial.batch_size, trial.device
            )
            told = metrics if name != VOTE else {m: v for m, v in metrics.items() if m not in ("loss", "top5")}
            record |= {f"{split}_{metric}": value for metric, value in told.items()}
    return list(records.values())


def combine(logits_KNC: Tensor) -> dict[str, Tensor]:
    """Return the logits of every ensemble.

    Args:
        logits_KNC: The members' logits, (K, N, C).

    Returns:
        Name -> logits (N, C). Those of the mean probabilities are their logarithms; those of the vote only rank the
        classes: by votes, and where votes are equal by mean probability.
    """
    probabilities_KNC = logits_KNC.softmax(-1)
    mean_NC = probabilities_KNC.mean(0)
    num_classes = logits_KNC.shape[-1]
    votes_NC = nn.functional.one_hot(logits_KNC.argmax(-1), num_classes).sum(0)
    return {
        "mean logits": logits_KNC.mean(0),
        "mean probabilities": mean_NC.clamp(min=torch.finfo(mean_NC.dtype).tiny).log(),
        VOTE: votes_NC + mean_NC / 2,  # a probability never outweighs a vote
    }


class _Answers(nn.Module):
    """Give logits that are known already, batch by batch in the order of the samples."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.logits = logits_NC
        self.num_given = 0

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        """Return the next rows."""
        values = next(iter(batch.values()))
        rows = self.logits[self.num_given : self.num_given + len(values)]
        self.num_given += len(values)
        return SimpleNamespace(logits=rows.to(values.device))
