"""RegMean block by block, on what the merged blocks before hand on."""

# K = members, I = inputs of a linear layer, O = its outputs, R = rows it reads

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs
from hf_zoo.learning import Mixture, check_trials
from hf_zoo.linear_layers import linear_layers, watching
from hf_zoo.means import weighted_mean
from hf_zoo.methods.base import Need, Paper, TensorwiseMethod, per_member
from hf_zoo.places import Places
from hf_zoo.regression import Regression, require_regression
from hf_zoo.shards import is_finite

if TYPE_CHECKING:
    from hf_zoo.functional import Network
    from hf_zoo.trials import Trial

logger = logging.getLogger(__name__)

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class RegMeanPlus(TensorwiseMethod):
    """Merge the linear layers block by block, each into the one nearest to all members' answers to merged features.

    RegMean++, Nguyen et al. (2025): the solution is that of RegMean, `W = (sum_i W_i G_i) (sum_i G_i)^-1`, but the
    Gram matrices are taken where the merge will read: what enters block l is what the merged blocks before l make of
    member i's samples, and inside the block it is passed on by member i's own layers. All that is no linear layer's
    weight is averaged beforehand: embeddings, biases, norms, an output layer tied to the embeddings, and weights that
    are split or joined on disk. A linear layer outside of all blocks counts as a block.

    Every member reads the validation samples of its own task, of all tasks where it is not known; labels are unread.
    All members, their merge and the samples are held in memory, the weights in float32, besides the Gram matrices of
    one block. With B blocks a member's samples pass B times through the network, each time up to the block in turn.
    Tensors that a rule has merged otherwise are the members' mean meanwhile.

    Attributes:
        off_diagonal: Factor of the off-diagonals of every Gram matrix, the paper's alpha, in [0, 1]; the value is that
            of the authors' code.
        weights: One per member, none negative, their sum positive: how much its answers count. Null counts all alike.
        num_examples: Samples a task at most, drawn at random; null takes all. The authors use 256.
        batch_size: Samples a forward pass.
    """

    paper: ClassVar[Paper] = Paper(
        "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
        "Nguyen et al.",
        2025,
        "https://arxiv.org/abs/2508.03121",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.DATA})

    off_diagonal: float = 0.95
    weights: tuple[float, ...] | None = None
    num_examples: int | None = 256
    batch_size: int = 32

    def __post_init__(self) -> None:
        require_regression(self.off_diagonal, self.weights)
        if self.batch_size < 1 or (self.num_examples is not None and self.num_examples < 1):
            raise MergeError(
                "regmean_plus: num_examples and batch_size must be 1 or more, got "
                f"{self.num_examples} and {self.batch_size}"
            )

    def check(self, inputs: MergeInputs) -> None:
        """Also refuse data without a validation split and a wrong number of weights.

        Raises:
            MergeError: If a task has no validation split, or there is not one weight per member.
        """
        super().check(inputs)
        per_member(self.weights or 1.0, inputs, "regmean_plus: weights")
        check_trials(inputs)

    def overview(self, inputs: MergeInputs) -> dict[str, Tensor]:
        """Return the weights that were merged by regression; the report says how many there are, and how many not."""
        weights = per_member(self.weights or 1.0, inputs, "regmean_plus: weights")
        mixture = Mixture.of_members(inputs)
        batches = [self._batches(trial, inputs) for trial in mixture.trials]
        own = [trials_of(index, inputs) for index in range(len(weights))]
        with torch.no_grad():
            shares_1K = torch.tensor([weights], device=mixture.device) / sum(weights)
            network = _Blockwise(mixture, batches, mixture.tensors(shares_1K), inputs)
            for block in network.blocks:
                solved = self._solved(network, block, own, weights, inputs)
                network.merged.update(solved)
                logger.info("regmean_plus: %d layers of %s", len(solved), block)
        found = {disk: network.merged[name].cpu() for name, disk in network.solvable.items()}
        inputs.report["regression"] = {
            "solved": len(found),
            "averaged": len(list(inputs.floating())) - len(found),
            "blocks": len(network.blocks),
            "samples": {t.task: sum(map(_size, b)) for t, b in zip(mixture.trials, batches, strict=True)},
        }
        return found

    def combine(self, tensors: MemberTensors, overview: Mapping[str, Tensor]) -> Tensor:
        """Return what the regression came to, or the mean for a tensor it is not about."""
        merged = overview.get(tensors.name)
        return weighted_mean(tensors, self.weights) if merged is None else merged

    def _batches(self, trial: Trial, inputs: MergeInputs) -> Batches:
        """Return the samples of a task, the same each time."""
        count = trial.num_validation
        if self.num_examples is None or self.num_examples >= count:
            return list(trial.batches(self.batch_size))
        found, left = [], self.num_examples
        for batch in trial.batches(self.batch_size, inputs.generator("regmean_plus", trial.task)):
            found.append({name: value[:left] for name, value in batch.items()})
            left -= _size(found[-1])
            if left <= 0:
                break
        return found

    def _solved(
        self,
        network: _Blockwise,
        block: Hashable,
        own: Sequence[Sequence[int]],
        weights: Sequence[float],
        inputs: MergeInputs,
    ) -> dict[str, Tensor]:
        """Return the merged weights of a block, by their names in modules."""
        regressions = {name: Regression(self.off_diagonal) for name in network.layers_of(block)}
        for index, (trials, weight) in enumerate(zip(own, weights, strict=True)):
            for name, gram_II in network.grams(block, index, trials).items():
                if not is_finite(gram_II):
                    raise MergeError(
                        f"regmean_plus: what {inputs.members[index].source} hands on to {name} is not finite: look "
                        "for samples it cannot read, or leave it out"
                    )
                regressions[name].add(network.matrix(name, network.mixture.vectors[name][index]), gram_II, weight)
        return {
            name: network.matrix(name, regression.solution()).float().contiguous()
            for name, regression in regressions.items()
        }


