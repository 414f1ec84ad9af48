"""The blocks of one tier: free blocks, reference counts, and token ids.

    never used ──take──▶ held ──release──▶ free ──take──▶ held
                          │                  ▲
                          ├─release─▶ evictable ─uncache─┤     published in the prefix index
                          └─release─▶ kept ──────unhold──┘     pinned, or in an unfinished copy

Free blocks are a stack in an array; blocks that were never used are above a bump pointer. Both take
O(1) without a search, and unused memory is never paged in. The idea is mimalloc's (Leijen et al.,
2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant
from kvpager.plans import Int32, Int64

# Bits of `marks`: clean in a store (one bit each), offered, content key known, passing. See
# `kvpager.blocks.cached` and `groups/continuations.py`.
STORES, OFFERED, KEYED, PASSING = (1 << 7) - 1, 1 << 7, 1 << 8, 1 << 9
_IDLED_MAX = 1024  # arrays in `idled`, and in `left`
Index = NDArray[np.intp]
Blocks = NDArray[np.integer[Any]]  # block ids, whatever their width


class Ledger(Protocol):
    """An observer of freed and evictable blocks: see `kvpager.blocks.accounts`."""

    def freed(self, blocks: Index) -> None:
        """Record that these blocks are free."""

    def evictable(self, blocks: Index, change: int) -> None:
        """Record that these blocks became evictable (+1), or ceased to be (-1)."""


class Borrower(Protocol):
    """Another user of a pool's blocks: see `kvpager.blocks.host`. It calls no manager."""

    def borrow(self, blocks: Int32) -> None:
        """Use these blocks until `give_back`."""

    def give_back(self, count: int) -> Sequence[int]:
        """Return `count` borrowed blocks; none if it cannot spare as many."""


