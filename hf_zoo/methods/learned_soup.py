"""Soups whose mixing coefficients are learned by gradient on held-out data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.learning import Mixture, check_learned, check_trials, draw_batches, num_batches, report_coefficients
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper

if TYPE_CHECKING:
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

Coefficients = Mapping[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class LearnedSoup(ElementwiseMethod):
    """Average the members with coefficients, one a tensor and member, that lower the loss on held-out data.

    Wortsman et al. (2022), appendix I: minimise the loss of `beta f(x; sum_k alpha_k theta_k)` over the coefficients
    alpha, a softmax over members for every tensor, and the temperature beta, by AdamW on validation data. Everything
    starts from the plain average with beta = 1. Beta only makes the loss honest about confidence: it is reported and
    not part of the merged weights. It is learned as an exponential: a negative one would prefer the wrong answers.
    With several tasks their losses are added and each has a beta of its own.

    All members are held in memory, in float32, while the coefficients are learned; that is in the nature of the
    method. Buffers such as running statistics get the members' mean. Tensors that a rule has merged otherwise are the
    members' mean meanwhile.

    Attributes:
        granularity: Coefficients for every `tensor` (the paper's "by layer"), or the same for the whole `model`.
        learning_rate: Of AdamW; without decay.
        num_epochs: Passes over the validation data, of the largest task where there are several.
        batch_size: Samples of each task a step.
    """

    paper: ClassVar[Paper] = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        "Wortsman et al.",
        2022,
        "https://arxiv.org/abs/2203.05482",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.DATA})

    granularity: Literal["tensor", "model"] = "tensor"
    learning_rate: float = 0.05
    num_epochs: int = 5
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < float("inf"):
            raise MergeError(f"learned_soup: learning_rate must be 0 or more and finite, got {self.learning_rate}")
        if self.num_epochs < 0 or self.batch_size < 1:
            raise MergeError(
                "learned_soup: num_epochs must be 0 or more and batch_size 1 or more, got "
                f"{self.num_epochs} and {self.batch_size}"
            )

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse data without a validation split.

        Raises:
            MergeError: If a task has none.
        """
        super().check(inputs)
        check_trials(inputs)

    def overview(self, inputs: MergeInputs) -> Coefficients:
        """Learn every tensor's coefficients; `inputs.report` says what they are and what they brought."""
        return self.chosen(inputs, lambda: self._learn(inputs))

    def blend(self, pieces: MemberTensors, survey: Coefficients) -> Tensor:
        """Return the members' weighted mean; tensors that nothing was learned about get the plain one."""
        return weighted_mean(pieces, survey.get(pieces.name))

    @torch.enable_grad()
    def _learn(self, inputs: MergeInputs) -> Coefficients:
        mixture = Mixture.of_members(inputs)
        rows = len(mixture.names) if self.granularity == "tensor" else 1
        raw_GK = torch.zeros(rows, mixture.num_members, device=mixture.device, requires_grad=True)
        log_betas = torch.zeros(len(mixture.trials), device=mixture.device, requires_grad=True)
        place = {trial.task: index for index, trial in enumerate(mixture.trials)}

        def loss(trial: Trial, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            return trial.loss(log_betas[place[trial.task]].exp() * logits, batch.get("labels"))

        before = mixture.evaluate(raw_GK.softmax(1), self.batch_size, loss)
        optimizer = torch.optim.AdamW([raw_GK, log_betas], lr=self.learning_rate, weight_decay=0)
        batches = draw_batches(inputs, self.batch_size, "learned_soup")
        for _ in range(self.num_epochs * num_batches(inputs, self.batch_size)):
            optimizer.zero_grad()
            mixture.backward(raw_GK.softmax(1), next(batches), loss)
            optimizer.step()
        after = mixture.evaluate(raw_GK.softmax(1), self.batch_size, loss)
        check_learned(torch.cat([before, after]), "learned_soup")
        coefficients = mixture.by_name(raw_GK.softmax(1))
        tasks = [trial.task for trial in mixture.trials]
        inputs.report["validation loss of the average"] = dict(zip(tasks, before.tolist(), strict=True))
        inputs.report["validation loss of the soup"] = dict(zip(tasks, after.tolist(), strict=True))
        inputs.report["beta"] = dict(zip(tasks, log_betas.exp().tolist(), strict=True))
        report_coefficients(inputs, coefficients)
        logger.info("learned soup: validation loss %.4f, of the average %.4f", after.sum(), before.sum())
        return coefficients
