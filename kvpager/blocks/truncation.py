"""Sequences that lose their last tokens, or the blocks behind a sliding window."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.block_tables import ranks
from kvpager.blocks.state import BlockState
from kvpager.plans import Int64


class Truncation:
    """Gives back blocks at either end of a sequence. The caller holds the lock.

    Writes the block tables and all columns of the rows it shortens but `swapped`.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens, if they are there. O(blocks given back).

        Raises: `ValueError` where `length` is more than there is, or in blocks given back.
        """
        state, rows = self._state, self._state.rows
        arguments.within("length", length, rows.lengths[[row]])
        first = int(rows.first_blocks[row]) * state.block_size
        if length < first:
            raise ValueError(
                f"length {length} is before token {first}, the first one "
                "this sequence kept; allocate it anew"
            )
        state.change.begin()
        self.shorten(row, length)

    def shorten(self, row: int, length: int) -> None:
        """Keep the first `length` tokens; the change has begun. O(blocks given back)."""
        state, rows = self._state, self._state.rows
        keep = -(-length // state.block_size)
        dropped = rows.blocks(row)[keep:].copy()
        rows.blocks(row)[keep:] = -1
        rows.tables.trim(row, keep)
        gone = int(rows.lengths[row]) - length
        rows.lengths[row] = length
        for column in (rows.known, rows.committed):
            column[row] = min(int(column[row]), length)
        rows.published[row] = min(int(rows.published[row]), length // state.block_size)
        rows.prompts[row] = rows.prompt(row).up_to(length)
        if rows.speculative[row]:
            rows.set_speculative(np.array([row]), max(0, int(rows.speculative[row]) - gone))
        state.release(dropped)

    def drop_before(self, rows: Int64, starts: Int64) -> None:
        """Give back the blocks that lie wholly before `starts`. O(blocks given back).

        Raises: `ValueError` for a start beyond the end, or beyond the first speculative token.
        """
        table = self._state.rows
        # Drafts may be taken back, and then the tokens before them are the last ones.
        arguments.within("start", starts, table.lengths[rows] - table.speculative[rows])
        self._state.change.begin()
        self.release_before(rows, starts)

    def release_before(self, rows: Int64, starts: Int64) -> None:
        """Release the blocks before valid `starts`; the change has begun. O(blocks released)."""
        state, table = self._state, self._state.rows
        firsts = starts >> state.shift
        moved = (firsts > table.first_blocks[rows]).nonzero()[0]
        if not len(moved):
            return
        rows, firsts = rows[moved], firsts[moved]
        counts, tables = firsts - table.first_blocks[rows], table.tables
        behind = np.repeat(tables.starts[rows] + table.first_blocks[rows], counts) + ranks(counts)
        blocks = tables.data[behind]
        tables.data[behind] = -1
        table.first_blocks[rows] = firsts
        for row in rows[~table.keyed[rows]].tolist():
            # What lacks its front cannot be offered, nor go on where it was.
            table.known[row] = table.published[row] = 0
            table.nodes[row] = None
        if len(rows) == 1:
            state.release(blocks)
        else:  # forks may free the same blocks
            distinct, times = np.unique(blocks, return_counts=True)
            state.release(distinct, times.astype(np.int32))
