"""Begin, fork and end sequences over groups."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.allocation import Allocation
from kvpager.blocks.groups.prefix import Hit
from kvpager.blocks.groups.table import GroupTable
from kvpager.blocks.sequences import Prompt, SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32, Int64


class GroupAllocation:
    """Begins, forks and ends sequences, a row for each group. The caller holds the lock.

    Writes all columns of the rows that begin or end, and the totals of prefix look-ups.
    """

    def __init__(self, state: BlockState, table: GroupTable) -> None:
        self._state = state
        self._table = table
        self._allocation = Allocation(state)

    def begin(
        self,
        who: list[Prompt],
        length: int,
        rooms: list[int],
        ids: Int32 | None,
        hit: Hit,
        reserve: int,
    ) -> SequenceHandle:
        """Begin a sequence with blocks for `rooms` tokens in each group. O(tokens * groups).

        A group with a window may get fewer tokens than `length` now: the rest stay in `pending`.

        Raises: `OutOfBlocks` of the sum over all groups.
        """
        state, size = self._state, self._state.block_size
        counts = [-(-room // size) - hit.num_blocks for room in rooms]
        shared = np.concatenate([held.blocks for held in hit.held])
        owners = state.owners(who, counts)
        state.refuse_over_quota(owners)
        self._refuse_without_reserve(sum(counts), shared, reserve)
        self._table.reserve(1)
        state.reserve(hit.num_blocks + max(counts), len(who))
        [handle] = self._table.handles(1, hit.num_blocks * size)
        fresh = state.take(sum(counts), owners, shared)
        if len(shared):
            state.share(shared)
            state.evictor.policy.touch(shared)
        firsts = np.cumsum([0, *counts])
        rows = [
            self._new_row(prompt, fresh[first : first + count], room, ids, hit, group)
            for group, (prompt, room, first, count) in enumerate(
                zip(who, rooms, firsts.tolist(), counts, strict=False)
            )
        ]
        sequence = self._table.add(rows, length, hit.digests)
        if min(rooms) < length:
            self._table.pending[sequence] = ids
        if ids is not None:
            totals = state.totals
            totals["queries"] += 1
            totals["hits"] += hit.num_blocks > 0
            totals["queried"] += length
            totals["hit"] += hit.num_blocks * size
        return handle

    def _new_row(
        self, who: Prompt, fresh: Int32, room: int, ids: Int32 | None, hit: Hit, group: int
    ) -> int:
        state, table, held = self._state, self._state.rows, hit.held[group]
        row, start = table.free_rows[-1], hit.num_blocks * state.block_size
        table.add(who, held.table, fresh, room, start, 0 if ids is None else room)
        table.first_blocks[row], table.published[row] = held.first, hit.num_blocks
        table.nodes[row], table.keyed[row] = held.node, held.is_keyed
        if ids is not None:
            state.write_ids(fresh, ids[start:room])
        return row

    def _refuse_without_reserve(self, need: int, shared: Int32, reserve: int) -> None:
        """Raise `OutOfBlocks` unless `reserve` available blocks would be left."""
        pool = self._state.pool
        if reserve:
            need += reserve + int(np.count_nonzero(pool.refs[shared] == 0))
        if need > pool.num_free + pool.num_evictable:
            raise OutOfBlocks(need, pool.num_free, pool.num_evictable, pool.num_blocks)

    def fork(self, sequence: int, times: int) -> list[SequenceHandle]:
        """Begin `times` sequences that share every block of `sequence`. O(blocks) each."""
        state, rows = self._state, self._state.rows
        members = self._table.rows[:, sequence].tolist()
        self._table.reserve(times)
        state.reserve(max(map(rows.num_blocks, members)), times * len(members))
        children = self._table.handles(times, int(rows.committed[members].min()))
        state.change.begin()
        for row in members:
            state.share(rows.device_blocks(row), times)
        for _ in range(times):
            self._table.fork(sequence, [rows.fork(row) for row in members])
        return children

    def end(self, sequences: Int64) -> None:
        """Release the blocks of these sequences and end their handles. O(blocks)."""
        self._state.change.begin()
        self._allocation.end(self._table.rows[:, sequences].ravel().tolist())
        for sequence in sequences.tolist():
            self._table.drop(sequence)
