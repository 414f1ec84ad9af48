"""Prefixes that stay cached, or stay longer than others: `manager.pins`."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.policies.priority import PRIORITY_MAX
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, Int32


class Pins:
    """Keeps what the prefix index offers. Its methods are as safe to share as the manager's.

    Writes the holds of the device pool, through the fences, and the policy's priorities.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def pin(self, sequence: SequenceHandle) -> int:
        """Keep what the index offers of this sequence, also when it is freed. O(blocks).

        Returns the ticket for `unpin`. Raises: `StaleSequence`, `SequenceSwapped`, `ValueError`
        where other namespaces' floors need the blocks.
        """
        state = self._state
        with state.lock, state.change:
            blocks = self._offered(state.resident_row(sequence))
            pool = state.pool
            idle = (pool.refs[blocks] == 0) & (pool.holds[blocks] == 0)
            if state.accounts.shortfall(pool, fewer=int(np.count_nonzero(idle))) > 0:
                raise ValueError("too few blocks would be left for what floors promise")
            state.change.begin()
            return state.fences.pin(blocks)

    def unpin(self, ticket: int) -> None:
        """End a pin. O(blocks). Raises: `ValueError` for a ticket that is not one, or was used."""
        state = self._state
        with state.lock, state.change:
            state.fences.refuse_no_pin(ticket)
            state.change.begin()
            state.evictor.release(state.fences.unpin(ticket))

    def retain(self, sequence: SequenceHandle, priority: int, ttl_s: float | None = None) -> None:
        """Rank what the index offers of this sequence by `priority`, 0 (leaves first) to 100.

        `ttl_s`: for so many seconds; then it is the first to leave. O(blocks).
        Raises: `ValueError` where the manager was not made with `eviction="priority"`.
        """
        priority = arguments.count("priority", priority, at_most=PRIORITY_MAX)
        if ttl_s is not None:
            ttl_s = arguments.seconds("ttl_s", ttl_s)
        state = self._state
        with state.lock, state.change:
            blocks = self._offered(state.resident_row(sequence))
            state.change.begin()
            try:
                is_known = state.evictor.policy.retain(blocks, priority, ttl_s)
            except Exception:  # of the policy's clock, which it reads before it changes
                state.change.end()
                raise
            if not is_known:
                state.change.end()
                raise ValueError('this policy knows no priorities; use eviction="priority"')
            state.evictor.enqueue_idle(blocks)

    def _offered(self, row: int) -> Int32:
        # Perhaps not its own: an equal prefix may have been offered before.
        rows, forest = self._state.rows, self._state.forest
        position = int(rows.published[row])
        node = forest.locate(rows.nodes[row], position) if position else None
        return NO_BLOCKS if node is None else forest.path(node, position)
