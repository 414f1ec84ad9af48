"""Prompts, and how they become cached or are evicted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle

A, B, C, D, E = ([first + i for i in range(4)] for first in range(10, 60, 10))  # a block each


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def committed(
    manager: BlockManager, ids: list[int], namespace: str | None = None, **key: Any
) -> SequenceHandle:
    """Return a sequence whose tokens are committed. `key`: further parts of the prefix key."""
    sequence = manager.allocate(ids, namespace=namespace, **key)
    manager.commit(sequence)
    return sequence


def cache(manager: BlockManager, ids: list[int], namespace: str | None = None, **key: Any) -> None:
    """Cache a prompt that no sequence holds."""
    manager.free(committed(manager, ids, namespace, **key))


def evict(manager: BlockManager, num_blocks: int = 1) -> None:
    """Evict `num_blocks` cached blocks."""
    manager.free(manager.allocate((manager.num_free_blocks + num_blocks) * manager.block_size))
    manager.check()


def press(manager: BlockManager, namespace: str | None = None) -> None:
    """Take every available block, one by one, and release them."""
    taken = list[SequenceHandle]()
    with suppress(OutOfBlocks):
        while True:
            taken.append(manager.allocate(1, namespace=namespace))
    manager.check()
    manager.free(taken)
