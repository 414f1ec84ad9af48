"""A base for policies that keep queues of blocks instead of ranking all blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.policies.base import BlockPolicy, Blocks, Rank
from kvpager.plans import Float64, Int32, Int64, UInt64

Queue = OrderedDict[int, None]  # of blocks; the first is evicted next


class Ghosts:
    """The fingerprints of the most recently evicted blocks, at most `num_ghosts`."""

    def __init__(self, num_ghosts: int) -> None:
        self._num_ghosts = num_ghosts
        self._prints: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prints)

    def add(self, fingerprint: int) -> None:
        """Add the fingerprint of an evicted block. O(1)."""
        self._prints[fingerprint] = None
        self._prints.move_to_end(fingerprint)
        self.trim(self._num_ghosts)

    def take(self, fingerprint: int) -> bool:
        """Remove the fingerprint of a block that returns; return True if it was present. O(1)."""
        return self._prints.pop(fingerprint, 0) is None

    def trim(self, num_ghosts: int) -> None:
        """Remove the oldest fingerprints beyond `num_ghosts`. Amortised O(1)."""
        while len(self._prints) > max(num_ghosts, 0):
            self._prints.popitem(last=False)


class QueuePolicy(BlockPolicy):
    """A policy that keeps queues of blocks, for one request at a time. Calls are O(blocks).

    The blocks of a prompt are queued from its end, because a longer prefix is less often shared.
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "prints": np.uint64,
        "ranks": np.float64,
        "is_held": np.bool_,
    }
    needs_fingerprints = True
    prints: UInt64
    ranks: Float64
    is_held: NDArray[np.bool_]

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        self.prints[blocks] = fingerprints
        self.is_held[blocks] = True
        for block, fingerprint in zip(
            blocks[::-1].tolist(), fingerprints[::-1].tolist(), strict=True
        ):
            self.ranks[block] = self.tick()
            self.insert(block, fingerprint)

    def touch(self, blocks: Blocks) -> None:  # noqa: D102
        self.is_held[blocks] = True
        for block in blocks[::-1].tolist():
            self.ranks[block] = self.tick()
            self.hit(block)

    def release(self, blocks: Blocks) -> None:  # noqa: D102
        self.is_held[blocks] = False
        for block in blocks[::-1].tolist():
            self.ranks[block] = self.tick()
            self.let_go(block)

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        for block, fingerprint in zip(blocks.tolist(), self.prints[blocks].tolist(), strict=True):
            self.remove(block, fingerprint)

    def reranked(self, count: int) -> Int32:  # noqa: D102
        chosen = []
        for number in range(count):
            block = self.next_out(number)
            if block is None:
                break
            self.ranks[block] = self.tick() - 2.0**52
            chosen.append(block)
        return np.array(chosen, np.int32)

    def rank(self, blocks: Blocks) -> Rank:  # noqa: D102
        return self.ranks[blocks]

    def idle(self, queue: Queue) -> int | None:
        """Return the first block of a queue that no request holds. O(held blocks)."""
        return next((block for block in queue if not self.is_held[block]), None)

    def take_idle(self, *queues: Queue) -> int | None:
        """Pop the first block that no request holds, from the first queue that has one."""
        for queue in queues:
            block = self.idle(queue)
            if block is not None:
                del queue[block]
                return block
        return None

    @abstractmethod
    def insert(self, block: int, fingerprint: int) -> None:
        """Queue a new block."""

    @abstractmethod
    def hit(self, block: int) -> None:
        """Record that a block is used again."""

    def let_go(self, block: int) -> None:
        """Record that no request holds a block any longer."""

    @abstractmethod
    def next_out(self, number: int) -> int | None:
        """Pop the next block to evict, after `number` others of the same call."""

    @abstractmethod
    def remove(self, block: int, fingerprint: int) -> None:
        """Remove an evicted block, which `next_out` may have popped."""
