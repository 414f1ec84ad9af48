"""The idle blocks that leave next, ranked once for many searches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, Float64, Int32, Int64

_SLACK_PART = 4  # rank a quarter more blocks than `ahead`
_LOOK_AT = 512  # blocks per call of `wanted`

Index = NDArray[np.intp]


class Upcoming:
    """Finds wanted blocks among those that leave while the next `ahead` blocks are taken.

        blocks   - - - - - + - + + - | . . . . . .     by rank; +: wanted
                           seen      end

    Blocks that become idle later are added if they rank as low as those. `BlockPool.idled` lists
    them, and is None when all have to be ranked again.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._ahead = 0
        self._blocks: Index = np.empty(0, np.intp)
        self._ranks: Float64 | Int64 = np.empty(0, np.int64)
        self._bound: float = np.inf  # idle blocks of a higher rank are left out
        self._num_near = 0  # of `_blocks`, those that will have left when `ahead` more are taken
        # Which blocks are among `_blocks`, and which of these are idle still; their number.
        self._is_ranked: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._is_here: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._num_here = 0
        self._seen = 0

    def first(self, count: int, ahead: int, wanted: Callable[[Index], NDArray[np.bool_]]) -> Int32:
        """Return the first `count` wanted blocks, by rank, int32 [n].

        O(count + blocks that left or came), O(ahead) if blocks became idle. A block that is not
        wanted is looked at once. After each `ahead` / 4 blocks that left, were used again or were
        pinned, all are ranked in O(blocks). `wanted` may be True for idle blocks only.
        """
        self._follow(ahead, wanted)
        found, at, end = NO_BLOCKS, self._seen, self._end()
        while len(found) < count and at < end:
            part = self._blocks[at : min(at + _LOOK_AT, end)]
            hits = wanted(part)
            hits &= self._rank(part) <= self._bound  # not used again since
            if not len(found):
                self._seen = at + (int(hits.argmax()) if hits.any() else len(part))
            found = np.concatenate([found, part[hits].astype(np.int32)])
            at += len(part)
        return found[:count]

    def _follow(self, ahead: int, wanted: Callable[[Index], NDArray[np.bool_]]) -> None:
        """Rank all idle blocks if needed, or follow those that became idle."""
        pool = self._state.pool
        # Before ranking: if the policy fails, all ranks change.
        (idled, pool.idled), (left, pool.left) = (pool.idled, []), (pool.left, [])
        before, self._ahead = self._ahead, ahead
        if idled is None or ahead != before:
            self._rank_all()
            return
        if idled:
            self._add(np.concatenate(idled), wanted)
        if left is None:
            self._mark()
        elif left or idled:
            self._look_again(np.concatenate([*left, *idled]))
        num_gone = len(self._blocks) - self._num_here
        self._num_near = ahead - pool.num_free + num_gone
        if self._num_near > len(self._blocks) and self._bound < np.inf:
            self._rank_all()

    def _mark(self) -> None:
        """Find which ranked blocks are idle. O(blocks)."""
        self._is_ranked = np.zeros(self._state.pool.num_blocks, np.bool_)
        self._is_ranked[self._blocks] = True
        self._is_here = np.zeros_like(self._is_ranked)
        self._is_here[self._blocks] = self._are_idle(self._blocks)
        self._num_here = int(np.count_nonzero(self._is_here))

    def _look_again(self, changed: Index) -> None:
        """Update which ranked blocks of `changed` are idle. O(changed log changed)."""
        ours = np.unique(changed[self._is_ranked[changed]])
        self._num_here -= int(np.count_nonzero(self._is_here[ours]))
        self._is_here[ours] = now = self._are_idle(ours)
        self._num_here += int(np.count_nonzero(now))

    def _rank_all(self) -> None:
        self._bound = np.inf
        self._set(np.flatnonzero(self._are_idle(np.arange(self._state.pool.num_blocks))))

    def _add(self, idled: Index, wanted: Callable[[Index], NDArray[np.bool_]]) -> None:
        """Forget old ranks of blocks that became idle, and add those that leave soon."""
        again = np.flatnonzero(np.isin(self._blocks, idled))
        moved = again[self._rank(self._blocks[again]) != self._ranks[again]]
        self._seen -= int(np.count_nonzero(moved < self._seen))
        if len(moved):
            gone = self._blocks[moved]
            self._num_here -= int(np.count_nonzero(self._is_here[gone]))
            self._is_ranked[gone] = self._is_here[gone] = False
            kept = np.ones(len(self._blocks), np.bool_)
            kept[moved] = False
            self._blocks, self._ranks = self._blocks[kept], self._ranks[kept]
        new = idled[wanted(idled)]
        new = new[self._rank(new) <= self._bound]
        if len(new):
            both = np.union1d(self._blocks, new)
            both = both[self._are_idle(both)]
            self._set(both[self._rank(both) <= self._bound])

    def _are_idle(self, blocks: Index) -> NDArray[np.bool_]:
        return self._state.pool.cached[blocks] & self._state.evictor.idle(blocks)

    def _set(self, blocks: Index) -> None:
        """Keep the blocks that leave next, and some more. All `blocks` are idle."""
        self._num_near = self._ahead - self._state.pool.num_free
        ranks, most = self._rank(blocks), self._num_near + self._ahead // _SLACK_PART
        if most < len(blocks):
            self._bound = np.partition(ranks, most - 1)[most - 1] if most > 0 else -np.inf
            blocks, ranks = blocks[ranks <= self._bound], ranks[ranks <= self._bound]
        order = np.argsort(ranks, kind="stable")
        self._blocks, self._ranks, self._seen = blocks[order], ranks[order], 0
        self._mark()

    def _end(self) -> int:
        """Return the end of the blocks that leave soon, with all blocks of the last one's rank."""
        end = min(max(self._num_near, 0), len(self._blocks))
        return int(np.searchsorted(self._ranks, self._ranks[end - 1], "right")) if end else 0

    def _rank(self, blocks: Index) -> Float64 | Int64:
        return self._state.evictor.policy.rank(blocks)
