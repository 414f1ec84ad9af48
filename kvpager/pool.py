"""The blocks of one tier: which are free, who holds the rest.

    never used ──take──▶ held ──release──▶ free ──take──▶ held
                          │                  ▲
                          └─release─▶ cached only ─uncache─┘        (blocks the prefix index keeps)

Free blocks are an array used as a stack; blocks never handed out yet are a bump pointer. Both are
O(1) with no search, and a block is first touched as late as possible: memory that was never
needed is never paged in. The idea of the pair is mimalloc's (Leijen et al., 2019).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant

Int32 = NDArray[np.int32]


class BlockPool:
    """A fixed set of blocks with a reference count each.

    `refs[b]` is the number of block tables that hold block `b`; `cached[b]` says that the prefix
    index holds it as well. A block is reusable when neither does.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs: Int32 = np.zeros(num_blocks, np.int32)
        self.cached: NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.num_cached_only = 0
        self._stack: Int32 = np.empty(num_blocks, np.int32)
        self._stack_size = 0
        self._num_used_ever = 0  # the bump pointer

    @property
    def num_free(self) -> int:
        """Blocks that can be taken right now. O(1)."""
        return self._stack_size + self.num_blocks - self._num_used_ever

    @property
    def num_never_used(self) -> int:
        """Blocks that were never handed out. O(1)."""
        return self.num_blocks - self._num_used_ever

    @property
    def num_held(self) -> int:
        """Blocks that at least one block table holds. O(1)."""
        return self.num_blocks - self.num_free - self.num_cached_only

    def grow(self, num_blocks: int) -> None:
        """Raise the pool to `num_blocks`. O(num_blocks)."""
        extra = num_blocks - self.num_blocks
        refs = np.concatenate([self.refs, np.zeros(extra, np.int32)])
        cached = np.concatenate([self.cached, np.zeros(extra, np.bool_)])
        stack = np.concatenate([self._stack, np.empty(extra, np.int32)])
        self.refs, self.cached, self._stack, self.num_blocks = refs, cached, stack, num_blocks

    def take(self, count: int) -> Int32:
        """Hand out `count` blocks, each held once: int32 [count]. O(count).

        The caller made sure that there are so many.
        """
        from_stack = min(count, self._stack_size)
        self._stack_size -= from_stack
        blocks = np.empty(count, np.int32)
        blocks[:from_stack] = self._stack[self._stack_size : self._stack_size + from_stack]
        fresh = count - from_stack
        blocks[from_stack:] = np.arange(self._num_used_ever, self._num_used_ever + fresh)
        self._num_used_ever += fresh
        self.refs[blocks] = 1
        return blocks

    def share(self, blocks: Int32, times: int = 1) -> None:
        """Let `times` more tables hold each of the distinct `blocks`. O(blocks)."""
        self.num_cached_only -= int(np.count_nonzero(self.refs[blocks] == 0))
        self.refs[blocks] += times

    def release(self, blocks: Int32) -> Int32:
        """Let one table less hold each of the distinct `blocks`. O(blocks).

        Returns those that only the prefix index keeps now; the others nobody holds are free.
        """
        refs = self.refs[blocks] - 1
        self.refs[blocks] = refs
        idle = blocks[refs == 0]
        kept = self.cached[idle]
        self._push(idle[~kept])
        cached_only: Int32 = idle[kept]
        self.num_cached_only += len(cached_only)
        return cached_only

    def cache(self, block: int) -> None:
        """The prefix index now holds `block`, which a table holds too. O(1)."""
        self.cached[block] = True

    def uncache(self, blocks: Int32) -> None:
        """The prefix index lets go of `blocks`; those no table holds are free now. O(blocks)."""
        self.cached[blocks] = False
        idle = blocks[self.refs[blocks] == 0]
        self.num_cached_only -= len(idle)
        self._push(idle)

    def _push(self, blocks: Int32) -> None:
        self._stack[self._stack_size : self._stack_size + len(blocks)] = blocks
        self._stack_size += len(blocks)

    def check(self, tier: str, holders: Int32) -> None:
        """Raise `BrokenInvariant` unless the books agree with `holders`, tables per block. O(n)."""
        if not 0 <= self._stack_size <= self._num_used_ever <= self.num_blocks:
            raise BrokenInvariant(
                f"{tier} pool: {self._stack_size} free again of {self._num_used_ever} used ever, "
                f"of {self.num_blocks}"
            )
        wrong = np.flatnonzero(self.refs != holders)
        if len(wrong):
            block = int(wrong[0])
            raise BrokenInvariant(
                f"{tier} block {block}: refcount {self.refs[block]}, "
                f"but {holders[block]} tables hold it"
            )
        free = self._stack[: self._stack_size]
        if len(np.unique(free)) != len(free):
            raise BrokenInvariant(f"{tier} pool: a block stands twice on the free list")
        if np.any(free >= self._num_used_ever) or np.any(free < 0):
            raise BrokenInvariant(f"{tier} pool: a never used block stands on the free list")
        taken = (self.refs > 0) | self.cached
        if np.any(taken[free]):
            block = int(free[taken[free]][0])
            raise BrokenInvariant(f"{tier} block {block}: on the free list and in use")
        if np.any(taken[self._num_used_ever :]):
            raise BrokenInvariant(f"{tier} pool: a block beyond the bump pointer is in use")
        cached_only = int(np.count_nonzero(self.cached & (self.refs == 0)))
        if cached_only != self.num_cached_only:
            raise BrokenInvariant(
                f"{tier} pool: counts {self.num_cached_only} blocks as cached only, "
                f"but {cached_only} are"
            )
        held = int(np.count_nonzero(self.refs))
        if held + cached_only + self.num_free != self.num_blocks:
            raise BrokenInvariant(
                f"{tier} pool: {held} held + {cached_only} cached + {self.num_free} free "
                f"is not {self.num_blocks}"
            )
