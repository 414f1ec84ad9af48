"""The nodes of the prefix trees: runs of blocks, and what tells one run from another."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.contents import Tag
from kvpager.blocks.eviction import Queue

Int32 = NDArray[np.int32]
TreeKey = tuple[str | None, str | None]  # namespace, adapter


class Node:
    """Blocks `start` to `end` of every prompt that comes this way."""

    __slots__ = (
        "_room", "children", "end", "first", "number", "parent", "queue", "sealed", "start", "tag",
        "token", "tree",
    )  # fmt: skip

    def __init__(self, number: int, parent: Node | None, start: int, blocks: Int32) -> None:
        self.number = number
        self.parent = parent
        self.start = start
        self.end = start + len(blocks)
        self.children: dict[object, Node] = {}
        self.sealed = False
        self.tag: Tag = None
        self.token = -1  # the first one, where it has a parent
        self.first = int(blocks[0]) if len(blocks) else -1
        self._room = blocks
        if parent is not None:
            self.tree: TreeKey = parent.tree
            self.queue: Queue[Node] = parent.queue

    @property
    def blocks(self) -> Int32:
        """The run, a view. O(1)."""
        return self._room[: self.end - self.start]

    def extend(self, blocks: NDArray[np.integer[Any]]) -> None:
        """Grow at the end. Amortised O(blocks)."""
        used, needed = self.end - self.start, self.end - self.start + len(blocks)
        if needed > len(self._room):
            room = np.empty(max(needed, 2 * len(self._room)), np.int32)
            room[:used] = self.blocks
            self._room = room
        self._room[used:needed] = blocks
        self.end += len(blocks)

    def relocate(self, places: Int32) -> None:
        """Follow the blocks to their new places. O(blocks)."""
        if self.end > self.start:
            self.blocks[:] = places[self.blocks]
            self.first = int(self._room[0])

    def cut_front(self, position: int) -> Int32:
        """Give up the blocks before `position`, a copy. O(blocks)."""
        front = self._room[: position - self.start].copy()
        self._room = self.blocks[position - self.start :].copy()
        self.start, self.first = position, int(self._room[0])
        return front


class Match(NamedTuple):
    """The longest known prefix: whole `blocks`, then `num_partial` tokens of `partial_block`."""

    node: Node | None
    blocks: Int32
    partial_block: int = -1
    num_partial: int = 0


def key_of(tokens: Int32, tag: Tag) -> object:
    """What a child is found by: all tokens of its first block, and what they show."""
    return tokens.tobytes() if tag is None else (tokens.tobytes(), tag)
