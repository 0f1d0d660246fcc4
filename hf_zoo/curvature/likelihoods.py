"""What an objective says of a model's outputs: the directions whose squared gradients add up to a Fisher diagonal.

The Fisher information of an example is E_y[(d log p(y | x) / d theta)^2] = diag(J^T F J) with J the Jacobian of the
outputs and F the Fisher information of the output distribution in its own parameters. Any vectors a_1, a_2, ... with
sum_i a_i a_i^T = F (exactly, or in expectation over drawn labels) give it as sum_i (J^T a_i)^2: a backward pass each.
"""

# B = examples of a batch, P = predictions of an example (1, or its tokens), C = classes or vocabulary, D = targets

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_zoo.data.draws import Draws
from hf_zoo.errors import ModelError, nearest
from hf_zoo.losses import IGNORED

Kind = Literal["exact", "sampled", "empirical"]
# Objective -> how its outputs are distributed.
CLASSES, TOKENS, NEXT_TOKENS, GAUSSIAN = "classes", "tokens", "next tokens", "Gaussian"
LIKELIHOODS = {
    "image_classification": CLASSES,
    "sequence_classification": CLASSES,
    "masked_lm": TOKENS,
    "causal_lm": NEXT_TOKENS,
    "regression": GAUSSIAN,
}
MAX_EXACT_PASSES = 1000  # backward passes a batch; beyond it, exact expectations are a mistake rather than a wish


@dataclass(frozen=True)
class Estimator:
    """How the expectation over labels is taken.

    Attributes:
        kind: `exact` sums over all labels; `sampled` draws labels from the model's own distribution, which is
            unbiased; `empirical` takes the observed labels, which is another quantity: where the model is wrong it can
            be several times larger (Kunstner et al. 2019, arXiv:1905.12558).
        num_samples: Labels drawn for each prediction, for `sampled`.
        seed: Seed of the draws; an example's draws depend on the seed and its index alone.
    """

    kind: Kind = "exact"
    num_samples: int = 1
    seed: int = 0


def likelihood_of(objective: str) -> str:
    """Return how an objective's outputs are distributed.

    Raises:
        ModelError: If the objective has no likelihood (`contrastive`), or is unknown.
    """
    if objective == "contrastive":
        raise ModelError(
            "contrastive: its loss compares the images of a batch, so no example has a likelihood of its own and "
            "there is no Fisher information: fine-tune the member on a task first"
        )
    if objective not in LIKELIHOODS:
        raise ModelError(f"objective {objective!r}: expected one of {', '.join(LIKELIHOODS)}"
                         f"{nearest(objective, list(LIKELIHOODS))}")  # fmt: skip
    return LIKELIHOODS[objective]


def directions(
    objective: str,
    logits: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    estimator: Estimator,
    indices: np.ndarray,
) -> Iterator[Tensor]:
    """Yield the vectors whose pulled-back squares add up to the Fisher information of every example of a batch.

    Where an example is a sequence, its log-likelihood is the sum over its predicted tokens: tokens share their
    context, so the sequence is what is drawn independently, and a mean would weight a token by the length of its text.
    Given the context the tokens' scores are uncorrelated, hence the information of the sequence is the sum of
    theirs. The context of a causal model is the observed one (teacher forcing).

    Args:
        objective: A key of `LIKELIHOODS`.
        logits: The model's outputs: (B, C); (B, P, C) for tokens; (B, D), (B, 1) or (B,) for regression, the means of
            Gaussians of unit variance.
        labels: Class indices (B,); for tokens (B, P) with -100 where nothing is predicted, for `causal_lm` the
            tokens themselves; targets of regression. Classes and targets are needed by `empirical` alone.
        attention_mask: 1 at tokens and 0 at padding, (B, P): a `causal_lm` predicts no padding.
        estimator: How the expectation is taken.
        indices: What the draws of each example are a function of, (B,).

    Yields:
        Tensors of the logits' shape.

    Raises:
        ModelError: If labels are missing or do not fit, or an exact expectation needs too many passes.
    """
    likelihood = likelihood_of(objective)
    with torch.no_grad():
        logits = logits.detach()
        if likelihood == GAUSSIAN:
            yield from _gaussian(logits, labels, estimator, indices)
            return
        logits_BPC = logits[:, None] if likelihood == CLASSES else logits
        if logits_BPC.ndim != 3:
            raise ModelError(f"{objective}: outputs of shape {tuple(logits.shape)} are not of this objective")
        labels_BP, counted_BP = _labels(objective, likelihood, logits_BPC, labels, attention_mask, estimator)
        for direction_BPC in _categorical(logits_BPC.softmax(-1), labels_BP, counted_BP, estimator, indices):
            yield direction_BPC.reshape(logits.shape)


def class_factor(p: Tensor, column: int) -> Tensor:
    """Return a column of the Cholesky factor of diag(p) - p p^T, the Fisher information of a softmax in its logits.

    With s_k the sum of p_j over j >= k, column k is sqrt(p_k s_{k+1} / s_k) at k and -p_j sqrt(p_k / (s_k s_{k+1}))
    below; the last column vanishes, so C classes need C - 1 backward passes.

    Args:
        p: Probabilities, (..., C).
        column: In [0, C - 1).

    Returns:
        The column, (..., C).
    """
    tiny = torch.finfo(p.dtype).tiny
    rest = p[..., column + 1 :].sum(-1, keepdim=True)
    own = p[..., column : column + 1]
    total = own + rest
    factor = torch.zeros_like(p)
    factor[..., column : column + 1] = (own * (rest / total.clamp(min=tiny))).sqrt()
    scale = (own / total.clamp(min=tiny)).sqrt()
    # p_j / sqrt(s_{k+1}) with both small: a share of the rest times its root does not underflow.
    factor[..., column + 1 :] = -(p[..., column + 1 :] / rest.clamp(min=tiny)) * rest.sqrt() * scale
    return factor


