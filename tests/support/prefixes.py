"""Prompts, and how they become cached or are evicted."""

from __future__ import annotations

from contextlib import suppress

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle

A, B, C, D, E = ([first + i for i in range(4)] for first in range(10, 60, 10))  # a block each


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def committed(
    manager: BlockManager, ids: list[int], namespace: str | None = None
) -> SequenceHandle:
    sequence = manager.allocate(ids, namespace=namespace)
    manager.commit(sequence)
    return sequence


def cache(manager: BlockManager, ids: list[int], namespace: str | None = None) -> None:
    manager.free(committed(manager, ids, namespace))


def press(manager: BlockManager, namespace: str | None = None) -> None:
    """Take every available block, one by one, and release them."""
    taken = list[SequenceHandle]()
    with suppress(OutOfBlocks):
        while True:
            taken.append(manager.allocate(1, namespace=namespace))
    manager.check()
    manager.free(taken)
