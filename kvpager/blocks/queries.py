"""Read-only queries of a manager."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import _validate as arguments
from kvpager._validate import COUNT_MAX
from kvpager.blocks.allocation import Allocation, identity
from kvpager.blocks.changes import Changes
from kvpager.blocks.sequences import Batch, PrefixMatch, SequenceHandle, Target, listed
from kvpager.blocks.state import BlockState
from kvpager.blocks.stats import BlockStatus, Stats, Withheld
from kvpager.blocks.windows import blocks_for
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32, Int64


class Queries:
    """The read-only methods of a `BlockManager`, which documents most of them."""

    def __init__(self, state: BlockState, allocation: Allocation) -> None:
        self._state, self._allocation = state, allocation

    # ---------------------------------------------------------------- sequences

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """See `BlockManager.batch`. O(n)."""
        named, state = listed(sequences), self._state
        with state.lock:
            rows = state.resolve(named)
            return Batch(state, rows, state.rows.generations[rows], -1)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the most blocks that a sequence of up to `num_tokens` holds. O(groups)."""
        state = self._state
        return blocks_for(num_tokens, state.block_size, state.windows, state.max_chunk)

    def owns(self, sequence: SequenceHandle) -> bool:
        """Return True if the handle is of this manager and not freed. O(1)."""
        if not isinstance(sequence, SequenceHandle):
            raise TypeError(f"expected a SequenceHandle, got {type(sequence).__name__}")
        state = self._state
        with state.lock:
            return sequence._owner is state and bool(
                state.rows.generations[sequence._row] == sequence._generation
            )

    def lengths(self, sequences: Target) -> Int64:
        """See `BlockManager.lengths`. O(n)."""
        named, state = listed(sequences), self._state
        with state.lock:
            return state.rows.lengths_of(state.resolve(named))

    def block_tables(self, sequences: Target, padding: int) -> Int32:
        """See `BlockManager.block_tables`. O(n * most blocks)."""
        named, state = listed(sequences), self._state
        padding = arguments.count("padding", padding, at_least=-COUNT_MAX)
        with state.lock:
            tables, _ = self._tables(state.resolve(named))
            if padding != -1 or state.rows.swapped.any():
                tables[tables < 0] = padding
            return tables

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """See `BlockManager.tables_and_lengths`. O(n * most blocks)."""
        named, state = listed(sequences), self._state
        with state.lock:
            return self._tables(state.resident(named))

    def _tables(self, rows: Int64) -> tuple[Int32, Int64]:
        state, table = self._state, self._state.rows
        lengths = table.lengths_of(rows)
        width = -(-int(lengths.max(initial=0)) // state.block_size)
        tables = table.tables.table(table.members(rows), width)
        return tables.reshape(*state.axes, len(rows), width), lengths

    def slots(self, sequence: SequenceHandle, start: int, stop: int | None) -> Int64:
        """See `BlockManager.slots`. O(tokens)."""
        start = arguments.count("start", start)
        state = self._state
        with state.lock:
            first = state.resident_row(sequence)
            length = min(state.rows.lengths.item(row) for row in state.rows.rows_of(first))
            end = length if stop is None else arguments.count("stop", stop)
            arguments.within_one("stop", end, length)
            self.refuse_behind(first, start, end)
            return self.slots_of(first, start, end)

    def refuse_behind(self, first: int, start: int, stop: int) -> None:
        """Raise `ValueError` unless all groups have the blocks from `start` on. O(groups)."""
        table = self._state.rows
        dropped = max(table.first_blocks.item(row) for row in table.rows_of(first))
        least = dropped * self._state.block_size
        if not least <= start <= stop:
            raise ValueError(f"start={start}: expected {least} <= start <= stop = {stop}")

    def slots_of(self, first: int, start: int, stop: int) -> Int64:
        """Return the slots of tokens that have blocks. O(tokens * groups)."""
        table = self._state.rows
        rows = np.array(table.rows_of(first))
        slots = table.slots(rows, np.full_like(rows, start), np.full_like(rows, stop - start))
        return slots.reshape(*self._state.axes, stop - start)

    def victims(self, sequences: Target, need: int) -> list[SequenceHandle]:
        """See `BlockManager.victims`. O(blocks of those chosen)."""
        need = arguments.count("need", need)
        named, state = listed(sequences), self._state
        with state.lock:
            pool, rows, found = state.pool, state.resolve(named).tolist(), 0
            seen, chosen = np.zeros(pool.num_blocks, np.int32), 0
            while found < need and chosen < len(rows):
                for row in state.rows.rows_of(rows[chosen]):
                    blocks = state.rows.device_blocks(row)
                    seen[blocks] += 1
                    is_last = (seen[blocks] == pool.refs[blocks]) & (pool.holds[blocks] == 0)
                    found += int(np.count_nonzero(is_last))
                chosen += 1
            if found < need:
                advice = "the sequences would free fewer blocks; pass more sequences"
                raise OutOfBlocks(need, found, 0, pool.num_blocks, advice=advice)
            handles = [state.handle(row) for row in rows] if isinstance(named, Batch) else named
            return [handles] if isinstance(handles, SequenceHandle) else handles[:chosen]

    def match_prefix(
        self,
        prompt: ArrayLike,
        namespace: str | None,
        lora: str | None,
        mm_hashes: Iterable[tuple[int, int, bytes]],
        blocks: bool,
    ) -> int | PrefixMatch:
        """See `BlockManager.match_prefix`. O(tokens)."""
        ids = arguments.token_ids(prompt)
        who = identity(namespace, lora, mm_hashes, len(ids))
        arguments.flag("blocks", blocks)
        with self._state.lock:
            num_tokens, found = self._allocation.find(who, ids)
            return PrefixMatch.of(num_tokens, found.copy()) if blocks else num_tokens

    def withheld(
        self, prompt: ArrayLike | None, namespace: str | None, lora: str | None
    ) -> Withheld:
        """Return the blocks that a sequence cannot get. O(1), O(tokens + blocks) with pins.

        The sequence shares the pinned blocks of `prompt`, unless layers have a window. With
        None, it shares none.
        """
        state = self._state
        with state.lock:
            accounts, pool = state.accounts, state.pool
            if not (pool.num_holds or accounts.limits):
                return Withheld()
            pinned, number = np.flatnonzero(pool.holds), accounts.owner(namespace)
            held = accounts.count(pinned)
            reserved = accounts.unmet_beside(number, held)
            num_shared = 0
            # Behind a window, a sequence shares a block for some time only.
            if prompt is not None and len(pinned) and not any(state.windows):
                num_shared = self._num_pinned(prompt, namespace, lora)
            return Withheld(len(pinned) - num_shared, held.get(number, 0) - num_shared, reserved)

    def _num_pinned(self, prompt: ArrayLike, namespace: str | None, lora: str | None) -> int:
        """Return how many blocks that a sequence with this prompt would share are pinned."""
        ids = arguments.token_ids(prompt)[:-1]  # the last token is always computed
        num_tokens, blocks = self._allocation.find(identity(namespace, lora, (), len(ids)), ids)
        whole = blocks[: num_tokens // self._state.block_size]
        return int(np.count_nonzero(self._state.pool.holds[whole]))

    # ---------------------------------------------------------------- the pool

    @property
    def num_evicted_blocks(self) -> int:
        """Blocks evicted since the manager began. O(1)."""
        with self._state.lock:
            return self._state.totals["total_evicted"]

    def block_statuses(self) -> NDArray[np.uint8]:
        """Return a `BlockStatus` for every device block, uint8 [num_blocks]. O(num_blocks)."""
        with self._state.lock:
            pool = self._state.pool
            statuses = np.where(pool.cached, BlockStatus.CACHED, BlockStatus.FREE).astype(np.uint8)
            statuses[pool.holds > 0] = BlockStatus.KEPT
            statuses[pool.refs == 1] = BlockStatus.HELD
            statuses[pool.refs > 1] = BlockStatus.SHARED
            statuses[: pool.num_reserved] = BlockStatus.RESERVED
            return statuses

    def changes(self, reader: Changes | None = None) -> Changes:
        """Return a reader of what changes from one look to the next. O(1).

        With `reader`, let that one look at this manager instead of its own. O(sequences).
        """
        if reader is None:
            return Changes(self._state)
        reader.follow(self._state)
        return reader

    def stats(self) -> Stats:
        """See `BlockManager.stats`. O(blocks + sequences)."""
        state = self._state
        with state.lock:
            pool, rows = state.pool, state.rows
            return Stats(
                block_size=state.block_size,
                num_blocks=pool.num_blocks,
                num_free=pool.num_free,
                num_held=pool.num_held,
                num_cached=pool.num_evictable,
                num_kept=pool.num_kept,
                num_never_used=pool.num_never_used,
                num_shared=int(np.count_nonzero(pool.refs > 1)),
                num_host_blocks=state.host.num_blocks,
                num_host_free=state.host.num_free + state.host.num_lent,
                num_sequences=len(rows),
                num_swapped=int(np.count_nonzero(rows.swapped)) // rows.num_groups,
                num_tokens=int(rows.fill(pool.num_blocks, rows.lengths).sum()),
                **state.totals,
            )
