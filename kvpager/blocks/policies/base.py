"""Which cached block leaves first when room is needed.

The prefix index tells the policy what happens to blocks, and the policy ranks them. The leaf with
the lowest rank in the prefix trees is evicted first. A block's rank changes only in calls that
name the block, so a heap keeps the order. `reranked` names the exceptions before an eviction.

    admit ─────▶ touch ──▶ release ──▶ (touch ──▶ release)* ──▶ forget
    published    reused    no table     reused, released         evicted, or withdrawn
                           holds it

If a caller's policy raises, LRU replaces it: see `kvpager.blocks.policies.failsafe`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.fingerprints import moved
from kvpager.plans import NO_BLOCKS, Float64, Int32, Int64, UInt64

Blocks = NDArray[np.integer[Any]]  # block ids, whatever their width
Rank = Float64 | Int64


class EvictionPolicy(Protocol):
    """The calls of the prefix index to a policy. The blocks of a call are distinct, int32 [n]."""

    needs_fingerprints: bool

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:
        """Note that `blocks` were published, `depths` blocks from the front, int64 [n].

        `fingerprints`, uint64 [n]: see `kvpager.blocks.fingerprints`. Both are empty unless
        `needs_fingerprints`.
        """

    def touch(self, blocks: Blocks) -> None:
        """Note that another sequence uses `blocks`."""

    def release(self, blocks: Blocks) -> None:
        """Note that no table holds `blocks` any more."""

    def rank(self, blocks: Blocks) -> Rank:
        """Return the rank of each block, float64 or int64 [n]."""

    def forget(self, blocks: Blocks) -> None:
        """Note that `blocks` left the prefix index."""

    def reranked(self, count: int) -> Int32:
        """Return the blocks whose rank changed although no call named them, int32 [n].

        The prefix index calls this before it evicts `count` blocks.
        """

    def retain(self, blocks: Blocks, priority: int, ttl_s: float | None) -> bool:
        """Rank `blocks` by `priority` for `ttl_s` seconds; return False if not supported."""

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size. `places`: the new number of each old block."""


class BlockPolicy:
    """A policy with columns of numbers, one entry a block. Every call is O(blocks named)."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {}
    needs_fingerprints = False

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.now = 0  # logical time: ticks once a call
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, np.zeros(num_blocks, dtype))

    def tick(self) -> int:
        """Advance logical time and return it. O(1)."""
        self.now += 1
        return self.now

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        pass

    def touch(self, blocks: Blocks) -> None:  # noqa: D102
        pass

    def release(self, blocks: Blocks) -> None:  # noqa: D102
        pass

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        pass

    def reranked(self, count: int) -> Int32:  # noqa: D102
        return NO_BLOCKS

    def retain(self, blocks: Blocks, priority: int, ttl_s: float | None) -> bool:  # noqa: D102
        return False

    def resize(self, num_blocks: int, places: Int32) -> None:  # noqa: D102
        self.num_blocks = num_blocks
        for name in self.COLUMNS:
            setattr(self, name, moved(getattr(self, name), num_blocks, places))
