"""Prefixes that stay cached, or stay longer than others: `manager.pins`."""

from __future__ import annotations

from kvpager import _validate as arguments
from kvpager.blocks.policies.priority import PRIORITY_MAX
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, Int32


class Pins:
    """Keeps published blocks cached. Thread-safe.

    Writes the holds of the device pool, through the fences, and the policy's priorities.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def pin(self, sequence: SequenceHandle) -> int:
        """Keep the published blocks of this sequence cached, also after `free`. O(blocks).

        Returns the ticket for `unpin`. Raises: `StaleSequence`, `SequenceSwapped`, `ValueError`
        if other namespaces' floors need the blocks.
        """
        state = self._state
        with state.lock, state.change:
            return state.pin(
                self._published(state.resident_row(sequence)),
                "sequence: pinning it would leave too few blocks for the floors",
            )

    def unpin(self, ticket: int) -> None:
        """End a pin. O(blocks). Raises: `ValueError` for a ticket that is no open pin."""
        state = self._state
        with state.lock, state.change:
            state.unpin(ticket)

    def retain(self, sequence: SequenceHandle, priority: int, ttl_s: float | None = None) -> None:
        """Rank the published blocks of this sequence by `priority`, 0 (evicted first) to 100.

        After `ttl_s` seconds the blocks are evicted first. O(blocks).
        Raises: `ValueError` unless the manager was made with `eviction="priority"`.
        """
        priority = arguments.count("priority", priority, at_most=PRIORITY_MAX)
        if ttl_s is not None:
            ttl_s = arguments.seconds("ttl_s", ttl_s)
        state = self._state
        with state.lock, state.change:
            blocks = self._published(state.resident_row(sequence))
            state.change.begin()
            try:
                is_known = state.evictor.policy.retain(blocks, priority, ttl_s)
            except Exception:  # of the policy's clock, which it reads before it changes
                state.change.end()
                raise
            if not is_known:
                state.change.end()
                raise ValueError('priority: the policy has none. Use eviction="priority".')
            state.evictor.enqueue_idle(blocks)

    def _published(self, row: int) -> Int32:
        # The index may have duplicates in place of the sequence's own blocks.
        rows, forest = self._state.rows, self._state.forest
        position = int(rows.published[row])
        node = forest.locate(rows.nodes[row], position) if position else None
        return NO_BLOCKS if node is None else forest.path(node, position)
