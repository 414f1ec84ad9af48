"""Drop the last tokens of a sequence, or its blocks behind a sliding window."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.block_tables import ranks
from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_visible
from kvpager.plans import NO_BLOCKS, Int64


class Truncation:
    """Releases blocks at either end of a sequence. The caller holds the lock.

    Writes the block tables and all columns of the rows it shortens but `swapped`.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence. O(blocks released)."""
        state, rows = self._state, self._state.rows
        arguments.within_one("length", length, rows.length(row))
        for member, window in zip(rows.rows_of(row), state.windows, strict=True):
            first = int(rows.first_blocks[member]) * state.block_size
            if first > (length if window is None else first_visible(length, window)):
                raise ValueError(
                    f"length={length}: the blocks before token {first} were released. "
                    "Allocate a new sequence."
                )
        state.change.begin()
        for member in rows.rows_of(row):
            if length <= rows.lengths[member]:
                self.shorten(member, length)
        if state.axes:
            self._forget_waiting(row, length)

    def _forget_waiting(self, row: int, length: int) -> None:
        rows = self._state.rows
        members = slice(row, row + rows.num_groups)
        rows.waiting[members] = length - rows.lengths[members]
        del rows.digests[row][length // self._state.block_size :]
        ids = rows.waiting_ids.pop(row, NO_BLOCKS)
        if rows.waiting[members].any():
            rows.waiting_ids[row] = ids[:length]

    def shorten(self, row: int, length: int) -> None:
        """Keep the first `length` tokens; the change has begun. O(blocks released)."""
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
        """Release the blocks that lie wholly before `starts`. O(blocks released)."""
        table = self._state.rows
        if self._state.axes:
            raise ValueError("drop_before: not over groups. Their `commit` frees blocks.")
        # `accept` may drop speculative tokens, and then the tokens before them are the last.
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
        table.behind[rows] = tables.data[tables.starts[rows] + firsts - 1] + 1
        tables.data[behind] = -1
        table.first_blocks[rows] = firsts
        for row in rows.tolist():
            if not table.is_keyed(row):
                # A row without its front cannot publish, nor continue from its place.
                table.known[row] = table.published[row] = 0
                table.nodes[row] = None
        if len(rows) == 1:
            state.release(blocks)
        else:  # forks may free the same blocks
            distinct, times = np.unique(blocks, return_counts=True)
            state.release(distinct, times.astype(np.int32))
