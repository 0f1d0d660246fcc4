"""Bring models to one form before a merge: the same tensors of each, and what to do with those that are not shared."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.ingredients import STATISTICS_FOLDER, Ingredient, check_one_label_space, check_one_trunk
from hf_zoo.inputs import MergeInputs, common_layout, some_names
from hf_zoo.means import mean_of
from hf_zoo.methods.base import Need
from hf_zoo.places import Places
from hf_zoo.recipe.schema import MergeRule
from hf_zoo.shards import TensorInfo
from hf_zoo.varying import Merger, plan_parts, with_extras

STATISTICS = {Need.FISHER: "fisher", Need.GRAM: "gram"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joined:
    """Models that fit together.

    Attributes:
        members: The members' tensors: trunks, or whole models.
        base: The base's; null where there is none.
        layout: The tensors to make.
        places: Where they are in the network.
        owners: Tensors only some members have -> places of those that do.
        untrained: Tensors no task vector can be taken of, as the base lacks them or the members began them anew.
    """

    members: tuple[CheckpointReader, ...]
    base: CheckpointReader | None
    layout: Mapping[str, TensorInfo]
    places: Places
    owners: Mapping[str, tuple[int, ...]]
    untrained: tuple[str, ...]

    def merger(
        self,
        method: str,
        parameters: Mapping[str, Any],
        rules: Sequence[MergeRule] = (),
        source: str = "merge recipe",
    ) -> Merger:
        """Return who makes which tensor.

        Args:
            method: The method of tensors no rule is about.
            parameters: Its hyper-parameters; values may vary over the network.
            rules: Tensors with a rule of their own.
            source: Where they come from, for the error.

        Raises:
            MergeError: If a method is unknown, or a rule fits no tensor.
            RecipeError: If a hyper-parameter is unknown, of a wrong type or out of range.
        """
        shared = [name for name in self.layout if name not in self.owners]
        made = plan_parts(method, parameters, rules, self.places, shared, self.untrained, source)
        return with_extras(made, self.owners)

    def inputs(self, **others: Any) -> MergeInputs:
        """Return what a merge is given.

        Args:
            **others: Further fields of `MergeInputs`.
        """
        inputs = MergeInputs(members=self.members, base=self.base, layout=self.layout, **others)
        if self.untrained and self.base is not None:
            inputs.report["averaged, as the base lacks or never trained them"] = list(self.untrained)
        if self.owners:
            inputs.report["of some members only"] = {name: list(places) for name, places in self.owners.items()}
        return inputs


def join(
    ingredients: Sequence[Ingredient],
    trunk_alone: bool,
    base: Ingredient | None = None,
    dtype: torch.dtype | None = None,
    extras: Literal["refuse", "keep", "drop"] = "refuse",
) -> Joined:
    """Check that models fit together.

    Args:
        ingredients: The members.
        trunk_alone: Take the trunks, under the names of trunks saved alone; else whole models, under their own names.
        base: The model all members were trained from.
        dtype: Type of floating tensors to make; null keeps the members'.
        extras: What to do with tensors only some members have.

    Raises:
        MergeError: If they do not fit together; names the models and what differs.
    """
    check_one_trunk(ingredients)
    if not trunk_alone:
        check_one_label_space(ingredients)
    members = [one.trunk if trunk_alone else one.reader for one in ingredients]
    for reader in (*members, *(() if base is None else (base.reader,))):
        _refuse_float8(reader)
    owners = {} if extras == "refuse" else _owners(members)
    common = [name for name in members[0] if name not in owners]
    alike = [one.select({name: name for name in common}) for one in members] if owners else members
    layout = common_layout(alike, dtype)
    if extras == "drop":
        members, owners = alike, {}
    for name, having in owners.items():
        layout |= common_layout([members[place].select({name: name}) for place in having], dtype)
    root = None if base is None else (base.trunk if trunk_alone else base.reader)
    first = ingredients[0]
    places = Places(
        layout,
        lambda: [name for name in first.names_in_order(trunk_alone) if name in layout],
        lambda: () if trunk_alone else [name for name in first.structure.head if name in layout],
    )
    untrained = () if base is None or root is None else _untrained(ingredients, base, root, common, layout, places)
    return Joined(tuple(members), root, layout, places, owners, untrained)


def statistics_for(
    needs: Iterable[Need], ingredients: Sequence[Ingredient], trunk_alone: bool, base: Ingredient | None
) -> dict[str, Any]:
    """Return the statistics a merge needs, as fields of `MergeInputs`.

    Args:
        needs: What its methods need.
        ingredients: The members.
        trunk_alone: Whether trunks are merged, under the names of trunks saved alone.
        base: The model all members were trained from; its statistics are taken where it has any.

    Raises:
        MergeError: If a member has none of a kind; says how to make them.
    """
    fields: dict[str, Any] = {}
    for need, kind in STATISTICS.items():
        if need in needs:
            fields[kind] = tuple(_statistics(one, kind, trunk_alone) for one in ingredients)
    if Need.FISHER in needs:
        sizes = [one.num_examples for one in ingredients]
        fields["num_examples"] = tuple(sizes) if None not in sizes else None
        if base is not None and base.statistics("fisher") is not None:
            fields["base_fisher"] = _statistics(base, "fisher", trunk_alone)
            fields["base_num_examples"] = base.num_examples
    return fields


def task_reader(members: Sequence[Ingredient], trunk: CheckpointReader) -> CheckpointReader:
    """Return a task's model, tensor by tensor: a merged trunk under the members' names, and their own head.

    Args:
        members: The members of the task; the heads of several are averaged.
        trunk: The merged trunk, under the names of a trunk saved alone.

    Raises:
        MergeError: If their heads differ in shapes or classes.
    """
    check_one_label_space(members)
    structure = members[0].structure
    head_layout = common_layout([member.head for member in members])
    head = mean_of([member.head for member in members], members[0].name, head_layout)
    inside = head.select({name: name for name in head})
    layout = {own: trunk.layout[alone] for own, alone in structure.trunk.items()} | head.layout

    def read(name: str) -> torch.Tensor:
        return trunk[structure.trunk[name]] if name in structure.trunk else inside[name]

    return CheckpointReader(trunk.source, layout, read, {})


def _statistics(ingredient: Ingredient, kind: str, trunk_alone: bool) -> CheckpointReader:
    reader = ingredient.statistics(kind)
    if reader is None and ingredient.measured is not None:
        raise MergeError(
            f"{ingredient.reference} is stacked of several models' blocks: {kind} statistics were taken of other "
            "networks than this one. Use a method without them, or merge whole models"
        )
    if reader is None:
        raise MergeError(
            f"{ingredient.reference} has no {kind} statistics ({STATISTICS_FOLDER}/{kind}.safetensors): make them "
            f"with `hf-zoo curvature {ingredient.reference}`, or merge members that were published with them"
        )
    if not trunk_alone:
        return reader
    return reader.select({alone: own for own, alone in ingredient.structure.trunk.items() if own in reader})


def _refuse_float8(reader: CheckpointReader) -> None:
    """Refuse weights of one byte: without the scales they were divided by they are not the model's."""
    for name, info in reader.layout.items():
        if info.dtype.is_floating_point and info.dtype.itemsize == 1:
            raise MergeError(
                f"{reader.place(name)} is {info}: weights of one byte are not merged. Save the model in bfloat16 first"
            )


