"""Publish the full blocks of committed tokens."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.state import BlockState
from kvpager.plans import Int64


class Publication:
    """Publishes the full, committed blocks of sequences. The caller holds the lock.

    Writes `committed`, `published`, `duplicates` and `nodes` of the rows it is given.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def commit_row(self, row: int, length: int | None) -> None:
        """Record that the KV of a row's first `length` tokens is written. O(new full blocks)."""
        state, table = self._state, self._state.rows
        settled = int(table.lengths[row]) - int(table.speculative[row])
        arguments.within_one("length", length, settled)
        state.change.begin()
        length = settled if length is None else length
        if length > table.committed[row]:
            table.committed[row] = length
        full = min(int(table.committed[row]), int(table.known[row])) >> state.shift
        if full > table.published[row] or table.duplicates[row]:
            self._publish(row, full)
        state.index.settle()

    def commit(self, rows: Int64, length: int | Int64 | None) -> None:
        """Do as `commit_row` for several rows. O(rows + new full blocks)."""
        state, table = self._state, self._state.rows
        settled = table.lengths[rows] - table.speculative[rows]
        if length is not None:
            arguments.within("length", length, settled)
            settled = np.broadcast_to(np.asarray(length, np.int64), settled.shape)
        state.change.begin()
        committed = np.maximum(table.committed[rows], settled)
        table.committed[rows] = committed
        full = np.minimum(committed, table.known[rows]) >> state.shift
        news = ((full > table.published[rows]) | table.duplicates[rows]).nonzero()[0]
        for row, end in zip(rows[news].tolist(), full[news].tolist(), strict=True):
            self._publish(row, end)
        state.index.settle()

    def _publish(self, row: int, end: int) -> None:
        state, table, index = self._state, self._state.rows, self._state.index
        who, position = table.prompt(row), int(table.published[row])
        node = state.forest.locate(table.nodes[row], position) if position else None
        if node is None:
            # No block is published yet. Or the chain is broken, because duplicates of another
            # sequence were evicted. Publish the row's own blocks, from the front.
            node, position = index.root(who.tree) if end else None, 0
            table.duplicates[row] = False
        if position < end and node is not None:
            node, is_duplicate = index.publish(
                node, position, table.tables.part(row, position, end), who.mm_hashes
            )
            table.duplicates[row] |= is_duplicate
        table.nodes[row], table.published[row] = node, end
