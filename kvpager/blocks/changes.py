"""What changed in a manager between two looks, for a recording: `manager.queries.changes()`.

The verbs of a manager report nothing. Instead, a look compares tables, lengths and cached blocks
with copies from the look before, in a few vector operations. Only tables that differ are read one
by one. After the first look, `PrefixIndex.recent` notes the parents of published blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, Int32, Int64

_NO_ROWS: Int64 = np.empty(0, np.int64)


class Begun(NamedTuple):
    """A sequence that began. The KV of its first `cached_tokens` tokens was in the pool already."""

    number: int
    sequence: SequenceHandle
    cached_tokens: int


class ManagerChanges(NamedTuple):
    """What changed since the last look. Sequences have numbers that are never reused.

    Attributes:
        num_blocks: blocks on the device, now.
        unpublished: blocks that left the prefix index.
        published: lists of a parent and the blocks after it in the prefix tree. Each block follows
            the one before it. Parent -1 is the root. A block listed again has moved.
        ended: numbers of sequences.
        begun: new sequences, still without tokens and blocks.
        grown: numbers of the sequences that grew by one token in every group, ascending.
        lengths: (number, group, tokens with a slot) of the others that changed.
        tables: (number, group, n, blocks): keep the first n entries of the table, then append
            `blocks`: device blocks, -1 for none, or -2 - h for host block h.
        counts: blocks held, cached only, kept, free, on the host; token slots in use on the device.
        totals: blocks copied, evicted, swapped out and in; tokens looked up, and found.
    """

    num_blocks: int
    unpublished: list[int]
    published: list[list[int]]
    ended: list[int]
    begun: list[Begun]
    grown: list[int]
    lengths: list[tuple[int, int, int]]
    tables: list[tuple[int, int, int, list[int]]]
    counts: tuple[int, int, int, int, int, int]
    totals: tuple[int, int, int, int, int, int]


class Changes:
    """Compares a manager with its state at the last look. As thread-safe as the manager.

    The first look reports the whole state. Memory: a copy of the block tables, and a byte per
    block.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._recent: list[tuple[int, Int32]] | None = None  # as in the index at the last look
        self._cached: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._live: dict[int, tuple[int, int]] = {}  # generation and number, by first row
        self._version = (-1, -1)
        self._num_begun = 0
        self._rows = self._numbers = _NO_ROWS  # rows and numbers of the live sequences
        self._lengths = self._starts = _NO_ROWS  # by row
        self._tables: dict[int, Int32] = {}  # by row
        self._data = NO_BLOCKS  # of the block tables

    def follow(self, state: BlockState) -> None:
        """Look at another manager from now on. All earlier sequences have ended. O(sequences)."""
        self._state = state
        self._recent, self._version = None, (-1, -1)
        # No generation is negative, so all sequences have ended.
        self._live = {row: (-1, number) for row, (_, number) in self._live.items()}
        self._lengths = self._starts = _NO_ROWS
        self._tables, self._data = {}, NO_BLOCKS

    def number(self, sequence: SequenceHandle) -> int | None:
        """Return the number of a sequence that was live at the last look, or None. O(1)."""
        generation, number = self._live.get(sequence._row, (-1, -1))
        return number if generation == sequence._generation else None

    def look(self) -> ManagerChanges:
        """Return what changed since the last look. O(table entries + blocks), as vectors."""
        state = self._state
        with state.lock:
            published = self._published()
            unpublished = self._unpublished()
            ended, begun = self._sequences()
            lengths = state.rows.lengths[self._rows]
            grown, others = self._grown(lengths)
            tables = self._changed_tables(lengths)
            totals = state.totals
            return ManagerChanges(
                state.pool.num_blocks,
                unpublished,
                published,
                ended,
                begun,
                grown,
                others,
                tables,
                self._counts(lengths),
                (
                    totals["total_copied"],
                    totals["total_evicted"],
                    totals["total_swapped_out"],
                    totals["total_swapped_in"],
                    totals["prefix_query_tokens"],
                    totals["prefix_hit_tokens"],
                ),
            )

    # ---------------------------------------------------------------- the prefix index

    def _published(self) -> list[list[int]]:
        """Return what joined the index, with parents."""
        index, cached = self._state.index, self._state.pool.cached
        recent = index.recent
        if recent is None or recent is not self._recent:  # the first look, or too much happened
            recent = [(before, node.blocks) for before, node in index.runs()]
        parents: dict[int, int] = {}
        for before, blocks in recent:
            for block in blocks.tolist():
                parents.pop(block, None)  # a block published again comes later
                parents[block] = before
                before = block
        index.recent = self._recent = []
        chains: list[list[int]] = []
        for block, parent in parents.items():
            if not cached[block]:
                continue
            if chains and chains[-1][-1] == parent:
                chains[-1].append(block)
            else:
                chains.append([parent, block])
        return chains

    def _unpublished(self) -> list[int]:
        """Return what left the index. Blocks cut off by a smaller pool left it, too."""
        before, now = self._cached, self._state.pool.cached
        both = min(len(before), len(now))
        gone = np.flatnonzero(before[:both] > now[:both])
        cut_off = both + np.flatnonzero(before[both:])
        self._cached = now.copy()
        return [*gone.tolist(), *cut_off.tolist()]

    # ---------------------------------------------------------------- sequences

    def _sequences(self) -> tuple[list[int], list[Begun]]:
        """Return the numbers of sequences that ended, and those that began."""
        rows = self._state.rows
        version = rows.epoch, len(rows)
        if version == self._version:
            return [], []
        self._version = version
        step = rows.num_groups
        firsts = [row for row in range(0, len(rows.prompts), step) if rows.prompts[row] is not None]
        before, self._live = self._live, {}
        begun: list[Begun] = []
        for row in firsts:
            generation = int(rows.generations[row])
            known = before.get(row)
            if known is not None and known[0] == generation:
                self._live[row] = before.pop(row)
                continue
            self._live[row] = generation, self._num_begun
            handle = self._state.handle(row)
            begun.append(Begun(self._num_begun, handle, handle.num_cached_tokens))
            self._num_begun += 1
        ended = [number for _, number in before.values()]
        self._keep(firsts, [each.sequence._row for each in begun])
        return ended, begun

    def _keep(self, firsts: list[int], new: list[int]) -> None:
        """Make room for the live sequences. New ones begin without tokens and blocks."""
        table = self._state.rows
        more = len(table.prompts) - len(self._lengths)
        if more:
            nothing = np.zeros(more, np.int64)
            self._lengths = np.concatenate([self._lengths, nothing])
            self._starts = np.concatenate([self._starts, nothing])
        for row in [row for first in new for row in table.rows_of(first)]:
            self._lengths[row] = 0
            self._tables.pop(row, None)
        self._rows = np.array([row for first in firsts for row in table.rows_of(first)], np.int64)
        self._numbers = np.array([self._live[first][1] for first in firsts], np.int64)

    def _grown(self, lengths: Int64) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Return the sequences that grew by one token, and the new lengths of others."""
        groups = self._state.rows.num_groups
        more = (lengths - self._lengths[self._rows]).reshape(-1, groups)
        by_one = (more == 1).all(axis=1)
        others = [
            (int(self._numbers[at]), group, int(lengths[at * groups + group]))
            for at, group in np.argwhere((more != 0) & ~by_one[:, None]).tolist()
        ]
        return sorted(self._numbers[by_one].tolist()), others

    def _changed_tables(self, lengths: Int64) -> list[tuple[int, int, int, list[int]]]:
        table, groups = self._state.rows, self._state.rows.num_groups
        changed = []
        for at in self._suspects(lengths):
            row = int(self._rows[at])
            now = table.blocks(row)
            before = self._tables.get(row, NO_BLOCKS)
            both = min(len(before), len(now))
            differs = np.flatnonzero(before[:both] != now[:both])
            kept = int(differs[0]) if len(differs) else both
            if kept < max(len(before), len(now)):
                self._tables[row] = now.copy()
                number = int(self._numbers[at // groups])
                changed.append((number, at % groups, kept, now[kept:].tolist()))
        self._lengths[self._rows] = lengths
        return changed

    def _suspects(self, lengths: Int64) -> list[int]:
        """Return the places in `_rows` whose table may have changed."""
        ragged, size = self._state.rows.tables, self._state.block_size
        starts, data = ragged.starts[self._rows], ragged.data
        suspect = -(-lengths // size) != -(-self._lengths[self._rows] // size)
        suspect |= starts != self._starts[self._rows]
        self._starts[self._rows] = starts
        if data.shape != self._data.shape:
            suspect[:] = True
            self._data = data.copy()
            return np.flatnonzero(suspect).tolist()
        at = np.flatnonzero(data != self._data)
        if len(at):
            self._data[at] = data[at]
            order = np.argsort(starts, kind="stable")
            order = order[ragged.spans[self._rows][order] > 0]
            span = np.searchsorted(starts[order], at, "right") - 1
            suspect[order[span[span >= 0]]] = True
        return np.flatnonzero(suspect).tolist()

    # ---------------------------------------------------------------- counts

    def _counts(self, lengths: Int64) -> tuple[int, int, int, int, int, int]:
        pool, host, size = self._state.pool, self._state.host, self._state.block_size
        num_tokens = pool.num_held * size - self._open_slots(lengths)
        return (
            pool.num_held, pool.num_evictable, pool.num_kept, pool.num_free, host.num_held,
            num_tokens,
        )  # fmt: skip

    def _open_slots(self, lengths: Int64) -> int:
        """Return the slots of held blocks that hold no token. Only last blocks have any."""
        state = self._state
        widths = -(-lengths // state.block_size)
        open_slots = widths * state.block_size - lengths
        partly = np.flatnonzero(open_slots)
        if not len(partly):
            return 0
        ragged, rows = state.rows.tables, self._rows[partly]
        tails = ragged.data[ragged.starts[rows] + widths[partly] - 1]
        partly, tails = partly[tails >= 0], tails[tails >= 0]
        alone = state.pool.refs[tails] == 1
        total = int(open_slots[partly[alone]].sum())
        if alone.all():
            return total
        return total + self._open_in_shared(np.unique(tails[~alone]), lengths)

    def _open_in_shared(self, blocks: Int32, lengths: Int64) -> int:
        """Return the slots of shared blocks that no holder uses. O(table entries), as vectors."""
        rows, size = self._state.rows, self._state.block_size
        places, columns = rows.places(self._rows)
        entries = rows.tables.data[places]
        here = np.isin(entries, blocks)
        owners = np.repeat(np.arange(len(lengths)), -(-lengths // size))[here]
        filled = np.zeros(len(blocks), np.int64)
        mine = np.minimum(lengths[owners] - columns[here] * size, size)
        np.maximum.at(filled, np.searchsorted(blocks, entries[here]), mine)
        return int(len(blocks) * size - filled.sum())
