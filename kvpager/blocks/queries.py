"""What can be read of a manager, all of it without changing anything."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager._validate import COUNT_MAX
from kvpager._words import counted
from kvpager.blocks import invariants
from kvpager.blocks.events import Event
from kvpager.blocks.sequences import Batch, Sequence, listed
from kvpager.blocks.state import Books, Target
from kvpager.blocks.stats import BlockState, Stats
from kvpager.errors import OutOfBlocks

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Views(Books):
    """The reading half of a `BlockManager`."""

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"<BlockManager: {self._pool.num_held} held, {self._pool.num_free} free of "
                f"{counted(self._pool.num_blocks, 'block')} of {self.block_size}>"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks on the device. O(1)."""
        with self._lock:
            return self._pool.num_blocks

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host tier. O(1)."""
        with self._lock:
            return self._host.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Device blocks that can be had without evicting anything. O(1)."""
        with self._lock:
            return self._pool.num_free

    @property
    def num_available_blocks(self) -> int:
        """Device blocks that can be had: free ones, and cached ones that may be evicted. O(1)."""
        with self._lock:
            return self._pool.num_free + self._pool.num_evictable

    @property
    def has_fences(self) -> bool:
        """Whether the blocks of a plan are kept back until `complete(plan)`. O(1)."""
        return self._fences.is_on

    @property
    def num_held_blocks(self) -> int:
        """Device blocks that sequences hold, shared ones counted once. O(1)."""
        with self._lock:
            return self._pool.num_held

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks given up since the manager began. O(1)."""
        with self._lock:
            return self._totals["evicted"]

    # ---------------------------------------------------------------- sequences

    def batch(self, sequences: Iterable[Sequence]) -> Batch:
        """Several handles as one reusable argument: repeated steps then skip its making. O(n).

        Raises: `StaleSequence`, `ValueError` where a sequence stands twice.
        """
        named = listed(sequences)
        with self._lock:
            rows = self._resolve(named)
            return Batch(self, rows, self._rows.generations[rows], -1)

    def _handle(self, row: int) -> Sequence:
        rows = self._rows
        return Sequence(self, row, int(rows.generations[row]), int(rows.committed[row]))

    def owns(self, sequence: Sequence) -> bool:
        """Whether the handle is of this manager and not freed. O(1)."""
        if not isinstance(sequence, Sequence):
            raise TypeError(f"expected a Sequence, got {type(sequence).__name__}")
        with self._lock:
            return sequence._manager is self and bool(
                self._rows.generations[sequence._row] == sequence._generation
            )

    def length(self, sequence: Sequence) -> int:
        """Tokens in the sequence. O(1). Raises `StaleSequence`."""
        with self._lock:
            return int(self._rows.lengths[self._row(sequence)])

    def lengths(self, sequences: Target) -> Int64:
        """Tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        named = listed(sequences)
        with self._lock:
            return self._rows.lengths[self._resolve(named)]

    def block_table(self, sequence: Sequence) -> Int32:
        """The sequence's blocks in logical order, int32 [blocks], a copy; -1: not on the device.

        O(blocks). Raises `StaleSequence`.
        """
        with self._lock:
            return np.maximum(self._rows.blocks(self._row(sequence)), -1)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """The block tables of several sequences, int32 [n, most blocks], `padding` where none is.

        O(n * most blocks). Raises `StaleSequence`. What kernels take: `kvpager.storage.tables`.
        """
        named = listed(sequences)
        padding = arguments.count("padding", padding, at_least=-COUNT_MAX)
        with self._lock:
            rows, table = self._resolve(named), self._rows
            width = -(-int(table.lengths[rows].max(initial=0)) // self.block_size)
            tables = table.tables.table(rows, width)
            if padding != -1 or table.swapped.any():
                tables[tables < 0] = padding
            return tables

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """`block_tables` and `lengths` of sequences on the device, read at one moment.

        O(n * most blocks). Raises `StaleSequence`, `SequenceSwapped`.
        """
        named = listed(sequences)
        with self._lock:
            rows, table = self._resident(named), self._rows
            width = -(-int(table.lengths[rows].max(initial=0)) // self.block_size)
            return table.tables.table(rows, width), table.lengths[rows]

    def slots(self, sequence: Sequence, start: int = 0, stop: int | None = None) -> Int64:
        """Flat slots of tokens `start` to `stop` (default: all), int64 [tokens]. O(tokens).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for tokens it does not hold.
        """
        start = arguments.count("start", start)
        with self._lock:
            row = self._resident_row(sequence)
            length = int(self._rows.lengths[row])
            end = length if stop is None else arguments.count("stop", stop)
            arguments.within("stop", end, self._rows.lengths[[row]])
            first = int(self._rows.first_blocks[row]) * self.block_size
            if not first <= start <= end:
                raise ValueError(f"start {start}: expected {first} <= start <= stop = {end}")
            return self._rows.slots(np.array([row]), np.array([start]), np.array([end - start]))

    # ---------------------------------------------------------------- preemption

    def victims(self, sequences: Target, need: int) -> list[Sequence]:
        """The first of `sequences`, least important first, whose leaving frees `need` blocks.

        For preemption: swap them, or free them with `publish`. `OutOfBlocks.missing` says how many
        to ask for. Counts blocks that only those chosen hold, so a family of forks counts when all
        of it goes. Quotas are not looked at: at a ceiling, name sequences of that namespace only.
        O(blocks of those chosen).
        Raises: `OutOfBlocks` where even all are not enough, `StaleSequence`.
        """
        need = arguments.count("need", need)
        named = listed(sequences)
        with self._lock:
            pool, rows, found = self._pool, self._resolve(named).tolist(), 0
            seen, chosen = np.zeros(pool.num_blocks, np.int32), 0
            while found < need and chosen < len(rows):
                blocks = self._rows.device_blocks(rows[chosen])
                seen[blocks] += 1
                is_last = (seen[blocks] == pool.refs[blocks]) & (pool.holds[blocks] == 0)
                found += int(np.count_nonzero(is_last))
                chosen += 1
            if found < need:
                advice = "so many would those named give back; name more of them"
                raise OutOfBlocks(need, found, 0, pool.num_blocks, advice=advice)
            handles = [self._handle(row) for row in rows] if isinstance(named, Batch) else named
            return [handles] if isinstance(handles, Sequence) else handles[:chosen]

    # ---------------------------------------------------------------- the whole

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first, see `kvpager.blocks.events`. O(events).

        Raises: `ValueError` where the manager was made without `num_events`.
        """
        with self._lock, self._change:
            if self._events is None:
                raise ValueError("no events are kept; make the manager with num_events=10_000, say")
            self._change.begin()
            return self._events.fetch()

    def offered(self) -> list[Event]:
        """What the index offers now, as `stored` events: where a router begins. O(tokens)."""
        with self._lock:
            return list(self._index.offered())

    def block_states(self) -> NDArray[np.uint8]:
        """A `BlockState` for every device block, uint8 [num_blocks]. O(num_blocks)."""
        with self._lock:
            pool = self._pool
            states = np.where(pool.cached, BlockState.CACHED, BlockState.FREE).astype(np.uint8)
            states[pool.holds > 0] = BlockState.KEPT
            states[pool.refs == 1] = BlockState.HELD
            states[pool.refs > 1] = BlockState.SHARED
            states[: pool.num_reserved] = BlockState.RESERVED
            return states

    def stats(self) -> Stats:
        """Counts of now and totals since the manager began. O(blocks + sequences)."""
        with self._lock:
            pool, totals = self._pool, self._totals
            return Stats(
                block_size=self.block_size,
                num_blocks=pool.num_blocks,
                num_free=pool.num_free,
                num_held=pool.num_held,
                num_cached=pool.num_evictable,
                num_kept=pool.num_kept,
                num_never_used=pool.num_never_used,
                num_shared=int(np.count_nonzero(pool.refs > 1)),
                num_host_blocks=self._host.num_blocks,
                num_host_free=self._host.num_free,
                num_sequences=len(self._rows),
                num_swapped=int(np.count_nonzero(self._rows.swapped)),
                num_tokens=int(self._rows.fill(pool.num_blocks, self._rows.lengths).sum()),
                total_copied=totals["copied"],
                total_evicted=totals["evicted"],
                total_swapped_out=totals["out"],
                total_swapped_in=totals["in"],
                total_prefix_queries=totals["queries"],
                total_prefix_hits=totals["hits"],
                prefix_query_tokens=totals["queried"],
                prefix_hit_tokens=totals["hit"],
            )

    def check(self) -> None:
        """Recount everything from the block tables: see `invariants.py`. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law. That is a bug, never a full pool.
        """
        with self._lock, self._change:
            invariants.check(
                self._pool,
                self._host,
                self._rows,
                self._index,
                self._fences,
                self._quotas,
                self._owned(),
            )
