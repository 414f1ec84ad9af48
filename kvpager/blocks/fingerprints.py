"""64 bits for each published prefix: enough to recognise one that was evicted and comes again.

A fingerprint only tells an eviction policy that it may have seen a prefix before. Never does it
decide what is reused: two prefixes with one fingerprint cost a wrong guess, not a wrong token.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.pool import BlockPool, Blocks
from kvpager.plans import Int32, Int64, UInt64

T = TypeVar("T", bound=np.generic)
NO_FINGERPRINTS: UInt64 = np.empty(0, np.uint64)
NO_DEPTHS: Int64 = np.empty(0, np.int64)


class Arrivals:
    """Blocks that the prefix index offers since its policy last heard of any."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._runs: list[tuple[Blocks, int, int, object]] = []  # blocks, depth, block before, tree
        self.prints: UInt64 = np.zeros(pool.num_blocks, np.uint64)
        self._odd = _mix(np.arange(1, pool.ids.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        self._depths: Int64 = np.empty(0, np.int64)
        self._mixed: UInt64 = np.empty(0, np.uint64)

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, blocks: Blocks, depth: int, before: int, tree: object) -> None:
        """`blocks` stand at `depth`, after block `before` or at the front of `tree`. O(1)."""
        self._runs.append((blocks, depth, before, tree))

    def drain(self, needs_fingerprints: bool) -> tuple[Blocks, UInt64, Int64]:
        """All blocks since; where wanted, their fingerprints and depths. O(tokens)."""
        runs, self._runs = self._runs, []
        blocks = runs[0][0] if len(runs) == 1 else np.concatenate([run[0] for run in runs])
        if not needs_fingerprints:
            return blocks, NO_FINGERPRINTS, NO_DEPTHS
        index = blocks.astype(np.intp)
        begun = [
            int(self.prints[before]) if depth else tree_seed(tree)
            for _, depth, before, tree in runs
        ]
        # A sum over the blocks so far, each weighted by what stands in it and how deep: a prefix
        # sum, so that a long run takes one vector operation instead of a chain.
        sums = self._pool.ids.take(index, axis=0).view(np.uint32).astype(np.uint64) @ self._odd
        if len(runs) == 1:
            depths = self._counted(runs[0][1] + len(blocks))[runs[0][1] :]
            sums += self._mixed[depths[0] : depths[-1] + 1]
            np.cumsum(_mix(sums), out=sums)
            sums += np.uint64(begun[0])
        else:
            lengths = np.array([len(run[0]) for run in runs])
            starts = np.cumsum(lengths) - lengths
            depths = np.arange(len(blocks)) + np.repeat([run[1] for run in runs] - starts, lengths)
            self._counted(int(depths.max()) + 1)
            parts = _mix(sums + self._mixed[depths])
            sums = np.cumsum(parts)
            base = np.array(begun, np.uint64) - (sums - parts)[starts]
            sums += np.repeat(base, lengths)
        self.prints[index] = sums
        return blocks, sums, depths

    def _counted(self, count: int) -> Int64:
        """0 to `count`; makes sure that so many depths are mixed. Amortised O(1)."""
        if count > len(self._depths):
            self._depths = np.arange(max(count, 2 * len(self._depths)))
            self._mixed = _mix(self._depths.astype(np.uint64))
        return self._depths[:count]

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size, and its blocks to their new places. O(blocks)."""
        self.prints = moved(self.prints, num_blocks, places)


def moved(old: NDArray[T], num_blocks: int, places: Int32) -> NDArray[T]:
    """The numbers of each block, at its new place. O(blocks)."""
    new = np.zeros((num_blocks, *old.shape[1:]), old.dtype)
    staying = places < num_blocks
    new[places[staying]] = old[: len(places)][staying]
    return new


@lru_cache(maxsize=4096)
def tree_seed(tree: object) -> int:
    """64 bits that stand for a tree. O(1)."""
    return int.from_bytes(blake2b(repr(tree).encode(), digest_size=8).digest(), "little")


def _mix(values: UInt64) -> UInt64:
    """Mix the bits of each number, in place: SplitMix64's finaliser (Steele, Lea, Flood, 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
