"""Models whose weights are handed in with every call, so that a loss can be differentiated by how members are mixed.

Members are held under the names modules have, not those on disk: a stock model can then be called with any mixture of
them, and the library's own loading has done whatever it renames, splits or joins. What it joins on disk or in memory
must be mixed alike, so tensors are mixed in groups: a tensor, as a rule, or those that one module's tensor is made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zoo.auto import model_of, trunk_class
from hf_zoo.heads import trunk_prefix
from hf_zoo.ingredients import Ingredient
from hf_zoo.structure import class_of, disk_name_of, names_on_disk, saved_names, skeleton


@dataclass(frozen=True)
class Group:
    """Tensors that can only be mixed alike.

    Attributes:
        on_disk: Their names on disk.
        modules: Their names as modules have them.
    """

    on_disk: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """What the tensors of a merge are called on disk and in the modules of a model.

    Attributes:
        model_class: The class the merged tensors load as: the members' own, or that of their trunk.
        config: Its config.
        absent: Tensors it may lack, as its modules have them.
        names: Names of its tensors on disk.
        trunk_alone: Whether trunks are merged, under the names of trunks saved alone.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    absent: tuple[str, ...]
    names: tuple[str, ...]
    trunk_alone: bool

    @classmethod
    def of(cls, member: Ingredient, names: Collection[str]) -> Anatomy:
        """Read it off a member.

        Args:
            member: The member.
            names: Names of the tensors that are merged: all of a member's, or those of its trunk saved alone.
        """
        structure = member.structure
        trunk_alone = not any(name in names for name in structure.head or structure.trunk)
        there = tuple(name for name in member.names_in_order(trunk_alone) if name in names)
        if trunk_alone:
            return cls(trunk_class(member), structure.trunk_config, structure.absent, there, True)
        return cls(*class_of(member.folder), (), there, False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without storage."""
        return skeleton(self.model_class, self.config)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The floating tensors, in groups that can only be mixed alike, in the modules' order."""
        tensors, there = self.model.state_dict(), set(self.names)
        groups: list[tuple[set[str], list[str]]] = []
        for module, alone in disk_name_of(self.model).items():
            if not tensors[module].is_floating_point():
                continue
            on_disk = {alone} if alone is not None else set(names_on_disk(self.model, [module]))
            if not on_disk <= there:  # a part the members have not
                continue
            modules = [module]
            for group in [group for group in groups if group[0] & on_disk]:
                groups.remove(group)
                on_disk, modules = on_disk | group[0], group[1] + modules
            groups.append((on_disk, modules))
        return tuple(Group(tuple(sorted(on_disk)), tuple(modules)) for on_disk, modules in groups)

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Names on disk of the tensors no gradient trains, such as running statistics."""
        trained = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return frozenset(n for group in self.groups if not trained & set(group.modules) for n in group.on_disk)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return floating tensors under the names modules have.

        Args:
            tensors: All tensors, under their names on disk.

        Raises:
            ModelError: If a tensor is missing, left over or of another shape.
        """
        modules = [name for group in self.groups for name in group.modules]
        absent = {*self.absent, *saved_names(self.model)} - set(modules)
        own = model_of(self.model_class, self.config, tensors, absent).state_dict()
        return {name: own[name] for name in modules}


class Network:
    """A task's stock model in evaluation mode, called with weights of the caller's.

    Args:
        model: The task's model; its head, its integer buffers and what else is not handed in are its own.
        anatomy: Of the weights that will be handed in.
        device: Where to compute.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, device: str) -> None:
        prefix = trunk_prefix(model) if anatomy.trunk_alone else ""
        self.model = model.to(torch.device(device), torch.float32).eval().requires_grad_(False)  # type: ignore[arg-type]
        own = self.model.state_dict()
        modules = [name for group in anatomy.groups for name in group.modules]
        self.names = {name: prefix + name for name in modules if prefix + name in own}

    def __call__(self, tensors: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits.

        Args:
            tensors: Weights by the names the anatomy's modules have; those this model has no place for are left out.
            batch: The model's inputs; labels are not shown to it.
        """
        weights = {own: tensors[name] for name, own in self.names.items()}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        # Tied tensors are handed in once, under the name they are saved under; the others follow it.
        return functional_call(self.model, weights, (), inputs).logits