def _owners(members: Sequence[CheckpointReader]) -> dict[str, tuple[int, ...]]:
    """Return the tensors only some members have, in the order they are first met, with those that have them."""
    every = dict.fromkeys(name for member in members for name in member)
    owners = {name: tuple(i for i, member in enumerate(members) if name in member) for name in every}
    return {name: places for name, places in owners.items() if len(places) < len(members)}


def _untrained(
    ingredients: Sequence[Ingredient],
    base: Ingredient,
    root: CheckpointReader,
    names: Sequence[str],
    layout: Mapping[str, TensorInfo],
    places: Places,
) -> tuple[str, ...]:
    """Return the tensors whose difference to the base means nothing.

    Raises:
        MergeError: If a tensor of the trunk has another shape in the base.
    """
    missing = [name for name in names if name not in root]
    unlike = [name for name in names if name in root and root.shape(name) != layout[name].shape]
    of_trunk = [name for name in unlike if name not in places.heads]
    if len(missing) == len(names):
        raise MergeError(f"base {base.reference} has no tensor of {ingredients[0].reference}: it is another model")
    if of_trunk:
        name = of_trunk[0]
        raise MergeError(
            f"base {base.reference} and {ingredients[0].reference} differ in shape: {name!r} is "
            f"{list(root.shape(name))} in the base and {list(layout[name].shape)} in the members: task vectors need "
            "the base they were trained from"
        )
    fresh = {module for one in ingredients if one.manifest for module in one.manifest.loading.get("fresh", ())}
    begun_anew = [name for name in names if name in root and name.rpartition(".")[0] in fresh]
    of_others = places.heads if _tells_others_apart(base, ingredients[0]) else frozenset()
    untrained = tuple(name for name in names if name in {*missing, *unlike, *begun_anew, *of_others})
    if untrained:
        logger.info(
            "%d tensors the base %s lacks or never trained are averaged: %s",
            len(untrained), base.reference, some_names(untrained),
        )  # fmt: skip
    return untrained


def _tells_others_apart(base: Ingredient, member: Ingredient) -> bool:
    """Whether the base names other classes than its children: then they cannot have gone on with its head."""
    if "id2label" not in base.config or sorted(base.labels) == sorted(member.labels):
        return False
    from hf_zoo.axes import label_axes
    from hf_zoo.structure import class_of

    return bool(label_axes(*class_of(member.folder)))