class _Blockwise:
    """A network that is merged block by block.

    Args:
        mixture: The members, in memory.
        batches: The samples of every trial.
        merged: What the merge is so far, under the modules' names: the mean, to begin with.
        inputs: The merge's inputs.
    """

    def __init__(
        self, mixture: Mixture, batches: Sequence[Batches], merged: dict[str, Tensor], inputs: MergeInputs
    ) -> None:
        self.mixture = mixture
        self.batches = batches
        self.merged = merged
        self._places = Places(mixture.modules, lambda: list(mixture.modules), lambda: ())
        self._layers = [_layers(network) for network in mixture.networks]
        self.axes = {name: axis for layers in self._layers for name, axis in layers.values()}
        disk = {name: self._on_disk(name, inputs) for name in self.axes}
        self.solvable = {name: there for name, there in disk.items() if there is not None and name in self._called}

    @cached_property
    def blocks(self) -> list[Hashable]:
        """The blocks that hold layers to be merged, in the order they are called."""
        return list(dict.fromkeys(self._block(name) for name in self._called if name in self.solvable))

    def layers_of(self, block: Hashable) -> list[str]:
        """Return the layers of a block that are to be merged, by the names of their weights."""
        return [name for name in self.solvable if self._block(name) == block]

    def matrix(self, name: str, weight: Tensor) -> Tensor:
        """Return a layer's weight as (O, I), or such a matrix as its weight."""
        return weight.T if self.axes[name] == 0 else weight

    def grams(self, block: Hashable, index: int, trials: Sequence[int]) -> dict[str, Tensor]:
        """Return the mean of x x^T over the rows a block's layers read in a member's block behind the merged ones.

        Args:
            block: The block.
            index: The member.
            trials: Places of its tasks among the trials.
        """
        tensors = {
            name: self.mixture.vectors[name][index] if self._block(name) == block else merged
            for name, merged in self.merged.items()
        }
        sizes = {name: self.merged[name].shape[self.axes[name]] for name in self.layers_of(block)}
        sums = {name: self.merged[name].new_zeros(size, size) for name, size in sizes.items()}
        rows = dict.fromkeys(sums, 0)
        for place in trials:
            layers, end = self._layers[place], self._end(place, block)
            watched = [path for path, (name, _) in layers.items() if name in sums or name == end]

            def see(path: str, x_RI: Tensor, layers: Mapping = layers, end: str | None = end) -> None:
                name = layers[path][0]
                if name == end:
                    raise _BehindTheBlockError
                sums[name].addmm_(x_RI.T, x_RI)
                rows[name] += len(x_RI)

            network = self.mixture.networks[place]
            for batch in self.batches[place]:
                with (
                    suppress(_BehindTheBlockError),
                    watching(network.model, watched, see, batch.get("attention_mask")),
                ):
                    network(tensors, batch)
        return {name: total / max(rows[name], 1) for name, total in sums.items()}

    @cached_property
    def _traces(self) -> list[list[str]]:
        """For every trial the layers in the order they are called, by the names of their weights."""
        return [list(self._trace(place)) for place in range(len(self.batches))]

    @cached_property
    def _called(self) -> list[str]:
        return list(dict.fromkeys(name for trace in self._traces for name in trace))

    def _trace(self, place: int) -> Iterator[str]:
        called: list[str] = []
        layers, network = self._layers[place], self.mixture.networks[place]
        with watching(network.model, layers, lambda path, x_RI: called.append(path)):
            network(self.merged, self.batches[place][0])
        return (layers[path][0] for path in called)

    def _end(self, place: int, block: Hashable) -> str | None:
        """Return the layer at whose call a block is over, null where none is called for the first time just then."""
        trace = self._traces[place]
        last = max((i for i, name in enumerate(trace) if self._block(name) == block), default=len(trace))
        following = trace[last + 1 : last + 2]
        return following[0] if following and following[0] not in trace[: last + 1] else None

    def _block(self, name: str) -> Hashable:
        """Return which block a tensor is in; one outside of all counts to its module."""
        found = self._places.blocks.get(name)
        return name.rpartition(".")[0] if found is None else f"{found.stack}{found.index}"

    def _on_disk(self, name: str, inputs: MergeInputs) -> str | None:
        """Return a weight's name on disk; null where the merge does not make it, or it is another tensor there."""
        place = self.mixture.modules[name]
        alone = list(self.mixture.modules.values()).count(place) == 1
        names = self.mixture.names[place]
        if not alone or len(names) != 1 or inputs.layout[names[0]].shape != self.merged[name].shape:
            return None
        return names[0]