class BlockPool:
    """A set of blocks with a reference count each.

    `refs[b]`: the number of block tables that hold block `b`. `cached[b]`: it is published.
    `holds[b]`: the number of its pins and unfinished copies. A block is free if all three are 0.
    `ids[b]`: the token ids of its slots, as far as known. `marks[b]`: see `kvpager.blocks.cached`;
    publishing a block clears them. The first `num_reserved` blocks (the
    null block) are never handed out.
    """

    def __init__(self, num_blocks: int, block_size: int, num_reserved: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_reserved = num_reserved
        self.refs: Int32 = np.zeros(num_blocks, np.int32)
        self.cached: NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.holds: Int32 = np.zeros(num_blocks, np.int32)
        self.ids: Int32 = np.zeros((num_blocks, block_size), np.int32)
        self.marks: NDArray[np.uint16] = np.zeros(num_blocks, np.uint16)
        self.counts_dirty = False
        self.num_dropped_dirty = 0  # evicted blocks that no store had
        # Blocks that became idle since a reader set this to []; None if the reader must rank all.
        self.idled: list[Index] | None = None
        # Blocks that ceased to be idle since then; None if the reader must look at all.
        self.left: list[Index] | None = None
        self.num_evictable = 0
        self.num_kept = 0  # in no table, but held
        self.num_holds = 0
        self.num_lent = 0
        self.borrower: Borrower | None = None
        self._ledger: Ledger | None = None
        self._is_watched = False  # single blocks need the slow path, too
        self._stack: Int32 = np.empty(num_blocks, np.int32)
        self._stack_size = 0
        self._num_used_ever = num_reserved  # the bump pointer
        self._make_views()

    def _make_views(self) -> None:
        # A memoryview reads one number in half the time that an array takes.
        self._refs_view, self._stack_view = self.refs.data, self._stack.data
        self._cached_view = self.cached.data
        self._items = self.ids.view(f"V{self.ids[0:1].nbytes}").reshape(-1)

    # ---------------------------------------------------------------- counts, all O(1)

    @property
    def num_free(self) -> int:
        """Blocks that are free."""
        return self._stack_size + self.num_blocks - self._num_used_ever

    @property
    def num_never_used(self) -> int:
        """Blocks that were never handed out."""
        return self.num_blocks - self._num_used_ever

    @property
    def num_held(self) -> int:
        """Blocks that at least one block table holds."""
        idle = self.num_free + self.num_evictable + self.num_kept + self.num_lent
        return self.num_blocks - self.num_reserved - idle

    # ---------------------------------------------------------------- take and release

    def take(self, count: int, make_room: Callable[[], object] | None = None) -> Int32:
        """Hand out `count` blocks, each held once: int32 [count]. O(count).

        The caller ensures that `count` blocks are free, or that `make_room` frees the missing ones.
        """
        blocks = np.empty(count, np.int32)
        if make_room is not None:
            make_room()
        from_stack = min(count, self._stack_size)
        base = self._stack_size - from_stack
        blocks[:from_stack] = self._stack[base : base + from_stack]
        if from_stack < count:
            first = self._num_used_ever
            blocks[from_stack:] = np.arange(first, first + count - from_stack)
        index = blocks.astype(np.intp, copy=False)
        # Allocate memory first: if it runs out, no block was taken.
        self._stack_size = base
        self._num_used_ever += count - from_stack
        self.refs[index] = 1
        return blocks

    def take_one(self) -> int:
        """Like `take(1)`, as a plain int. O(1)."""
        size = self._stack_size - 1
        if size >= 0:
            self._stack_size = size
            block: int = self._stack_view[size]
        else:
            block = self._num_used_ever
            self._num_used_ever = block + 1
        self._refs_view[block] = 1
        return block

    def share(self, blocks: Blocks, times: int = 1) -> None:
        """Add `times` references to each of the distinct `blocks`. O(blocks)."""
        # Here and below: NumPy indexes several times faster by intp than by int32.
        index = blocks.astype(np.intp, copy=False)
        refs = self.refs[index]
        if np.count_nonzero(refs) < len(refs):
            idle = index[refs == 0]
            self.marks[idle] &= ~np.uint16(OFFERED)
            if self.num_holds:
                kept = self.holds[idle] > 0
                self.num_kept -= int(np.count_nonzero(kept))
                idle = idle[~kept]
            self._count_evictable(idle, -1)
        self.refs[index] = refs + times

    def release(self, blocks: Blocks, times: int | Int32 = 1) -> Index:
        """Drop `times` references to each of the distinct `blocks`. O(blocks).

        Returns the blocks that became evictable. Blocks without references and holds are freed.
        """
        index = blocks.astype(np.intp, copy=False)
        refs = self.refs[index] - times
        self.refs[index] = refs
        return self._settle(index[refs == 0] if np.count_nonzero(refs) else index)

    def release_one(self, block: int) -> bool:
        """Release one block. Return True if it became evictable. O(1)."""
        view = self._refs_view
        if view[block] != 1 or self._is_watched or self._cached_view[block]:
            return len(self.release(np.array([block], np.int32))) > 0
        view[block] = 0
        size = self._stack_size
        self._stack_view[size] = block
        self._stack_size = size + 1
        return False

    def watch(self, ledger: Ledger | None) -> None:
        """Report to `ledger` from now on. O(1)."""
        self._ledger = ledger
        self._is_watched = bool(self.num_holds or ledger)

    # ---------------------------------------------------------------- another user

    def lend(self) -> None:
        """Lend all free blocks to the borrower. O(blocks)."""
        assert self.borrower is not None
        fresh = np.arange(self._num_used_ever, self.num_blocks, dtype=np.int32)
        blocks = np.concatenate([self._stack[: self._stack_size], fresh])
        self._stack_size, self._num_used_ever = 0, self.num_blocks
        self.num_lent += len(blocks)
        self.borrower.borrow(blocks)

    def call_back(self, count: int) -> None:
        """Take lent blocks back so that `count` are free, if the borrower can spare them. O(n)."""
        if self.borrower is not None and count > self.num_free:
            blocks = np.array(self.borrower.give_back(count - self.num_free), np.intp)
            self.num_lent -= len(blocks)
            self._push(blocks)

    # ---------------------------------------------------------------- the prefix index, and holds

    def cache(self, blocks: Blocks) -> None:
        """Mark `blocks`, which tables hold, as published. O(blocks)."""
        index = blocks.astype(np.intp, copy=False)
        self.cached[index] = True
        self.marks[index] = 0

    def uncache(self, blocks: Blocks) -> None:
        """Mark `blocks` as not published; free those without references and holds. O(blocks)."""
        index = blocks.astype(np.intp, copy=False)
        self.cached[index] = False
        if self.counts_dirty:
            self.num_dropped_dirty += int(
                np.count_nonzero(self.marks[index] & (STORES | PASSING) == 0)
            )
        refs = self.refs[index]
        idle = index[refs == 0] if np.count_nonzero(refs) else index
        if self.num_holds:
            idle = idle[self.holds[idle] == 0]
        self._count_evictable(idle, -1)
        self._push(idle)

    def hold(self, blocks: Blocks) -> None:
        """Add a hold to each of the distinct `blocks`, none of them free. O(blocks)."""
        index = blocks.astype(np.intp, copy=False)
        idle = index[(self.holds[index] == 0) & (self.refs[index] == 0)]
        self._count_evictable(idle, -1)
        self.num_kept += len(idle)
        self.num_holds += len(index)
        self._is_watched = True
        self.holds[index] += 1

    def unhold(self, blocks: Blocks) -> Index:
        """Remove a hold from each of the distinct `blocks`. O(blocks).

        Returns the blocks that became evictable. Blocks without references and holds are freed.
        """
        index = blocks.astype(np.intp, copy=False)
        self.holds[index] -= 1
        self.num_holds -= len(index)
        self._is_watched = bool(self.num_holds or self._ledger)
        idle = index[(self.holds[index] == 0) & (self.refs[index] == 0)]
        self.num_kept -= len(idle)
        return self._settle(idle)

    def _settle(self, idle: Index) -> Index:
        """Free, keep or make evictable the blocks that no table holds."""
        if self.num_holds and len(idle):
            kept = self.holds[idle] > 0
            self.num_kept += int(np.count_nonzero(kept))
            idle = idle[~kept]
        cached = self.cached[idle]
        num_cached = np.count_nonzero(cached)
        if not num_cached:
            self._push(idle)
            return _NONE
        if num_cached < len(idle):
            self._push(idle[~cached])
            idle = idle[cached]
        self._count_evictable(idle, 1)
        self.note_idle(idle)
        return idle

    def note_idle(self, blocks: Index) -> None:
        """Record that blocks became idle. O(blocks)."""
        if self.idled is not None:
            self.idled.append(blocks.copy())
            if len(self.idled) > _IDLED_MAX:
                self.idled = None

    def _push(self, blocks: Index) -> None:
        self._stack[self._stack_size : self._stack_size + len(blocks)] = blocks
        self._stack_size += len(blocks)
        if self._ledger:
            self._ledger.freed(blocks)

    def _count_evictable(self, blocks: Index, change: int) -> None:
        self.num_evictable += change * len(blocks)
        if change < 0 and self.left is not None:
            self.left.append(blocks.copy())
            if len(self.left) > _IDLED_MAX:
                self.left = None
        if self._ledger:
            self._ledger.evictable(blocks, change)

    # ---------------------------------------------------------------- resize, check

    def write_ids(self, blocks: Blocks, ids: Int32) -> None:
        """Store the token ids of `blocks`, consecutively. O(ids)."""
        size = self.ids.shape[1]
        num_full = len(ids) // size
        # Writing a block's ids as one item is three times as fast as a scatter of rows.
        whole = np.ascontiguousarray(ids[: num_full * size]).view(self._items.dtype)
        self._items[blocks[:num_full].astype(np.intp)] = whole
        if num_full * size < len(ids):
            self.ids[blocks[num_full], : len(ids) - num_full * size] = ids[num_full * size :]

    def write_slots(self, slots: Int64, ids: Int32) -> None:
        """Store the token ids of these flat slots. O(ids)."""
        self.ids.reshape(-1)[slots] = ids

    def copy_ids(self, copies: Int32) -> None:
        """Copy the token ids along with these copies. O(blocks)."""
        self.ids[copies[:, 1]] = self.ids[copies[:, 0]]

    def receive(self, blocks: Blocks, ids: Int32, holders: Int32) -> None:
        """Set the ids and holders of `blocks`, which were taken for another tier's. O(blocks)."""
        self.ids[blocks] = ids
        self.refs[blocks] = holders

    def count_idle(self, blocks: Blocks) -> int:
        """Return how many of `blocks` are evictable. O(blocks)."""
        idle = self.cached[blocks] & (self.refs[blocks] == 0) & (self.holds[blocks] == 0)
        return int(np.count_nonzero(idle))

    def in_use(self) -> NDArray[np.bool_]:
        """Return which blocks are not free, bool [num_blocks]. O(num_blocks)."""
        return (self.refs > 0) | self.cached | (self.holds > 0)

    def resize(self, num_blocks: int, moved: Int32) -> None:
        """Change the number of blocks; `moved`: (old, new) ids of blocks cut off. O(n)."""
        old, new = moved.T
        for name in ("refs", "cached", "holds", "ids", "marks"):
            before = getattr(self, name)
            after = np.zeros((num_blocks, *before.shape[1:]), before.dtype)
            kept = min(num_blocks, len(before))
            after[:kept] = before[:kept]
            after[new] = before[old]
            setattr(self, name, after)
        self.idled = None
        self.marks &= np.uint16(STORES | PASSING)  # a moved block does not take its key along
        num_used_ever = max([min(self._num_used_ever, num_blocks), *(new + 1)])
        free = self._stack[: self._stack_size]
        free = free[(free < num_blocks) & ~np.isin(free, new)]
        skipped = np.setdiff1d(np.arange(self._num_used_ever, num_used_ever, dtype=np.int32), new)
        self.num_blocks = num_blocks
        self._stack = np.empty(num_blocks, np.int32)
        self._make_views()
        self._recount(np.concatenate([skipped, free]), num_used_ever)

    def _recount(self, free: Int32, num_used_ever: int) -> None:
        """Set the free blocks of a pool whose counts are set already. O(blocks)."""
        self._stack[: len(free)] = free
        self._stack_size = len(free)
        self._num_used_ever = num_used_ever
        idle = self.refs == 0
        self.num_holds = int(self.holds.sum())
        self._is_watched = bool(self.num_holds or self._ledger)
        self.num_kept = int(np.count_nonzero(idle & (self.holds > 0)))
        self.num_evictable = int(np.count_nonzero(idle & self.cached & (self.holds == 0)))

    def check(self, tier: str, holders: Int32) -> None:
        """Raise `BrokenInvariant` unless counts agree with `holders`, tables per block. O(n)."""
        if not 0 <= self._stack_size <= self._num_used_ever <= self.num_blocks:
            raise BrokenInvariant(
                f"{tier} pool: {self._stack_size} free again of {self._num_used_ever} used ever, "
                f"of {self.num_blocks}"
            )
        wrong = np.flatnonzero(self.refs != holders)
        if len(wrong):
            raise BrokenInvariant(
                f"{tier} block {wrong[0]}: refcount {self.refs[wrong[0]]}, "
                f"but {holders[wrong[0]]} tables hold it"
            )
        free = self._stack[: self._stack_size]
        if len(np.unique(free)) != len(free):
            raise BrokenInvariant(f"{tier} pool: a block is on the free list twice")
        if np.any(free >= self._num_used_ever) or np.any(free < self.num_reserved):
            raise BrokenInvariant(f"{tier} pool: a block that was never used is on the free list")
        taken = self.in_use()
        if np.any(taken[free]):
            raise BrokenInvariant(
                f"{tier} block {free[taken[free]][0]}: on the free list and in use"
            )
        if np.any(taken[self._num_used_ever :]) or np.any(taken[: self.num_reserved]):
            raise BrokenInvariant(f"{tier} pool: a block that was never handed out is in use")
        idle = self.refs == 0
        evictable = int(np.count_nonzero(idle & self.cached & (self.holds == 0)))
        kept = int(np.count_nonzero(idle & (self.holds > 0)))
        counted = (self.num_evictable, self.num_kept, self.num_holds)
        if counted != (evictable, kept, int(self.holds.sum())) or np.any(self.holds < 0):
            raise BrokenInvariant(
                f"{tier} pool: evictable, kept, holds counted as {counted}, "
                f"but a recount finds {(evictable, kept, int(self.holds.sum()))}"
            )
        num_ours = self.num_blocks - self.num_reserved - self.num_lent
        if int(np.count_nonzero(taken)) + self.num_free != num_ours:
            raise BrokenInvariant(
                f"{tier} pool: {np.count_nonzero(taken)} in use + {self.num_free} free "
                f"is not {num_ours}"
            )


_NONE: Index = np.empty(0, np.intp)
