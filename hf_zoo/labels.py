"""Members whose classes have the same names in another order presented in one order.

A head's row i belongs to class i. Members fine-tuned apart may number the same classes differently; averaged as they
are, the rows of different classes would be mixed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zoo.axes import IndexedAxis, SavedModel, label_axes
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError

_PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_names(model: SavedModel) -> tuple[str, ...]:
    """Return the names of a model's classes in order; the library's placeholders where it has none."""
    id2label = model.config.id2label or {}
    return tuple(str(name) for _, name in sorted(id2label.items(), key=lambda entry: int(entry[0])))


def align_labels(members: Sequence[SavedModel]) -> tuple[CheckpointReader, ...]:
    """Bring the classes of all members into the first one's order.

    Members without a head, or without names for their classes, must agree as they are: placeholders (`LABEL_0`) say
    nothing, so they equal only the same number of placeholders, and never names.

    Args:
        members: The members, whole models.

    Returns:
        Their readers, rows of the heads in the first one's order.

    Raises:
        MergeError: If classes differ; names the two members and their classes.
    """
    if not members:
        return ()
    first, names = members[0], class_names(members[0])
    readers = [first.reader]
    for other in members[1:]:
        order = label_order(first.source, names, other.source, class_names(other))
        readers.append(other.reader if order is None else reordered_labels(other, order))
    return tuple(readers)


def label_order(first: str, wanted: Sequence[str], other: str, given: Sequence[str]) -> tuple[int, ...] | None:
    """Return where another member has each class of the first.

    Args:
        first: Whose classes set the order, for messages.
        wanted: Its classes in order.
        other: Whose classes are to be brought into it.
        given: Its classes in order.

    Returns:
        For each class of the first, its number in the other; null where nothing has to move.

    Raises:
        MergeError: If the classes are not the same ones.
    """
    if tuple(wanted) == tuple(given):
        return None
    shown = f"({_listed(wanted)}; {_listed(given)})"
    unnamed = [all(_PLACEHOLDER.fullmatch(name) for name in names) for names in (wanted, given)]
    if any(unnamed) and len(wanted) == len(given):
        without = first if unnamed[0] else other
        raise MergeError(
            f"{first} and {other} have different classes {shown}: those of {without} have no names, so nobody knows "
            "whether they stand in the same order. Write its `id2label` and `label2id` into its config.json"
        )
    if sorted(wanted) != sorted(given) or len(set(wanted)) != len(wanted):
        raise MergeError(
            f"{first} and {other} have different classes {shown}, so their heads cannot be merged: keep one a task "
            f'(`heads: per_task`) or merge the trunks alone (`auto_class="AutoModel"`){_spelling(wanted, given)}'
        )
    places = {name: number for number, name in enumerate(given)}
    return tuple(places[name] for name in wanted)


def reordered_labels(member: SavedModel, order: Sequence[int]) -> CheckpointReader:
    """Present a member with its classes in another order.

    Args:
        member: The member.
        order: For each class of the new order, its present number.

    Raises:
        MergeError: If its tensors have other sizes than its config says.
    """
    reader = member.reader
    axes: dict[str, list[IndexedAxis]] = {}
    for axis in label_axes(member.model_class, member.config):
        if axis.tensor in reader:
            axes.setdefault(axis.tensor, []).append(axis)
            if reader.shape(axis.tensor)[axis.dim] != axis.size:
                raise MergeError(
                    f"{reader.place(axis.tensor)} has {reader.shape(axis.tensor)[axis.dim]} entries where its config "
                    f"says {axis.size}"
                )

    def read(name: str) -> Tensor:
        tensor = reader[name]
        for axis in axes.get(name, ()):
            # What a model has behind its classes, such as one for no object, stays where it is.
            places = torch.tensor([*order, *range(len(order), axis.size)])
            tensor = tensor.index_select(axis.dim, places)
        return tensor

    def read_piece(name: str, start: int, stop: int) -> Tensor:
        return read(name).reshape(-1)[start:stop] if name in axes else reader.piece(name, start, stop)

    return CheckpointReader(reader.source, reader.layout, read, {}, read_piece)


def _spelling(wanted: Sequence[str], given: Sequence[str]) -> str:
    """Say so where names differ in spelling alone."""
    if sorted(name.strip().casefold() for name in wanted) != sorted(name.strip().casefold() for name in given):
        return ""
    return ". They differ in spelling alone: if they mean the same, write one spelling into both config.json"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (f", ... {len(labels)} in all" if len(labels) > 4 else "")