class _BehindTheBlockError(Exception):
    """What is to be seen of a batch was seen."""


def trials_of(index: int, inputs: MergeInputs) -> list[int]:
    """Return whose samples a member reads: the places of its own task's trials.

    Args:
        index: The member.
        inputs: The merge's inputs, with trials.

    Returns:
        Trials of its own task; where none is known, those it can be measured on; where it is of none, all.
    """
    source, trials = inputs.members[index].source, inputs.trials or ()
    own, listed = [], []
    for place, trial in enumerate(trials):
        found = [one for one in trial.members if one.reader.source == source]
        listed += [place] * bool(found)
        own += [place] * any(one.task == trial.task for one in found)
    return own or listed or list(range(len(trials)))


def _layers(network: Network) -> dict[str, tuple[str, int]]:
    """Return path in a network -> the name its weight is handed in under, and which axis runs over the inputs.

    Layers whose weight something else uses too, such as a table of embeddings, are left out.
    """
    model = network.model
    given = {own: name for name, own in network.names.items()}
    axes = linear_layers(model)
    uses: dict[int, list[tuple[str, str]]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        path, _, name = full.rpartition(".")
        uses.setdefault(id(parameter), []).append((path, name))
    found: dict[str, tuple[str, int]] = {}
    for places in uses.values():
        handed_in = [given[f"{path}.{name}"] for path, name in places if f"{path}.{name}" in given]
        linear = all(name == "weight" and path in axes for path, name in places)
        if handed_in and linear and len({axes[path] for path, _ in places}) == 1:
            modules = {id(model.get_submodule(path)): path for path, _ in places}
            found |= {path: (handed_in[0], axes[path]) for path in modules.values()}
    return found


def _size(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
