"""Whether models come from one parent: read off their manifests, else judged by the directions of their weights.

Models fine-tuned from one parent stay close to it: their weight matrices point in nearly the same direction (cosines
of 0.9 and more). Models trained from different random weights are as good as orthogonal, and their mean is a model of
neither. What is measured is a sample of the large matrices, half a megabyte a model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.ingredients import Ingredient, labels_of
from hf_zoo.inputs import MergeInputs
from hf_zoo.shards import TensorInfo
from hf_zoo.streaming import one_thread_an_operation

logger = logging.getLogger(__name__)

# Between fine-tuned models and unrelated ones lies a wide gap; models trained long from one early parent lie in it.
RELATED_COSINE = 0.5
NUM_SAMPLED = 16
SAMPLED_ENTRIES = 1 << 13  # of each matrix; unrelated models then have cosines of 0.00 +- 0.003
MAX_PAIRWISE = 8


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
        told = []
        for (one, other), cosine in self.cosines.items():
            parents = {self.parents.get(one), self.parents.get(other)}
            differ = len(parents) == 2 and None not in parents
            if differ or cosine < RELATED_COSINE:
                says = "their manifests name different parents, and " if differ else ""
                told.append(f"{one} and {other}: {says}the cosine of their weights is {cosine:.3f}")
        return told


def check_lineage(
    how: str,
    ingredients: Sequence[Ingredient],
    inputs: MergeInputs,
    base: Ingredient | None = None,
) -> None:
    """Warn, or refuse, when models do not seem to come from one; what was measured goes into the report.

    Args:
        how: `warn`, `refuse` or `ignore`.
        ingredients: The members.
        inputs: What is merged of them.
        base: The model task vectors are taken against.

    Raises:
        MergeError: If they do not, and that is to be refused; names the models and the cosines of their weights.
    """
    if how == "ignore" or len(ingredients) + (base is not None) < 2:
        return
    root = None if base is None or inputs.base is None else (base, inputs.base)
    kinship = measure_kinship(ingredients, inputs.members, inputs.layout, root)
    if kinship.cosines:
        inputs.report["smallest cosine of weights"] = round(min(kinship.cosines.values()), 4)
    if not kinship.strangers:
        return
    told = (
        f"these models do not seem to come from one ({'; '.join(kinship.strangers[:3])}): the merge of unrelated "
        "networks is as a rule worse than each of them. Align them first, or choose models with one parent"
    )
    if how == "refuse":
        raise MergeError(f"{told}, or set `lineage: warn`")
    logger.warning("%s", told)
    inputs.report["lineage"] = kinship.strangers


def measure_kinship(
    ingredients: Sequence[Ingredient],
    readers: Sequence[CheckpointReader],
    layout: Mapping[str, TensorInfo],
    base: tuple[Ingredient, CheckpointReader] | None = None,
) -> Kinship:
    """Compare models pair by pair, many of them each with the first, or each with the base where there is one.

    Args:
        ingredients: The members.
        readers: Their tensors, alike.
        layout: The tensors to look at.
        base: The model task vectors are taken against.
    """
    every = readers if base is None else [*readers, base[1]]
    names = _sampled(layout, every)
    labels = labels_of(ingredients if base is None else [*ingredients, base[0]])
    parents = {
        label: parent.sha256
        for label, one in zip(labels[: len(ingredients)], ingredients, strict=True)
        if one.manifest is not None
        for parent in one.manifest.parents
        if parent.role == "parent" and parent.sha256 is not None
    }
    if base is not None and parents:  # for its children, the base is the parent they name
        parents[labels[-1]] = base[0].sha256
    with one_thread_an_operation():
        directions = torch.stack([_direction(one, names) for one in every])
        table = (directions @ directions.T).tolist()
    count = len(ingredients)
    if base is not None:
        pairs = [(place, count) for place in range(count)]
    elif count <= MAX_PAIRWISE:
        pairs = list(itertools.combinations(range(count), 2))
    else:
        pairs = [(0, place) for place in range(1, count)]
    cosines = {(labels[one], labels[other]): table[one][other] for one, other in pairs} if names else {}
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


def _direction(reader: CheckpointReader, names: Sequence[str]) -> Tensor:
    """Return a model's sampled weights, of length one."""
    pieces = [reader.piece(name, 0, min(SAMPLED_ENTRIES, reader.layout[name].numel)) for name in names]
    sample = torch.cat([piece.reshape(-1).float() for piece in pieces]) if pieces else torch.zeros(1)
    return sample / sample.norm().clamp_min(torch.finfo(sample.dtype).tiny)
