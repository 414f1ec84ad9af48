"""Begin sequences over groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.allocation import Allocation
from kvpager.blocks.groups.continuations import Continuations
from kvpager.blocks.groups.extension import GroupExtension
from kvpager.blocks.groups.prefix import Hit, WindowIndex
from kvpager.blocks.sequences import Prompt, SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_needed
from kvpager.plans import NO_BLOCKS, Int32


class GroupAllocation(Allocation):
    """Begins sequences, a row for each group. The caller holds the lock."""

    def __init__(
        self,
        state: BlockState,
        index: WindowIndex,
        extension: GroupExtension,
        continuations: Continuations,
    ) -> None:
        super().__init__(state)
        self._index = index
        self._extension = extension
        self._continuations = continuations

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
        self._share(shared)
        rows.free_rows.pop()
        parts = np.split(fresh, np.cumsum(counts)[:-1])
        for group, (part, room) in enumerate(zip(parts, rooms, strict=True)):
            member = who._replace(group=group)
            self._begin_row(first + group, member, part, length, room, ids, hit)
            rows.waiting[first + group] = length - room
        rows.digests[first] = hit.digests
        if min(rooms) < length:
            rows.waiting_ids[first] = NO_BLOCKS if ids is None else ids
        if ids is not None:
            self._count(length, num_cached)
        return handle

    def _begin_row(
        self,
        row: int,
        who: Prompt,
        fresh: Int32,
        length: int,
        room: int,
        ids: Int32 | None,
        hit: Hit,
    ) -> None:
        state, rows, shared = self._state, self._state.rows, hit.tables[who.group]
        start = len(shared) * state.block_size
        rows.add(row, who, shared, fresh, room, start, 0 if ids is None else room)
        rows.began[row] = length
        rows.first_blocks[row] = np.count_nonzero(shared < 0)
        rows.nodes[row], rows.published[row] = hit.nodes[who.group], len(shared)
        if ids is not None:
            state.pool.write_ids(fresh, ids[start:room])

    def _share(self, blocks: Int32) -> None:
        if len(blocks):
            self._state.pool.share(blocks)
            self._state.evictor.policy.touch(blocks)
            self._continuations.keep(blocks)

    # ---------------------------------------------------------------- blocks that a caller fills

    def held(self, who: Prompt, ids: Int32) -> Int32:
        """Return the cached blocks of `ids`, [groups, blocks], -1 for the others. O(tokens)."""
        return self._index.held(who, ids).tables

    def restore(self, who: Prompt, ids: Int32) -> tuple[SequenceHandle, NDArray[np.bool_]]:
        """Begin a sequence of the whole blocks of `ids`, whose KV the caller has.

        Also returns which blocks are to be filled, bool [groups, blocks]. Groups with a window have
        only the blocks of the last window. O(tokens * groups). Raises: `OutOfBlocks`.
        """
        state, rows, size = self._state, self._state.rows, self._state.block_size
        hit, num_blocks = self._index.held(who, ids), len(ids) // size
        firsts = [first_needed(len(ids), window, size) for window in state.windows]
        for table, first in zip(hit.tables, firsts, strict=True):
            table[:first] = -1
        missing = hit.tables < 0
        missing &= np.arange(num_blocks) >= np.array(firsts)[:, None]
        shared, counts = hit.tables[hit.tables >= 0], np.count_nonzero(missing, axis=1).tolist()
        owners = state.owners([who] * len(counts), counts)
        state.refuse(sum(counts), owners, shared)
        state.reserve(num_blocks)
        first_row = rows.free_rows[-1]
        handle = SequenceHandle(state, first_row, int(rows.generations[first_row]))
        fresh = state.take(sum(counts), owners, shared)
        self._share(shared)
        rows.free_rows.pop()
        hit.tables[missing] = fresh
        state.pool.ids[fresh] = ids.reshape(num_blocks, size)[missing.nonzero()[1]]
        for group, (table, first) in enumerate(zip(hit.tables, firsts, strict=True)):
            row, member = first_row + group, who._replace(group=group)
            published, written = first, len(ids)
            if state.windows[group] is None:
                published = num_blocks - counts[group]
                written = published * size
            rows.add(row, member, table, NO_BLOCKS, len(ids), written, len(ids))
            rows.first_blocks[row], rows.published[row] = first, published
            rows.nodes[row], rows.began[row] = hit.nodes[group], len(ids)
        rows.digests[first_row] = hit.digests
        return handle, missing

    def end(self, sequences: list[int]) -> None:
        """Release the blocks of these sequences and end their handles. O(blocks)."""
        rows = self._state.rows
        for first in sequences:
            for row in rows.rows_of(first):
                if rows.is_keyed(row):
                    self._continuations.end(row)
        super().end(sequences)
