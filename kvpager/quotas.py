"""How many device blocks a namespace may have at most, and can always get.

A namespace's blocks are those its sequences hold and those that stay cached for it; no block ever
belongs to two. Its `ceiling` bounds their number. Its `floor` is kept for it: as long as its
sequences hold fewer, nobody else can take the difference, nor evict what is cached within it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant
from kvpager.pool import BlockPool, Blocks

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Quota:
    """Blocks of one namespace: `floor` at least, `ceiling` at most (None: as many as there are)."""

    floor: int = 0
    ceiling: int | None = None


class Quotas:
    """Counts by namespace. Owner 0 stands for all namespaces without a quota."""

    def __init__(self, num_blocks: int) -> None:
        self.limits: dict[str | None, Quota] = {}
        self._numbers: dict[str | None, int] = {}
        self._owner: Int32 = np.zeros(num_blocks, np.int32)
        self._used: Int64 = np.zeros(1, np.int64)
        self._evictable: Int64 = np.zeros(1, np.int64)

    def owner(self, namespace: str | None) -> int:
        """The number under which a namespace's blocks are counted. O(1)."""
        return self._numbers.get(namespace, 0)

    def used(self, namespace: str | None) -> int:
        """Blocks held by and cached for a namespace that has a quota. O(1)."""
        return int(self._used[self._numbers[namespace]])

    def num_evictable(self, namespace: str | None) -> int:
        """Cached blocks of a namespace that has a quota. O(1)."""
        return int(self._evictable[self._numbers[namespace]])

    def excess(self, namespace: str | None) -> int:
        """Blocks that a namespace has beyond its ceiling. O(1)."""
        ceiling = self.limits[namespace].ceiling
        return 0 if ceiling is None else max(0, self.used(namespace) - ceiling)

    def recount(
        self,
        limits: dict[str | None, Quota],
        pool: BlockPool,
        owned: Iterable[tuple[str | None, Int32]],
    ) -> None:
        """Begin anew with these quotas; `owned` says whose each block in use is. O(blocks)."""
        self.limits = limits
        self._numbers = {namespace: number for number, namespace in enumerate(limits, start=1)}
        self._owner = np.zeros(pool.num_blocks, np.int32)
        for namespace, blocks in owned:
            self._owner[blocks] = self.owner(namespace)
        idle = pool.cached & (pool.refs == 0) & (pool.holds == 0)
        size = len(limits) + 1
        self._used = np.bincount(self._owner[pool.in_use()], minlength=size)
        self._evictable = np.bincount(self._owner[idle], minlength=size)

    def parked(self, pool: BlockPool) -> list[tuple[str | None, Int32]]:
        """Whose the blocks were that nobody has any more, but a copy of which is under way."""
        blocks = ((pool.refs == 0) & ~pool.cached & (pool.holds > 0)).nonzero()[0]
        blocks = blocks[blocks < len(self._owner)].astype(np.int32)
        owners = self._owner[blocks]
        return [(name, blocks[owners == number]) for name, number in self._numbers.items()]

    # ---------------------------------------------------------------- what the pool reports

    def charge(self, blocks: Blocks, owners: int | Int64) -> None:
        """`blocks` were taken for their owners. O(blocks)."""
        self._owner[blocks] = owners
        self._used += self.count(blocks)

    def freed(self, blocks: Index) -> None:
        """See `kvpager.pool.Ledger`."""
        self._used -= np.bincount(self._owner[blocks], minlength=len(self._used))

    def evictable(self, blocks: Index, change: int) -> None:
        """See `kvpager.pool.Ledger`."""
        owners = np.bincount(self._owner[blocks], minlength=len(self._used))
        self._evictable += change * owners

    # ---------------------------------------------------------------- what may be taken

    def refusal(
        self, need: Int64, revived: Int64, pool: BlockPool
    ) -> tuple[int, int, str, int] | None:
        """Why `need` blocks of each owner cannot be had: (need, evictable, advice, missing).

        `revived`: cached blocks of each owner that the same call is about to hold. O(owners).
        """
        evictable = self._evictable - revived
        for namespace, number in self._numbers.items():
            ceiling = self.limits[namespace].ceiling
            over = self._used[number] + need[number] - evictable[number]
            if ceiling is not None and need[number] and over > ceiling:
                advice = (
                    f"namespace {namespace!r} may have {ceiling} blocks: free or swap a sequence "
                    "of it, or raise its ceiling"
                )
                return int(need[number]), int(evictable[number]), advice, int(over) - ceiling
        total = int(need.sum())
        can_leave = int((evictable - self._guarded(need, revived, evictable)).sum())
        kept = int(np.maximum(self._unmet(need, revived) - evictable, 0).sum())
        missing = total - (pool.num_free - kept + can_leave)
        if missing > 0:
            advice = "the floors of other namespaces keep the rest; free a sequence"
            return total, can_leave, advice, missing
        return None

    def forced(self, need: Int64) -> Int64:
        """How many of its own cached blocks each owner must give up for its ceiling. O(owners)."""
        forced = np.zeros(len(need), np.int64)
        for namespace, number in self._numbers.items():
            ceiling = self.limits[namespace].ceiling
            if ceiling is not None and need[number]:
                forced[number] = max(0, self._used[number] + need[number] - ceiling)
        return forced

    def shortfall(self, pool: BlockPool, fewer: int = 0) -> int:
        """Blocks promised by floors that could not be had, were there `fewer` of them. O(owners).

        Never above 0 between calls: what would make it so is refused.
        """
        if not self.limits:
            return 0
        none = np.zeros(len(self._used), np.int64)
        return int(self._unmet(none, none).sum()) - (pool.num_free + pool.num_evictable - fewer)

    def allowances(self, need: Int64) -> dict[int, int]:
        """How many cached blocks of each owner may leave when `need` are taken. O(owners)."""
        none = np.zeros(len(need), np.int64)
        may_leave = self._evictable - self._guarded(need, none, self._evictable)
        return dict(enumerate(may_leave.tolist()))

    def by_owner(self, owners: Int32 | Int64) -> Int64:
        """How many blocks each owner wants, int64 [owners]. O(blocks)."""
        return np.bincount(owners, minlength=len(self._used))

    def count(self, blocks: Blocks) -> Int64:
        """How many of `blocks` each owner has, int64 [owners]. O(blocks)."""
        return self.by_owner(self._owner[blocks])

    def _unmet(self, need: Int64, revived: Int64) -> Int64:
        """What each owner's floor still promises after `need` blocks are taken. O(owners)."""
        floors = np.array([0, *(self.limits[name].floor for name in self._numbers)], np.int64)
        held = self._used - self._evictable + revived
        return np.maximum(floors - held - need, 0)

    def _guarded(self, need: Int64, revived: Int64, evictable: Int64) -> Int64:
        return np.minimum(evictable, self._unmet(need, revived))

    def check(self, pool: BlockPool, owned: Iterable[tuple[str | None, Int32]]) -> None:
        """Raise `BrokenInvariant` unless the counts are those of a recount. O(blocks)."""
        if not self.limits:
            return
        fresh = Quotas(pool.num_blocks)
        fresh.recount(self.limits, pool, owned)
        if fresh._used.tolist() != self._used.tolist():
            raise BrokenInvariant(f"quotas: count {self._used} blocks, but {fresh._used} are used")
        if fresh._evictable.tolist() != self._evictable.tolist():
            raise BrokenInvariant(
                f"quotas: count {self._evictable} evictable blocks, but {fresh._evictable} are"
            )
        if self.shortfall(pool) > 0:
            raise BrokenInvariant(f"quotas: {self.shortfall(pool)} promised blocks cannot be had")
        for namespace, quota in self.limits.items():
            if quota.ceiling is not None and fresh.used(namespace) > quota.ceiling:
                raise BrokenInvariant(f"quotas: namespace {namespace!r} has more than its ceiling")
