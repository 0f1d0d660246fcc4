"""Where in a network a tensor is: in which block, among the embeddings, or in the head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Block:
    """A block of a stack of alike blocks.

    Attributes:
        stack: What stands before the block's number in the names of its tensors.
        index: Its number, from 0.
        count: How many blocks the stack has.
    """

    stack: str
    index: int
    count: int

    @property
    def depth(self) -> float:
        """How deep it lies in its stack, from 0 to 1."""
        return self.index / (self.count - 1) if self.count > 1 else 0.0


class Places:
    """Where the tensors of a network are.

    Blocks are read off the names: a stack is a set of names that differ in their first number, which runs from 0
    without gaps. What comes before the first block counts as embeddings.

    Args:
        names: Names of all tensors, on disk.
        in_order: Returns them in the order a sample passes through the network; asked for only when needed.
        heads: Returns the names of the head; asked for only when needed.
    """

    def __init__(
        self, names: Iterable[str], in_order: Callable[[], Sequence[str]], heads: Callable[[], Iterable[str]]
    ) -> None:
        self._names = list(names)
        self._in_order = in_order
        self._heads = heads

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """Name -> the block it is in, for those that are in one."""
        numbered = {name: match for name in self._names if (match := _FIRST_NUMBER.search(name))}
        stacks: dict[str, set[int]] = {}
        for name, match in numbered.items():
            stacks.setdefault(name[: match.start(1)], set()).add(int(match[1]))
        whole = {stack for stack, seen in stacks.items() if seen == set(range(len(seen))) and len(seen) > 1}
        return {
            name: Block(stack, int(match[1]), len(stacks[stack]))
            for name, match in numbered.items()
            if (stack := name[: match.start(1)]) in whole
        }

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of the head's tensors."""
        return frozenset(self._heads())

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Names of what comes before the first block."""
        return frozenset(name for name, depth in self._outside.items() if depth == 0 and name not in self.heads)

    def depth(self, name: str) -> float:
        """Return how deep a tensor lies, 0 before and in the first block, 1 in the last and after it.

        A tensor no sample passes, as its class does not know it (`position_ids` of older checkpoints), lies at 0.
        """
        block = self.blocks.get(name)
        return self._outside.get(name, 0.0) if block is None else block.depth

    @cached_property
    def _outside(self) -> dict[str, float]:
        """Name -> 0 or 1 for what is in no block: whether blocks have come before it."""
        depths, begun = {}, False
        for name in self._in_order():
            if name in self.blocks:
                begun = True
            else:
                depths[name] = float(begun)
        return depths
