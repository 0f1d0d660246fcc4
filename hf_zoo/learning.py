"""Coefficients of a mixture of members, learned by gradient on held-out data.

A mixture is `offset + sum_k c_k v_k`, tensor by tensor, where the v_k are the members or their task vectors. All of
them are held in memory, in float32, while coefficients are learned; the merge itself then streams.
"""

# K = members, G = groups of tensors that are mixed alike

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MemberTensors, MergeInputs

if TYPE_CHECKING:
    from hf_zoo.functional import Anatomy, Network
    from hf_zoo.trials import Trial

Vectors = Callable[[MemberTensors], Sequence[Tensor]]
Objective = Callable[["Trial", Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Members in memory, to be mixed and run under gradient.

    Attributes:
        names: Of each group: the names on disk that the merge makes from its coefficients; none for a group that does
            not depend on them, whose vectors are all the same.
        modules: Name in modules -> its group.
        vectors: Name in modules -> what is mixed, (K, *shape).
        offset: Name in modules -> what is added, (*shape); null for nothing.
        trials: The tasks.
        networks: The tasks' models.
    """

    names: tuple[tuple[str, ...], ...]
    modules: Mapping[str, int]
    vectors: Mapping[str, Tensor]
    offset: Mapping[str, Tensor] | None
    trials: tuple[Trial, ...]
    networks: tuple[Network, ...]

    @classmethod
    def of_members(cls, inputs: MergeInputs) -> Mixture:
        """Mix the members themselves; buffers and tensors this merge does not make are the members' mean.

        Args:
            inputs: The merge's inputs, with trials.
        """
        anatomy, trials = _anatomy(inputs)
        mixed = _trained(inputs, anatomy)
        vectors = _load(inputs, anatomy, mixed, list, trials[0].device, others=_mean)
        return cls._make(anatomy, mixed, vectors, None, trials)

    @classmethod
    def of_task_vectors(cls, inputs: MergeInputs, vectors: Vectors) -> Mixture:
        """Mix task vectors and add the base; buffers and tensors this merge does not make are the members' mean.

        Args:
            inputs: The merge's inputs, with trials and base.
            vectors: Returns the members' task vectors of a tensor, (*shape) each.
        """
        anatomy, trials = _anatomy(inputs)
        mixed = _trained(inputs, anatomy)
        device = trials[0].device
        loaded = _load(inputs, anatomy, mixed, vectors, device, others=_nothing)
        bases = _load(inputs, anatomy, mixed, lambda tensors: [tensors.base], device, others=_mean, count=1)
        return cls._make(anatomy, mixed, loaded, {name: base[0] for name, base in bases.items()}, trials)

    @classmethod
    def _make(
        cls,
        anatomy: Anatomy,
        mixed: frozenset[str],
        vectors: Mapping[str, Tensor],
        offset: Mapping[str, Tensor] | None,
        trials: tuple[Trial, ...],
    ) -> Mixture:
        names = tuple(tuple(name for name in group.on_disk if name in mixed) for group in anatomy.groups)
        modules = {name: place for place, group in enumerate(anatomy.groups) for name in group.modules}
        return cls(names, modules, vectors, offset, trials, tuple(trial.network(anatomy) for trial in trials))

    @property
    def num_members(self) -> int:
        """K."""
        return len(next(iter(self.vectors.values())))

    @property
    def device(self) -> str:
        """Where the vectors are."""
        return self.trials[0].device

    def tensors(self, coefficients_GK: Tensor) -> dict[str, Tensor]:
        """Return the mixture under the modules' names; gradients flow to the coefficients.

        Args:
            coefficients_GK: (G, K), or (1, K) for the same in all groups.
        """
        coefficients_GK = coefficients_GK.expand(len(self.names), -1)
        alike_K = coefficients_GK.new_full((self.num_members,), 1 / self.num_members)
        mixed = {}
        for name, place in self.modules.items():
            own_K = coefficients_GK[place] if self.names[place] else alike_K
            tensor = torch.tensordot(own_K, self.vectors[name], 1)
            mixed[name] = tensor if self.offset is None else self.offset[name] + tensor
        return mixed

    def by_name(self, coefficients_GK: Tensor) -> dict[str, list[float]]:
        """Return name on disk -> the members' coefficients, of the tensors the merge makes from them."""
        values = coefficients_GK.detach().cpu().double().expand(len(self.names), -1).tolist()
        return {name: own for names, own in zip(self.names, values, strict=True) for name in names}

    def backward(self, coefficients_GK: Tensor, batches: Sequence[Mapping[str, Tensor]], objective: Objective) -> None:
        """Add the gradient of the sum of all tasks' objectives, each on one batch, to the coefficients' own.

        Args:
            coefficients_GK: (G, K) or (1, K), with a graph to what is learned.
            batches: A batch a task.
            objective: Returns a scalar of a trial, its logits and its batch.
        """
        mixed = self.tensors(coefficients_GK)
        # The graph is cut at the weights, so that the activations of one task are held at a time.
        cut = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in mixed.items()}
        for trial, network, batch in zip(self.trials, self.networks, batches, strict=True):
            objective(trial, network(cut, batch), batch).backward()
        reached = [name for name, tensor in cut.items() if tensor.grad is not None]
        torch.autograd.backward([mixed[name] for name in reached], [cut[name].grad for name in reached])

    @torch.no_grad()
    def evaluate(self, coefficients_GK: Tensor, batch_size: int, objective: Objective) -> Tensor:
        """Return the mean of an objective over every task's validation samples, (T,), without gradient."""
        tensors = self.tensors(coefficients_GK)
        found = []
        for trial, network in zip(self.trials, self.networks, strict=True):
            total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
            for batch in trial.batches(batch_size):
                size = len(next(iter(batch.values())))
                total += size * objective(trial, network(tensors, batch), batch)
                count += size
            found.append(total / count)
        return torch.stack(found)


def draw_batches(inputs: MergeInputs, batch_size: int, *key: object) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """Yield one batch of every task, for ever: each task's samples in a new order each time they were all drawn.

    Args:
        inputs: The merge's inputs, with trials.
        batch_size: Samples a batch.
        *key: What the draws are for.
    """

    def of_task(trial: Trial) -> Iterator[dict[str, Tensor]]:
        generator = inputs.generator(*key, trial.task)
        return chain.from_iterable(trial.batches(batch_size, generator) for _ in repeat(None))

    return zip(*(of_task(trial) for trial in inputs.trials or ()), strict=True)


def num_batches(inputs: MergeInputs, batch_size: int) -> int:
    """Return how many batches every task's samples are all drawn in at least once."""
    return max(-(-trial.num_validation // batch_size) for trial in inputs.trials or ())


def check_trials(inputs: MergeInputs) -> None:
    """Refuse data without a validation split.

    Raises:
        MergeError: If a task has none.
    """
    for trial in inputs.trials or ():
        trial.check_validation()


def check_learned(values: Tensor, method: str) -> None:
    """Refuse what did not stay finite.

    Raises:
        MergeError: If a value is not finite.
    """
    if not bool(values.isfinite().all()):
        raise MergeError(
            f"{method}: what it lowers is not finite on the validation data: give a smaller `learning_rate`, or look "
            "for samples and members that give no finite predictions"
        )


def report_coefficients(inputs: MergeInputs, coefficients: Mapping[str, Sequence[float]]) -> None:
    """Put what was learned into the report: the tensors, and every member's coefficients in their order.

    Tensors merged with the same method and other hyper-parameters are added to those reported before.
    """
    inputs.report["tensors"] = [*inputs.report.get("tensors", ()), *coefficients]
    told = inputs.report.setdefault("coefficients", {})
    for index, member in enumerate(inputs.members):
        told[member.source] = [*told.get(member.source, ()), *(own[index] for own in coefficients.values())]


def _anatomy(inputs: MergeInputs) -> tuple[Anatomy, tuple[Trial, ...]]:
    assert inputs.trials  # `Method.check` has refused otherwise
    return inputs.trials[0].anatomy({name for member in inputs.members for name in member}), inputs.trials


def _trained(inputs: MergeInputs, anatomy: Anatomy) -> frozenset[str]:
    """Return the tensors to make that members learned by gradient.

    Running statistics follow from the weights: they have no gradient, and where coefficients do not sum to one a
    variance could become negative.
    """
    floating = {name for name, info in inputs.layout.items() if info.dtype.is_floating_point}
    return frozenset(name for name in anatomy.names if name in floating and name not in anatomy.buffers)


def _load(
    inputs: MergeInputs,
    anatomy: Anatomy,
    mixed: frozenset[str],
    vectors: Vectors,
    device: str,
    others: Callable[[MergeInputs, str], Tensor],
    count: int | None = None,
) -> dict[str, Tensor]:
    """Return name in modules -> the vectors of all members, (K, *shape)."""
    count = count or len(inputs.members)
    on_disk: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in anatomy.names:
        own = vectors(inputs.tensors(name)) if name in mixed else [others(inputs, name)] * count
        for tensors, vector in zip(on_disk, own, strict=True):
            tensors[name] = vector.to("cpu", torch.float32 if vector.is_floating_point() else vector.dtype)
    stacks: dict[str, Tensor] = {}
    for place in range(count):
        for name, tensor in anatomy.load(on_disk[place]).items():
            if not place:
                stacks[name] = torch.empty(count, *tensor.shape, device=device)
            stacks[name][place] = tensor
        on_disk[place].clear()
    return stacks


def _mean(inputs: MergeInputs, name: str) -> Tensor:
    """Return a tensor's mean over the members that have it; the first one's where it is integer."""
    found = [member[name] for member in inputs.members if name in member]
    return torch.stack([one.float() for one in found]).mean(0) if found[0].is_floating_point() else found[0]


def _nothing(inputs: MergeInputs, name: str) -> Tensor:
    """Return zeros, as a tensor's mean is in the offset; an integer tensor is the first member's."""
    mean = _mean(inputs, name)
    return torch.zeros_like(mean) if mean.is_floating_point() else mean
