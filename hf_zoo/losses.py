"""The losses of the objectives, as sums with their weights: any split of the samples adds up to the same mean."""

# N = images, D = embedding width, C = classes, V = vocabulary, B = samples, L = tokens of a sample

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_zoo.errors import ModelError
from hf_zoo.recipe.schema import ObjectiveSpec

IGNORED = -100


@dataclass(frozen=True)
class LossOutput:
    """A loss over some samples.

    Attributes:
        loss_sum: Sum of the loss over what it is averaged over, a float32 scalar that carries the gradient.
        weight: How many that were: samples, masked positions or anchors, a float32 scalar.
        statistics: Sums over the same, without gradient: `accuracy` for hard labels, `accuracy` of masked tokens,
            `top1`, `top5` and `mean_rank` for contrastive views. Divided by `weight` they are the metrics.
    """

    loss_sum: Tensor
    weight: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean loss, a scalar."""
        return self.loss_sum / self.weight.clamp(min=1)


def compute_loss(
    objective: ObjectiveSpec, logits: Tensor, labels: Tensor | None = None, statistics: bool = True
) -> LossOutput:
    """Compute an objective's loss of one batch.

    Args:
        objective: The objective; `contrastive` reads its temperature.
        logits: What the model returned as logits: (B, C), (B, L, V) for `masked_lm`, embeddings (2N, D) for
            `contrastive`. Any floating type; the loss is computed in float32 at least.
        labels: Class indices (B,) or soft targets (B, C); (B, L) with -100 where nothing is masked for `masked_lm`;
            ignored for `contrastive`.
        statistics: Whether to fill `statistics`; a training step that needs none saves their cost.

    Raises:
        ModelError: If labels are missing or do not fit the logits.
    """
    if objective.name == "contrastive":
        loss, ranks = nt_xent(logits, objective.temperature)
        weight = torch.tensor(float(len(logits)), device=logits.device)
        sums = {"top1": (ranks <= 1).sum(), "top5": (ranks <= 5).sum(), "mean_rank": ranks.sum()} if statistics else {}
        return LossOutput(loss * weight, weight, {name: value.to(loss.dtype) for name, value in sums.items()})
    if labels is None:
        raise ModelError(f"{objective.name} needs labels in its batches, and this one has none")
    if objective.name == "masked_lm":
        return masked_lm_loss(logits, labels, statistics)
    return cross_entropy(logits, labels, statistics)


def cross_entropy(logits: Tensor, labels: Tensor, statistics: bool = True) -> LossOutput:
    """Compute softmax cross-entropy against hard labels or soft targets.

    Args:
        logits: (B, C).
        labels: Class indices in [0, C), int64 (B,), or distributions over the classes, floating (B, C).
        statistics: Whether to count hits; soft targets have none.

    Raises:
        ModelError: If shapes disagree.
    """
    expected = logits.shape if labels.is_floating_point() else logits.shape[:1]
    if logits.ndim != 2 or labels.shape != expected:
        raise ModelError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    logits_BC = _widen(logits)
    weight = torch.tensor(float(len(logits)), device=logits.device)
    if labels.is_floating_point():
        loss_sum = -(labels * logits_BC.log_softmax(-1)).sum()
        return LossOutput(loss_sum, weight)
    loss_sum = F.cross_entropy(logits_BC, labels, reduction="sum")
    hits = {"accuracy": (logits_BC.detach().argmax(-1) == labels).sum().float()} if statistics else {}
    return LossOutput(loss_sum, weight, hits)


def masked_lm_loss(logits: Tensor, labels: Tensor, statistics: bool = True) -> LossOutput:
    """Compute cross-entropy over the masked positions alone.

    Args:
        logits: (B, L, V).
        labels: The original tokens at masked positions and -100 everywhere else, int64 (B, L).
        statistics: Whether to count hits.

    Raises:
        ModelError: If shapes disagree.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ModelError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    # Gathered first: the softmax over the vocabulary is the dearest step, and only every seventh position needs it.
    masked = labels != IGNORED
    logits_MV, labels_M = _widen(logits[masked]), labels[masked]
    loss_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum")
    hits = {"accuracy": (logits_MV.detach().argmax(-1) == labels_M).sum().float()} if statistics else {}
    return LossOutput(loss_sum, masked.sum().float(), hits)


def nt_xent(embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1).

    With s_ij the cosine of embeddings i and j divided by the temperature, and p(i) the other view of the same image,
    the loss of an anchor is -s_ip(i) + log sum_{j != i} exp s_ij, averaged over the 2N anchors.

    Args:
        embeddings: (2N, D), first the N images' first views, then their second views in the same order.
        temperature: Temperature, positive; the published zoos use 0.07.

    Returns:
        The mean loss, a scalar, and for each anchor the rank of its positive among the 2N - 1 others by cosine,
        1 for the first, (2N,). Ties count against the positive: embeddings that collapsed to a point rank it last.

    Raises:
        ModelError: If the number of embeddings is odd, so that they cannot be pairs.
    """
    if embeddings.ndim != 2 or len(embeddings) % 2:
        raise ModelError(f"two views an image make an even number of embeddings, got shape {tuple(embeddings.shape)}")
    z_AD = F.normalize(_widen(embeddings), dim=-1)
    anchors = len(z_AD)
    positive_A = (torch.arange(anchors, device=z_AD.device) + anchors // 2) % anchors
    diagonal = torch.eye(anchors, dtype=torch.bool, device=z_AD.device)
    s_AA = (z_AD @ z_AD.T / temperature).masked_fill(diagonal, float("-inf"))
    loss = F.cross_entropy(s_AA, positive_A)
    with torch.no_grad():
        at_least_A = s_AA >= s_AA.gather(1, positive_A[:, None])
        ranks_A = at_least_A.sum(-1)  # the positive itself is one of them, the diagonal never is
    return loss, ranks_A


def _widen(tensor: Tensor) -> Tensor:
    """Return half precision as float32 and leave wider types alone."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
