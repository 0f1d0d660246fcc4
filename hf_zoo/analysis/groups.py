"""Tensors in the groups a reader thinks in: embeddings, each block, what follows, heads."""

from __future__ import annotations

from collections.abc import Iterable

from hf_zoo.places import Places

TOTAL = "total"


def groups_of(places: Places, names: Iterable[str]) -> dict[str, list[str]]:
    """Return group -> names of its tensors, in the order of the network.

    Args:
        places: Where the tensors are.
        names: Names of tensors.

    Returns:
        `embeddings`, one group a block, `rest` (what follows the blocks; everything in a network without) and `heads`;
        those of them that have tensors.
    """
    names = list(names)
    blocks = {name: places.blocks[name] for name in names if name in places.blocks}
    stacks = list(dict.fromkeys(block.stack for block in blocks.values()))
    order: dict[str, list[str]] = {
        f"{stack}{index}": []
        for stack in stacks
        for index in sorted({block.index for block in blocks.values() if block.stack == stack})
    }
    groups: dict[str, list[str]] = {"embeddings": [], **order, "rest": [], "heads": []}
    for name in names:
        if name in blocks:
            groups[f"{blocks[name].stack}{blocks[name].index}"].append(name)
        elif name in places.heads:
            groups["heads"].append(name)
        else:
            groups["embeddings" if places.blocks and name in places.embeddings else "rest"].append(name)
    return {group: found for group, found in groups.items() if found}
