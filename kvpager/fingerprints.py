"""64 bits for each published prefix: enough to recognise one that was evicted and comes again.

A fingerprint only tells an eviction policy that it may have seen a prefix before. Never does it
decide what is reused: two prefixes with one fingerprint cost a wrong guess, not a wrong token.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpager.pool import BlockPool, Blocks

Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]
T = TypeVar("T", bound=np.generic)
Int64 = NDArray[np.int64]
NO_FINGERPRINTS: UInt64 = np.empty(0, np.uint64)
NO_DEPTHS: Int64 = np.empty(0, np.int64)


class Arrivals:
    """Blocks that the prefix index offers since its policy last heard of any."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._runs: list[tuple[Blocks, int, int, object]] = []  # blocks, depth, block before, tree
        self.prints: UInt64 = np.zeros(pool.num_blocks, np.uint64)
        self._odd = _mix(np.arange(1, pool.ids.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)

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
        lengths = np.array([len(run[0]) for run in runs])
        starts = np.cumsum(lengths) - lengths
        begun = [
            int(self.prints[before]) if depth else tree_seed(tree)
            for _, depth, before, tree in runs
        ]
        depths = np.arange(len(blocks)) + np.repeat([run[1] for run in runs] - starts, lengths)
        ids = self._pool.ids.take(blocks, axis=0).view(np.uint32).astype(np.uint64)
        # A sum over the blocks so far, each weighted by what stands in it and how deep: a prefix
        # sum, so that a long run takes one vector operation instead of a chain.
        parts = _mix(ids @ self._odd + _mix(depths.astype(np.uint64)))
        sums = np.cumsum(parts, dtype=np.uint64)
        base = np.array(begun, np.uint64) - (sums - parts)[starts]
        prints: UInt64 = sums + np.repeat(base, lengths)
        self.prints[blocks] = prints
        return blocks, prints, depths

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size, and its blocks to their new places. O(blocks)."""
        self.prints = moved(self.prints, num_blocks, places)


def moved(old: NDArray[T], num_blocks: int, places: Int32) -> NDArray[T]:
    """The numbers of each block, at its new place. O(blocks)."""
    new = np.zeros((num_blocks, *old.shape[1:]), old.dtype)
    staying = places < num_blocks
    new[places[staying]] = old[: len(places)][staying]
    return new


def tree_seed(tree: object) -> int:
    """64 bits that stand for a tree. O(1)."""
    return int.from_bytes(blake2b(repr(tree).encode(), digest_size=8).digest(), "little")


def _mix(values: UInt64) -> UInt64:
    # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