def _labels(
    objective: str,
    likelihood: str,
    logits_BPC: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    estimator: Estimator,
) -> tuple[Tensor | None, Tensor]:
    """Return the observed label of every prediction, and which predictions count."""
    shape = logits_BPC.shape[:2]
    if likelihood == CLASSES:
        if estimator.kind == "empirical" and (labels is None or labels.shape != shape[:1]):
            came = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ModelError(f"{objective}: the empirical Fisher needs one class index an example, got {came}")
        counted_BP = torch.ones(shape, dtype=torch.bool, device=logits_BPC.device)
        return (labels[:, None] if estimator.kind == "empirical" and labels is not None else None), counted_BP
    if labels is None or labels.shape != shape:
        came = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ModelError(
            f"{objective}: expected labels of shape {tuple(shape)}, -100 where nothing counts, got {came}"
        )
    if likelihood == NEXT_TOKENS:  # the outputs at a token predict the next one
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        if attention_mask is not None:
            following = torch.cat([attention_mask[:, 1:], torch.zeros_like(attention_mask[:, :1])], 1)
            labels = labels.masked_fill(following == 0, IGNORED)
    return labels, labels != IGNORED


def _categorical(
    p_BPC: Tensor, labels_BP: Tensor | None, counted_BP: Tensor, estimator: Estimator, indices: np.ndarray
) -> Iterator[Tensor]:
    if estimator.kind == "exact":
        yield from _exact(p_BPC, counted_BP)
        return
    if estimator.kind == "empirical":
        assert labels_BP is not None, "_labels has seen to it"
        yield _score(p_BPC, labels_BP.clamp(min=0), counted_BP)
        return
    draws = Draws(estimator.seed, 0, indices)
    cumulative_BPC = p_BPC.double().cumsum(-1)
    for sample in range(estimator.num_samples):
        chance_BP = torch.from_numpy(draws.uniform(f"fisher/{sample}", p_BPC.shape[1])).to(p_BPC.device)
        # Scaled to where the cumulative sum really ends, which rounding leaves a little off 1.
        chance_BP1 = chance_BP[..., None] * cumulative_BPC[..., -1:]
        drawn_BP = torch.searchsorted(cumulative_BPC, chance_BP1, right=True)[..., 0].clamp(max=p_BPC.shape[-1] - 1)
        yield _score(p_BPC, drawn_BP, counted_BP) / math.sqrt(estimator.num_samples)


def _exact(p_BPC: Tensor, counted_BP: Tensor) -> Iterator[Tensor]:
    positions = torch.nonzero(counted_BP.any(0))[:, 0].tolist()
    passes = len(positions) * (p_BPC.shape[-1] - 1)
    if passes > MAX_EXACT_PASSES:
        raise ModelError(
            f"estimator exact: {len(positions)} predictions of {p_BPC.shape[-1]} classes need {passes:,} backward "
            f"passes a batch, more than {MAX_EXACT_PASSES:,}: use estimator=sampled with some num_samples"
        )
    for position in positions:
        for column in range(p_BPC.shape[-1] - 1):
            direction_BPC = torch.zeros_like(p_BPC)
            direction_BPC[:, position] = class_factor(p_BPC[:, position], column) * counted_BP[:, position, None]
            yield direction_BPC


def _score(p_BPC: Tensor, classes_BP: Tensor, counted_BP: Tensor) -> Tensor:
    """Return d log p(class) / d logits = onehot - p, and zero where a prediction does not count."""
    score_BPC = -p_BPC
    score_BPC.scatter_add_(-1, classes_BP[..., None], torch.ones_like(p_BPC[..., :1]))
    return score_BPC * counted_BP[..., None]


def _gaussian(means: Tensor, targets: Tensor | None, estimator: Estimator, indices: np.ndarray) -> Iterator[Tensor]:
    means_BD = means.reshape(len(means), -1)
    if estimator.kind == "exact":  # the Fisher information of the mean is the identity
        if means_BD.shape[1] > MAX_EXACT_PASSES:
            raise ModelError(f"estimator exact: {means_BD.shape[1]:,} outputs need a backward pass each, more than "
                             f"{MAX_EXACT_PASSES:,}: use estimator=sampled")  # fmt: skip
        for output in range(means_BD.shape[1]):
            direction_BD = torch.zeros_like(means_BD)
            direction_BD[:, output] = 1
            yield direction_BD.reshape(means.shape)
    elif estimator.kind == "empirical":
        if targets is None or targets.numel() != means.numel():
            came = "none" if targets is None else f"targets of shape {tuple(targets.shape)}"
            raise ModelError(f"regression: outputs of shape {tuple(means.shape)} need as many targets, got {came}")
        yield targets.reshape(means.shape).to(means.dtype) - means
    else:
        draws = Draws(estimator.seed, 0, indices)
        for sample in range(estimator.num_samples):
            chance_BD = torch.from_numpy(draws.uniform(f"fisher/{sample}", means_BD.shape[1]))
            noise_BD = torch.special.ndtri(chance_BD.clamp(min=2.0**-54))  # never 0, whose normal quantile is infinite
            noise_BD = noise_BD.to(means.device, means.dtype) / math.sqrt(estimator.num_samples)
            yield noise_BD.reshape(means.shape)
