"""Whether models come from one parent: read off their manifests, else judged by the directions of their weights.

Models fine-tuned from one parent stay close to it: their weight matrices point in nearly the same direction (cosines
of 0.9 and more). Models trained from different random weights are as good as orthogonal, and their mean is a model of
neither. What is measured is a sample of the large matrices, a few megabytes a model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.ingredients import Ingredient
from hf_zoo.inputs import PIECE_ENTRIES
from hf_zoo.shards import TensorInfo

logger = logging.getLogger(__name__)

# Between fine-tuned models and unrelated ones lies a wide gap; models trained long from one early parent lie in it.
RELATED_COSINE = 0.5
NUM_SAMPLED = 16


@dataclass(frozen=True)
class Kinship:
    """How near models are to one another.

    Attributes:
        cosines: Pair of names -> cosine of their weights, over the sampled matrices.
        parents: Name -> the weights (SHA-256) it was trained from, for those whose manifest says.
    """

    cosines: Mapping[tuple[str, str], float]
    parents: Mapping[str, str]

    @property
    def strangers(self) -> list[str]:
        """Sentences about pairs that do not seem to come from one model; nothing where all do."""
        far = [(pair, cosine) for pair, cosine in self.cosines.items() if cosine < RELATED_COSINE]
        told = []
        for (one, other), cosine in far:
            known = {self.parents.get(one), self.parents.get(other)}
            says = "their manifests name different parents, and " if len(known) == 2 and None not in known else ""
            told.append(f"{one} and {other}: {says}the cosine of their weights is {cosine:.3f}")
        return told


def measure_kinship(
    ingredients: Sequence[Ingredient],
    readers: Sequence[CheckpointReader],
    layout: Mapping[str, TensorInfo],
    base: tuple[Ingredient, CheckpointReader] | None = None,
) -> Kinship:
    """Compare models pair by pair, or each with the base where there is one.

    Args:
        ingredients: The members.
        readers: Their tensors, alike.
        layout: The tensors to look at.
        base: The model task vectors are taken against.
    """
    names = _sampled(layout, readers if base is None else [*readers, base[1]])
    weights = [_sample(reader, names) for reader in readers]
    labels = [one.label for one in ingredients]
    named = list(zip(labels, weights, strict=True))
    if base is None:
        pairs = list(itertools.combinations(named, 2))
    else:
        root = (base[0].label, _sample(base[1], names))
        pairs = [(one, root) for one in named]
    cosines = {(a, b): _cosine(x, y) for (a, x), (b, y) in pairs} if names else {}
    parents = {
        one.label: parent.sha256
        for one in ingredients
        if one.manifest is not None
        for parent in one.manifest.parents
        if parent.role == "parent" and parent.sha256 is not None
    }
    return Kinship(cosines, parents)


def _sampled(layout: Mapping[str, TensorInfo], readers: Sequence[CheckpointReader]) -> list[str]:
    """Return the largest matrices all models have: vectors such as the gains of norms are alike in all networks."""
    matrices = [
        name
        for name, info in layout.items()
        if info.dtype.is_floating_point
        and len(info.shape) > 1
        and all(name in reader and reader.shape(name) == info.shape for reader in readers)
    ]
    return sorted(matrices, key=lambda name: (-layout[name].numel, name))[:NUM_SAMPLED]


def _sample(reader: CheckpointReader, names: Sequence[str]) -> Tensor:
    pieces = [reader.piece(name, 0, min(PIECE_ENTRIES, reader.layout[name].numel)) for name in names]
    return torch.cat([piece.reshape(-1).float() for piece in pieces]) if pieces else torch.zeros(0)


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else 1.0
