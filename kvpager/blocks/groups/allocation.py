"""Begin sequences over groups."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.allocation import Allocation
from kvpager.blocks.groups.extension import GroupExtension
from kvpager.blocks.groups.prefix import Hit, WindowIndex
from kvpager.blocks.sequences import Prompt, SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, Int32


class GroupAllocation(Allocation):
    """Begins sequences, a row for each group. The caller holds the lock."""

    def __init__(self, state: BlockState, index: WindowIndex, extension: GroupExtension) -> None:
        super().__init__(state)
        self._index = index
        self._extension = extension

    def find(self, who: Prompt, ids: Int32) -> tuple[int, Int32]:
        """Return the prefix of `ids` that all groups have cached. O(tokens * groups)."""
        tables = self._index.match(who, ids).tables
        return tables.shape[1] * self._state.block_size, tables

    def begin(self, who: Prompt, length: int, ids: Int32 | None, reserve: int) -> SequenceHandle:
        """Begin a sequence of `length` tokens. O(tokens * groups).

        A group with a window may get blocks for fewer tokens now: the others wait.
        Raises: `OutOfBlocks` of the sum over all groups.
        """
        state, rows, size = self._state, self._state.rows, self._state.block_size
        hit = self._index.nothing()
        if ids is not None:
            hit = self._index.match(who, ids[: max(length - 1, 0)])
        num_shared, shared = hit.tables.shape[1], hit.tables[hit.tables >= 0]
        num_cached = num_shared * size
        rooms = self._extension.rooms(num_cached, length)
        counts = [-(-room // size) - num_shared for room in rooms]
        owners = state.owners([who] * len(counts), counts)
        state.refuse(sum(counts), owners, shared, reserve)
        state.reserve(num_shared + max(counts))
        first = rows.free_rows[-1]
        handle = SequenceHandle(state, first, int(rows.generations[first]), num_cached)
        fresh = state.take(sum(counts), owners, shared)
        if len(shared):
            state.pool.share(shared)
            state.evictor.policy.touch(shared)
        rows.free_rows.pop()
        parts = np.split(fresh, np.cumsum(counts)[:-1])
        for group, (part, room) in enumerate(zip(parts, rooms, strict=True)):
            self._begin_row(first + group, who._replace(group=group), part, room, ids, hit)
            rows.waiting[first + group] = length - room
        rows.digests[first] = hit.digests
        if min(rooms) < length:
            rows.waiting_ids[first] = NO_BLOCKS if ids is None else ids
        if ids is not None:
            self._count(length, num_cached)
        return handle

    def _begin_row(
        self, row: int, who: Prompt, fresh: Int32, room: int, ids: Int32 | None, hit: Hit
    ) -> None:
        state, rows, shared = self._state, self._state.rows, hit.tables[who.group]
        start = len(shared) * state.block_size
        rows.add(row, who, shared, fresh, room, start, 0 if ids is None else room)
        rows.first_blocks[row] = np.count_nonzero(shared < 0)
        rows.nodes[row], rows.published[row] = hit.nodes[who.group], len(shared)
        if ids is not None:
            state.pool.write_ids(fresh, ids[start:room])
