"""Resize the device pool at run time."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.state import BlockState
from kvpager.errors import OutOfBlocks
from kvpager.plans import NO_COPIES, CopyPlan


class Resize:
    """Grows and shrinks the device pool, and clears the prefix cache.

    Writes no array itself: `BlockState.resize` replaces those of the pool, and the entries of
    block tables that name a block that moved.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def grow(self, num_blocks: int) -> None:
        """See `BlockManager.grow`. O(num_blocks)."""
        state = self._state
        with state.lock, state.change:
            least = state.pool.num_blocks
            num_blocks = arguments.count("num_blocks", num_blocks, at_least=least)
            if state.fences.cut_off:
                raise ValueError(
                    "num_blocks: the plan of `shrink` is unfinished. Complete it first."
                )
            state.change.begin()
            state.resize(num_blocks, NO_COPIES)

    def shrink(self, num_blocks: int) -> CopyPlan:
        """See `BlockManager.shrink`. O(num_blocks)."""
        state = self._state
        with state.lock, state.change:
            pool = state.pool
            least = pool.num_reserved + 1
            num_blocks = arguments.count(
                "num_blocks", num_blocks, at_least=least, at_most=pool.num_blocks
            )
            excess = self._excess(num_blocks)
            num_beyond = int(np.count_nonzero(pool.in_use()[num_blocks:]))
            copies = np.empty((num_beyond, 2), np.int32)
            plan = CopyPlan(copies, "device", "device", state.fences.ticket(copies))
            state.change.begin()
            state.evict(excess, {} if state.accounts.limits else None)
            in_use = pool.in_use()
            old = in_use[num_blocks:].nonzero()[0] + num_blocks
            places = (~in_use[:num_blocks]).nonzero()[0]
            copies.resize((len(old), 2), refcheck=False)  # in place: some blocks were evicted
            copies[:, 0], copies[:, 1] = old, places[places >= pool.num_reserved][: len(old)]
            state.resize(num_blocks, copies)
            state.moved(copies, plan.ticket, "device", "device", "moved")
            return plan

    def _excess(self, num_blocks: int) -> int:
        """Return how many blocks to evict first. Raises: as `BlockManager.shrink`."""
        pool, accounts = self._state.pool, self._state.accounts
        if pool.holds[num_blocks:].any():
            raise ValueError(
                f"num_blocks={num_blocks}: a higher block is pinned or in an unfinished copy"
            )
        room = num_blocks - pool.num_reserved
        excess = pool.num_held + pool.num_kept + pool.num_evictable - room
        can_leave = accounts.num_may_leave(pool)
        if excess > can_leave:
            need = room + excess - can_leave
            raise OutOfBlocks(need, room, 0, pool.num_blocks, "remaining device")
        if accounts.shortfall(pool, fewer=pool.num_blocks - num_blocks) > 0:
            raise ValueError(f"num_blocks={num_blocks}: too few blocks for the floors")
        return excess

    def clear_prefix_cache(self) -> int:
        """See `BlockManager.clear_prefix_cache`. O(cached)."""
        state = self._state
        with state.lock, state.change:
            free = state.pool.num_free
            state.change.begin()
            state.evict(state.pool.num_evictable, None)
            return state.pool.num_free - free
