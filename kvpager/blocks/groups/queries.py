"""Read-only queries of a manager over groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.groups.table import GroupTable
from kvpager.blocks.groups.windows import blocks_for
from kvpager.blocks.queries import Queries
from kvpager.blocks.sequences import Batch, PrefixMatch, Prompt, SequenceHandle, Target, listed
from kvpager.blocks.state import BlockState
from kvpager.blocks.stats import Stats
from kvpager.plans import Int32, Int64


class GroupQueries:
    """The read-only methods of a `GroupedManager`, which documents most of them."""

    def __init__(
        self,
        state: BlockState,
        table: GroupTable,
        index: WindowIndex,
        windows: tuple[int | None, ...],
        max_chunk: int | None,
    ) -> None:
        self._state = state
        self._windows, self._max_chunk = windows, max_chunk
        self._index = index
        self._table = table
        self._queries = Queries(state)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the most blocks that a sequence of up to `num_tokens` holds. O(groups).

        A group with a window holds at most the window and a chunk.
        """
        return blocks_for(num_tokens, self._state.block_size, self._windows, self._max_chunk)

    def batch(self, sequences: Target) -> Batch:
        """See `GroupedManager.batch`. O(n)."""
        named, table = listed(sequences), self._table
        with self._state.lock:
            names = table.resolve(named).copy()
            return Batch(table.owner, names, table.generations[names], -1)

    def lengths(self, sequences: Target) -> Int64:
        """See `GroupedManager.lengths`. O(n)."""
        named = listed(sequences)
        with self._state.lock:
            return self._table.lengths[self._table.resolve(named)]

    def block_tables(self, sequences: Target, padding: int) -> Int32:
        """See `GroupedManager.block_tables`. O(groups * n * most blocks)."""
        named = listed(sequences)
        padding = arguments.count("padding", padding, at_least=-arguments.COUNT_MAX)
        with self._state.lock:
            tables = self._tables(self._table.resolve(named))
            if padding != -1 or self._state.rows.swapped.any():
                tables[tables < 0] = padding
            return tables

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """See `GroupedManager.tables_and_lengths`. O(groups * n * most blocks)."""
        named = listed(sequences)
        with self._state.lock:
            names = self._table.resident(named)
            return self._tables(names), self._table.lengths[names]

    def _tables(self, names: Int64) -> Int32:
        state, table = self._state, self._table
        width = -(-int(table.lengths[names].max(initial=0)) // state.block_size)
        flat = state.rows.tables.table(table.rows[:, names].ravel(), width)
        return flat.reshape(len(table.rows), len(names), width)

    def slots(self, sequence: SequenceHandle, start: int, stop: int | None) -> Int64:
        """See `GroupedManager.slots`. O(tokens * groups)."""
        start = arguments.count("start", start)
        state, table = self._state, self._table
        with state.lock:
            [name] = table.resident(sequence).tolist()
            rows = table.rows[:, name]
            room = int(state.rows.lengths[rows].min())
            end = room if stop is None else arguments.count("stop", stop)
            arguments.within_one("stop", end, room)
            self.refuse_behind(name, start, end)
            return self.slots_of(name, start, end)

    def refuse_behind(self, name: int, start: int, stop: int) -> None:
        """Raise `ValueError` unless all groups have the blocks from `start` on. O(groups)."""
        rows = self._state.rows
        first = int(rows.first_blocks[self._table.rows[:, name]].max()) * self._state.block_size
        if not first <= start <= stop:
            raise ValueError(f"start={start}: expected {first} <= start <= stop = {stop}")

    def slots_of(self, name: int, start: int, stop: int) -> Int64:
        """Return the slots of tokens that have blocks. O(tokens * groups)."""
        rows = self._table.rows[:, name]
        starts, counts = np.full_like(rows, start), np.full_like(rows, stop - start)
        return self._state.rows.slots(rows, starts, counts).reshape(len(rows), -1)

    def match_prefix(self, who: list[Prompt], ids: Int32, blocks: bool) -> int | PrefixMatch:
        """See `GroupedManager.match_prefix`. O(tokens * groups)."""
        with self._state.lock:
            hit = self._index.match(who, ids)
            num_tokens = hit.num_blocks * self._state.block_size
            if not blocks:
                return num_tokens
            return PrefixMatch.of(num_tokens, np.stack([held.table for held in hit.held]))

    def stats(self) -> Stats:
        """See `GroupedManager.stats`. O(blocks + sequences)."""
        state, table = self._state, self._table
        with state.lock:
            swapped = state.rows.swapped[table.rows[:, table.live()]].any(axis=0)
            return replace(
                self._queries.stats(),
                num_sequences=len(table),
                num_swapped=int(np.count_nonzero(swapped)),
            )
