"""Task vectors whose coefficients are learned, without labels, by making the merged model sure of its answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.learning import Mixture, check_learned, check_trials, draw_batches, report_coefficients
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper, per_member
from hf_zoo.task_vectors import require_finite, require_fractions, weighted_sum
from hf_zoo.trimming import least_kept, trim

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned:
    """What was learned of the whole models.

    Attributes:
        coefficients: Tensor -> one coefficient a member.
        thresholds: Least magnitude that is kept, one a member; null keeps all.
    """

    coefficients: Mapping[str, list[float]]
    thresholds: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class AdaMerging(ElementwiseMethod):
    """Add the members' task vectors to the base with coefficients that lower the entropy of the merge's predictions.

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l, Yang et al. (2024), equations 5 and 6: the coefficients, one a task
    or one a task and layer, minimise the sum over tasks of the mean entropy of the merged model's predictions, by Adam
    on samples without labels. As in the authors' code, a layer is one tensor, the coefficients start at 0.3, stay in
    [0, 1], and a step takes 16 samples of every task. The authors adapt on the test samples; here the validation
    split is used, its labels unread.

    Buffers such as running statistics are no part of a task vector: they get the members' mean. The base and all task
    vectors are held in memory, in float32, while the coefficients are learned; that is in the nature of the method.
    Tensors that a rule has merged otherwise are the members' mean meanwhile.

    Attributes:
        granularity: Coefficients for every `layer` and member, or for every member alone (`task`).
        initial: The coefficients to begin with.
        clamp: Keep the coefficients in [0, 1].
        density: AdaMerging++: before all, keep of every task vector the fraction of entries of largest magnitude and,
            of these, the ones that agree with the elected sign, as in TIES; the authors use 0.2. Null keeps all.
        learning_rate: Of Adam.
        num_steps: Steps of Adam.
        batch_size: Samples of each task a step.
    """

    paper: ClassVar[Paper] = Paper(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "Yang et al.",
        2024,
        "https://arxiv.org/abs/2310.02575",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE, Need.DATA})

    granularity: Literal["layer", "task"] = "layer"
    initial: float | tuple[float, ...] = 0.3
    clamp: bool = True
    density: float | None = None
    learning_rate: float = 0.001
    num_steps: int = 500
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_finite("adamerging", initial=self.initial, learning_rate=self.learning_rate)
        if self.density is not None:
            require_fractions("adamerging", density=self.density)
        if self.learning_rate < 0 or self.num_steps < 0 or self.batch_size < 1:
            raise MergeError(
                "adamerging: learning_rate and num_steps must be 0 or more and batch_size 1 or more, got "
                f"{self.learning_rate}, {self.num_steps} and {self.batch_size}"
            )

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse tasks that no entropy can be taken of.

        Raises:
            MergeError: If a task has no validation split, or no classes to be sure of.
        """
        super().check(inputs)
        per_member(self.initial, inputs, "adamerging: initial")
        check_trials(inputs)
        for trial in inputs.trials or ():
            if trial.objective.name == "contrastive":
                raise MergeError(
                    f"adamerging: {trial.task} was learned by contrast: its model gives embeddings and no predictions "
                    "to take the entropy of: choose another method"
                )

    def overview(self, inputs: MergeInputs) -> Learned:
        """Learn the coefficients; `inputs.report` says what they are and how far the entropy fell."""
        thresholds = self._thresholds(inputs)
        return Learned(self.chosen(inputs, lambda: self._learn(inputs, thresholds)), thresholds)

    def blend(self, pieces: MemberTensors, survey: Learned) -> Tensor:
        """Return the base plus the weighted task vectors; the members' mean of tensors nothing was learned about."""
        coefficients = survey.coefficients.get(pieces.name)
        if coefficients is None:
            return weighted_mean(pieces)
        return weighted_sum(_vectors(pieces, survey.thresholds), coefficients).add_(pieces.base)

    def _thresholds(self, inputs: MergeInputs) -> tuple[float, ...] | None:
        if self.density is None:
            return None
        return least_kept(list(inputs.floating()), (self.density,) * len(inputs.members))

    @torch.enable_grad()
    def _learn(self, inputs: MergeInputs, thresholds: tuple[float, ...] | None) -> Mapping[str, list[float]]:
        mixture = Mixture.of_task_vectors(inputs, lambda tensors: _vectors(tensors, thresholds))
        rows = len(mixture.names) if self.granularity == "layer" else 1
        initial_K = torch.tensor(per_member(self.initial, inputs, "adamerging: initial"), device=mixture.device)
        raw_GK = initial_K.repeat(rows, 1).requires_grad_()
        optimizer = torch.optim.Adam([raw_GK], lr=self.learning_rate)
        batches = draw_batches(inputs, self.batch_size, "adamerging")
        before = mixture.evaluate(self._inside(raw_GK), self.batch_size, _entropy)
        for _ in range(self.num_steps):
            optimizer.zero_grad()
            mixture.backward(self._inside(raw_GK), next(batches), _entropy)
            optimizer.step()
        after = mixture.evaluate(self._inside(raw_GK), self.batch_size, _entropy)
        check_learned(torch.cat([before, after]), "adamerging")
        coefficients = mixture.by_name(self._inside(raw_GK))
        tasks = [trial.task for trial in mixture.trials]
        inputs.report["entropy before"] = dict(zip(tasks, before.tolist(), strict=True))
        inputs.report["entropy after"] = dict(zip(tasks, after.tolist(), strict=True))
        report_coefficients(inputs, coefficients)
        logger.info("adamerging: entropy %.4f, before %.4f", after.sum(), before.sum())
        return coefficients

    def _inside(self, raw_GK: Tensor) -> Tensor:
        return raw_GK.clamp(0, 1) if self.clamp else raw_GK


def _vectors(tensors: MemberTensors, thresholds: Sequence[float] | None) -> list[Tensor]:
    """Return the members' task vectors, trimmed and freed of entries against the elected sign where asked for."""
    if thresholds is None:
        return list(tensors.task_vectors())
    trimmed = [trim(vector, least) for vector, least in zip(tensors.task_vectors(), thresholds, strict=True)]
    elected = torch.stack(trimmed).sum(0).sign_()
    return [vector.mul_(vector.sign() == elected) for vector in trimmed]


def _entropy(trial: Trial, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean entropy of a batch's predictions; of texts' tokens without the padding."""
    logs = logits.float().log_softmax(-1)
    entropies = -(logs.exp() * logs).sum(-1)
    if entropies.ndim > 1 and "attention_mask" in batch:
        entropies = entropies[batch["attention_mask"].bool()]
    return entropies.mean()
