"""Soups grown or pruned one member at a time, as long as a held-out score rises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_zoo.inputs import MergeInputs
from hf_zoo.means import completed, mean_of
from hf_zoo.methods.base import Method, Need, Paper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GreedySoup(Method):
    """Average the members that raise a held-out score, tried from the best to the worst.

    Recipe 1 of Wortsman et al. (2022). The paper accepts a member that leaves the score as it is; here, as in the
    authors' published code, the score must rise, unless `accept_equal` is set. The score decides on validation data,
    so the soup is never worse there than its best member.

    Attributes:
        order: Try members from the best to the worst (`score`), as they are given, or in a random order.
        start: `best` starts from the first member and adds; `all` starts from everybody's mean and drops, from the
            worst to the best.
        accept_equal: Also take a step that leaves the score as it is.
    """

    paper: ClassVar[Paper] = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        "Wortsman et al.",
        2022,
        "https://arxiv.org/abs/2203.05482",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SCORE})

    order: Literal["score", "given", "random"] = "score"
    start: Literal["best", "all"] = "best"
    accept_equal: bool = False

    def merge(self, inputs: MergeInputs) -> Iterator[tuple[str, Tensor]]:
        """Choose the members, then give their mean; `inputs.report` says who was chosen and why."""
        self.check(inputs)
        accepted = self.chosen(inputs, lambda: self._choose(inputs))
        return iter(mean_of([inputs.members[index] for index in accepted], "soup", inputs.layout).items())

    def _choose(self, inputs: MergeInputs) -> list[int]:
        """Return the places of the members that were taken, and report on it."""
        names = [member.source for member in inputs.members]
        alone = [score_of(inputs, [index]) for index in range(len(names))]
        order = self._order(alone, inputs)
        accepted, score, steps = greedy_choice(
            order, lambda chosen: score_of(inputs, chosen), alone, self.start, self.accept_equal
        )
        inputs.report.update({
            "scores": dict(zip(names, alone, strict=True)),
            "order": [names[index] for index in order],
            "steps": [{"member": names[index], "score": value, "accepted": kept} for index, value, kept in steps],
            "accepted": [names[index] for index in accepted],
            "score": score,
        })
        logger.info("greedy soup: %d of %d members, score %.4f", len(accepted), len(names), score)
        return accepted

    def _order(self, alone: Sequence[float], inputs: MergeInputs) -> list[int]:
        if self.order == "random":
            return torch.randperm(len(alone), generator=inputs.generator("greedy_soup")).tolist()
        if self.order == "score":
            return sorted(range(len(alone)), key=lambda index: -alone[index])
        return list(range(len(alone)))


def score_of(inputs: MergeInputs, chosen: Sequence[int]) -> float:
    """Return the held-out score of some members' mean, which is computed tensor by tensor."""
    assert inputs.score is not None
    soup = mean_of([inputs.members[index] for index in chosen], "soup", inputs.layout)
    return inputs.score(completed(soup, inputs))


def greedy_choice(
    order: Sequence[int],
    score: Callable[[list[int]], float],
    alone: Sequence[float],
    start: Literal["best", "all"] = "best",
    accept_equal: bool = False,
) -> tuple[list[int], float, list[tuple[int, float, bool]]]:
    """Choose members one at a time.

    Args:
        order: Members in the order they are tried when adding; dropping goes the other way round.
        score: Returns the score of a choice of members, larger is better.
        alone: Score of each member alone.
        start: `best` starts from the first of the order and adds, `all` starts from all and drops.
        accept_equal: Also take a step that leaves the score as it is.

    Returns:
        The chosen members in the order's order, their score, and every step tried: member, score, whether taken.
    """
    steps: list[tuple[int, float, bool]] = []
    if start == "best":
        accepted, best, tried = [order[0]], alone[order[0]], list(order[1:])
    else:
        accepted, tried = list(order), list(reversed(order))
        best = score(accepted) if len(accepted) > 1 else alone[order[0]]
    for index in tried:
        candidate = [*accepted, index] if start == "best" else [kept for kept in accepted if kept != index]
        if not candidate:
            break
        value = score(candidate) if len(candidate) > 1 else alone[candidate[0]]
        taken = value > best or (accept_equal and value == best)
        steps.append((index, value, taken))
        if taken:
            accepted, best = candidate, value
    return accepted, best, steps
