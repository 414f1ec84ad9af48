"""64-bit fingerprints of published prefixes, so that a policy recognises an evicted prefix.

A fingerprint never decides what is reused: two prefixes with equal fingerprints cost a wrong guess
of the eviction policy, not a wrong token.
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
    """Published blocks that the eviction policy does not know of yet."""

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
        """Add `blocks` at `depth`, after block `before` or at the front of `tree`. O(1)."""
        self._runs.append((blocks, depth, before, tree))

    def drain(self, needs_fingerprints: bool) -> tuple[Blocks, UInt64, Int64]:
        """Return and remove all blocks, with fingerprints and depths if needed. O(tokens)."""
        runs, self._runs = self._runs, []
        blocks = runs[0][0] if len(runs) == 1 else np.concatenate([run[0] for run in runs])
        if not needs_fingerprints:
            return blocks, NO_FINGERPRINTS, NO_DEPTHS
        index = blocks.astype(np.intp)
        begun = [
            int(self.prints[before]) if depth else tree_seed(tree)
            for _, depth, before, tree in runs
        ]
        # A fingerprint is a prefix sum of mixed tokens and depths, so a long run takes one vector
        # operation instead of a chain of hashes.
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
        """Return the depths 0 to `count`, after mixing their bits. Amortised O(1)."""
        if count > len(self._depths):
            self._depths = np.arange(max(count, 2 * len(self._depths)))
            self._mixed = _mix(self._depths.astype(np.uint64))
        return self._depths[:count]

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size. `places`: the new id of each block. O(blocks)."""
        self.prints = moved(self.prints, num_blocks, places)


def moved(old: NDArray[T], num_blocks: int, places: Int32) -> NDArray[T]:
    """Return the column `old` with each entry at its block's new id. O(blocks)."""
    new = np.zeros((num_blocks, *old.shape[1:]), old.dtype)
    staying = places < num_blocks
    new[places[staying]] = old[: len(places)][staying]
    return new


@lru_cache(maxsize=4096)
def tree_seed(tree: object) -> int:
    """Return a 64-bit seed for a tree. O(1)."""
    return int.from_bytes(blake2b(repr(tree).encode(), digest_size=8).digest(), "little")


def _mix(values: UInt64) -> UInt64:
    """Mix the bits of each number, in place: SplitMix64's finaliser (Steele, Lea, Flood, 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
