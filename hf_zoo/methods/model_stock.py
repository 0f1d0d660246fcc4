"""The point between the base and the members' mean that lies nearest the centre of all such members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_zoo.geometry import Vectors, cosines, gram_matrices, mix, note
from hf_zoo.inputs import MemberTensors
from hf_zoo.methods.base import ElementwiseMethod, Need, Paper


@dataclass(frozen=True, kw_only=True)
class ModelStock(ElementwiseMethod):
    """Pull the members' mean towards the base, as far as the angle between their task vectors says, tensor by tensor.

    Jang et al. (2024), in the form for any number of members: t mean + (1 - t) base with the ratio
    t = K cos(theta) / (1 + (K - 1) cos(theta)), cos(theta) the mean cosine over all pairs of task vectors. The report
    holds every tensor's ratio, as `ratios`; the mean over its rows where these have their own.

    The paper derives t for task vectors that share a direction, cos(theta) >= 0. Pairs at more than a right angle
    estimate a shared part of none, t = 0; the bare formula would leave the segment on the base's side, without bound
    as the cosine nears -1 / (K - 1). mergekit's `model_stock` does that: `clip: false` gives its numbers, for whole
    tensors and rows of matrices alike.

    Attributes:
        vectors: What has a ratio of its own: the whole `tensor` as in the paper's method, or each of its `rows`
            (mergekit's `filter_wise`; a kernel of a convolution is laid out as outputs and everything else).
        clip: Whether the ratio is kept from falling below 0.
    """

    paper: ClassVar[Paper] = Paper(
        "Model Stock: All we need is just a few fine-tuned models",
        "Jang et al.",
        2024,
        "https://arxiv.org/abs/2403.19522",
    )
    notes: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    arity: ClassVar[tuple[int, int | None]] = (2, None)
    surveys: ClassVar[bool] = True

    vectors: Vectors = "tensor"
    clip: bool = True

    def survey(self, tensors: MemberTensors, overview: None) -> Tensor:
        """Return the members' factors for each vector, (V, K): the ratio divided by K."""
        cosines_VKK = cosines(gram_matrices(tensors, task_vectors=True, vectors=self.vectors))
        count = len(tensors)
        pairs = torch.triu_indices(count, count, 1)
        cosine_V = cosines_VKK[:, pairs[0], pairs[1]].mean(1)
        below_V = 1 + (count - 1) * cosine_V
        # Opposing task vectors cancel out: there is no finite ratio, and the mean is the base or close to it.
        ratio_V = torch.where(below_V.abs() < 1e-6, 0.0, count * cosine_V / below_V)
        if self.clip:
            ratio_V = ratio_V.clamp(min=0)
        note(tensors.inputs, "ratios", tensors.name, float(ratio_V.mean()) if len(ratio_V) else 0.0)
        return (ratio_V / count)[:, None].expand(-1, count)

    def blend(self, pieces: MemberTensors, survey: Tensor) -> Tensor:
        """Return the base plus the ratio times the mean task vector."""
        return mix(pieces, survey, task_vectors=True, vectors=self.vectors)
