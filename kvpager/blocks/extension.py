"""Append tokens to sequences: slots, copy-on-write, speculative tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks.block_tables import ranks
from kvpager.blocks.state import BlockState
from kvpager.blocks.truncation import Truncation
from kvpager.plans import NO_BLOCKS, NO_COPIES, AppendPlan, Int32, Int64


class Extension:
    """Appends tokens to sequences, and accepts speculative ones. The caller holds the lock.

    Writes the block tables, `lengths`, `known` and `speculative` of the rows it is given.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._truncation = Truncation(state)

    def append(
        self, rows: Int64, num_new: int | Int64, ids: Int32 | None, speculative: bool
    ) -> AppendPlan:
        """Make room for `num_new` more tokens of each row. O(tokens). Raises: `OutOfBlocks`."""
        if ids is None and not speculative and isinstance(num_new, int) and num_new == 1:
            step = self._append_within_blocks(rows)
            if step is not None:
                return step
        state, table = self._state, self._state.rows
        shift, mask = state.shift, state.block_size - 1
        starts = table.lengths[rows]
        ends = starts + num_new
        longest = int(ends.max(initial=0))
        arguments.count("sequence length", longest)
        offsets, filled = starts & mask, (starts + mask) >> shift
        num_fresh = ((ends + mask) >> shift) - filled
        total_fresh = int(num_fresh.sum())
        growing = num_fresh.nonzero()[0]
        leaving, tails = self._shared_tails(rows, starts >> shift, (offsets > 0) & (num_new != 0))
        total = num_new * len(rows) if isinstance(num_new, int) else int(num_new.sum())
        num_taken = len(leaving) + total_fresh
        owners = state.owners_of_rows(rows, leaving, num_fresh) if num_taken else None
        state.refuse(num_taken, owners)
        if len(growing):
            state.reserve_more(rows[growing], (ends[growing] + mask) >> shift)

        copies = np.empty((len(leaving), 2), np.int32) if len(leaving) else NO_COPIES
        step = AppendPlan(np.empty(total, np.int64), copies, state.fences.ticket(copies))
        fresh = NO_BLOCKS
        if num_taken:
            taken = state.take(num_taken, owners)
            if len(leaving):
                self._leave(rows[leaving], starts[leaving] >> shift, tails[leaving], taken, step)
                tails[leaving] = step.copies[:, 1]
            fresh = taken[len(leaving) :]
            if len(growing):
                many = num_fresh[growing]
                columns = np.repeat(filled[growing], many) + ranks(many)
                tables = table.tables
                tables.data[np.repeat(tables.starts[rows[growing]], many) + columns] = fresh
        if isinstance(num_new, int) and num_new == 1:
            tails[growing] = fresh
            np.multiply(tails, state.block_size, out=step.slots, dtype=np.int64)
            np.add(step.slots, offsets, out=step.slots)
        else:
            step.slots[:] = table.slots(rows, starts, ends - starts)
        self._note(rows, starts, ends, ids, speculative, step)
        return step

    def _append_within_blocks(self, rows: Int64) -> AppendPlan | None:
        """Append one unknown token to each row, or return None if a block table changes. O(rows).

        Most decoding steps of a small batch take this path.
        """
        state, table, pool = self._state, self._state.rows, self._state.pool
        starts = table.lengths[rows]
        offsets = starts & (state.block_size - 1)
        if not offsets.all():
            return None
        tables = table.tables
        tails = tables.data.take(tables.starts[rows] + (starts >> state.shift))
        index = tails.astype(np.intp)
        if (pool.refs.take(index) > 1).any() or pool.cached.take(index).any():
            return None
        ends = starts + 1
        arguments.count("sequence length", int(ends.max(initial=0)))
        slots = index * state.block_size + offsets
        state.change.begin()
        table.lengths[rows] = ends
        return AppendPlan(slots, NO_COPIES, 0)

    def _note(
        self,
        rows: Int64,
        starts: Int64,
        ends: Int64,
        ids: Int32 | None,
        speculative: bool,
        step: AppendPlan,
    ) -> None:
        """Update the columns of rows whose new tokens have slots."""
        state, table = self._state, self._state.rows
        state.change.begin()
        table.lengths[rows] = ends
        if ids is not None:
            state.learn(rows, starts, ends, ids, step.slots)
        if speculative:
            table.set_speculative(rows, table.speculative[rows] + (ends - starts))

    def _shared_tails(
        self, rows: Int64, columns: Int64, writes: NDArray[np.bool_]
    ) -> tuple[Int64, Int32]:
        """Return the rows that must not write into their last block, and all last blocks."""
        table, pool = self._state.rows.tables, self._state.pool
        tails = table.data.take(table.starts[rows] + columns, mode="clip")
        index = tails.astype(np.intp)
        shared = pool.refs.take(index, mode="clip") > 1
        shared |= pool.cached.take(index, mode="clip")
        shared &= writes
        writers = shared.nonzero()[0]
        if not len(writers):
            return writers, tails
        theirs = tails[writers]
        _, first_from_end, holders = np.unique(theirs[::-1], return_index=True, return_counts=True)
        last = len(theirs) - 1 - first_from_end
        keeps = (holders == pool.refs[theirs[last]]) & ~pool.cached[theirs[last]]
        leaves = np.ones(len(theirs), np.bool_)
        leaves[last[keeps]] = False
        return writers[leaves], tails

    def _leave(
        self, rows: Int64, columns: Int64, tails: Int32, taken: Int32, step: AppendPlan
    ) -> None:
        """Give each row its own copy of the shared block it is about to write."""
        state, tables = self._state, self._state.rows.tables
        step.copies[:, 0], step.copies[:, 1] = tails, taken[: len(tails)]
        tables.data[tables.starts[rows] + columns] = step.copies[:, 1]
        state.pool.copy_ids(step.copies)
        blocks, times = np.unique(tails, return_counts=True)
        state.copied(step.copies, step.ticket)
        state.release(blocks, times.astype(np.int32))

    def accept(self, rows: Int64, kept: Int64, ids: Int32 | None) -> None:
        """Keep the first `kept` speculative tokens of each row and drop the others. O(tokens)."""
        state, table = self._state, self._state.rows
        starts = table.lengths[rows] - table.speculative[rows]
        ends = starts + kept
        if ids is not None:
            slots = table.slots(rows, starts, kept)
            blocks = slots >> state.shift
            if np.any((state.pool.refs[blocks] > 1) | state.pool.cached[blocks]):
                raise ValueError(
                    "tokens: a fork shares these speculative tokens. Accept them without ids."
                )
        state.change.begin()
        if ids is not None:
            state.learn(rows, starts, ends, ids, slots)
        table.set_speculative(rows, 0)
        for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
            self._truncation.shorten(row, end)
