"""Append tokens over groups. A group with a window takes its blocks chunk by chunk.

tokens       0 1 2 3 4 5 6 7 8 9 ...           of a prompt, four computed, chunks of four
group 0      a a a a b b b b c c               blocks for all tokens
group 1      . . d d e e e e                   window 3: no blocks behind it, a chunk ahead
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpager.blocks.block_tables import ranks
from kvpager.blocks.extension import Extension
from kvpager.blocks.groups.table import GroupTable
from kvpager.blocks.state import BlockState
from kvpager.plans import Int32, Int64, Step


class GroupExtension:
    """Takes blocks for tokens, in groups with a window for a chunk only.

    The caller holds the lock. Writes what `Extension` writes, and the lengths and pending ids of
    sequences.
    """

    def __init__(
        self,
        state: BlockState,
        table: GroupTable,
        extension: Extension,
        windows: tuple[int | None, ...],
        max_chunk: int | None,
    ) -> None:
        self._state = state
        self._table = table
        self._extension = extension
        self._windows = windows
        self._max_chunk = max_chunk if any(windows) else None

    def rooms(self, start: int, length: int) -> list[int]:
        """Return how many tokens get blocks in each group when `start` are computed. O(groups)."""
        room = length
        if self._max_chunk is not None:
            room = min(self._up_to_a_block(start + self._max_chunk), length)
        return [length if window is None else room for window in self._windows]

    def _up_to_a_block(self, num_tokens: int) -> int:
        size = self._state.block_size
        return -(-num_tokens // size) * size

    def append(
        self, names: Int64, num_new: int | Int64, ids: Int32 | None, speculative: bool
    ) -> Step:
        """Make room for `num_new` more tokens of each sequence. O(tokens * groups).

        Raises: `OutOfBlocks`; `ValueError` for speculative tokens that get no slots.
        """
        table, groups = self._table, len(self._windows)
        if self._waits(names, num_new):
            if speculative:
                raise ValueError(
                    "speculative=True: some tokens up to the new length get no slots yet. "
                    "Append fewer tokens, or call open_slots first."
                )
            return self._append_in_part(names, num_new, ids)
        step = self._extension.append(
            table.rows[:, names].ravel(),
            num_new if isinstance(num_new, int) else np.tile(num_new, groups),
            None if ids is None else np.tile(ids, groups),
            speculative,
        )
        table.lengths[names] += num_new
        return replace(step, slots=step.slots.reshape(groups, -1))

    def _waits(self, names: Int64, num_new: int | Int64) -> bool:
        """Return True if some new tokens get no slots in groups with a window. O(n)."""
        if self._max_chunk is None:
            return False
        if np.max(num_new, initial=0) > self._max_chunk:
            return True
        return bool(self._table.pending) and any(
            name in self._table.pending for name in names.tolist()
        )

    def _append_in_part(self, names: Int64, num_new: int | Int64, ids: Int32 | None) -> Step:
        table, groups = self._table, len(self._windows)
        starts = table.lengths[names]
        counts = np.broadcast_to(np.asarray(num_new, np.int64), starts.shape)
        rows = table.rows[:, names]
        before = self._state.rows.lengths[rows]
        rooms = before.copy()
        for at, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            has_room = before[:, at] == start
            rooms[has_room, at] = np.array(self.rooms(start, start + count))[has_room]
        taken, firsts = (rooms - before).ravel(), np.cumsum(counts) - counts
        slots = np.full((groups, int(counts.sum())), -1, np.int64)
        # The first new tokens of each row get slots.
        places = np.tile(firsts, groups)
        theirs = None
        if ids is not None:
            theirs = ids[np.repeat(places, taken) + ranks(taken)]
        step = self._extension.append(rows.ravel(), taken, theirs, False)
        places += np.repeat(np.arange(groups) * slots.shape[1], len(names))
        slots.reshape(-1)[np.repeat(places, taken) + ranks(taken)] = step.slots
        table.lengths[names] = starts + counts
        for at, name in enumerate(names.tolist()):
            first, count = int(firsts[at]), int(counts[at])
            new = None if ids is None else ids[first : first + count]
            self._note(name, int(rooms[:, at].min()), int(starts[at]), new)
        return replace(step, slots=slots)

    def _note(self, name: int, room: int, start: int, new: Int32 | None) -> None:
        """Store the ids of tokens without slots."""
        table = self._table
        if room == table.lengths[name]:
            return
        # Tokens before `start` have slots; their ids are not needed here.
        ids = table.pending.get(name, np.zeros(start, np.int32))
        if ids is not None and new is not None and len(ids) == start:
            ids = np.concatenate([ids, new])
        table.pending[name] = ids

    def open(self, name: int, stop: int) -> None:
        """Take the missing blocks of a sequence's first `stop` tokens. O(tokens).

        Raises: `OutOfBlocks`.
        """
        table = self._table
        if name not in table.pending:
            return
        rows, length = table.rows[:, name], int(table.lengths[name])
        before = self._state.rows.lengths[rows]
        rooms = np.maximum(before, min(self._up_to_a_block(stop), length))
        if not np.any(rooms > before):
            return
        known, ids = table.pending[name], None
        if known is not None and len(known) >= rooms.max():
            pairs = zip(before.tolist(), rooms.tolist(), strict=True)
            ids = np.concatenate([known[first:end] for first, end in pairs])
        # Chunks end at block boundaries, so no block has to be copied.
        self._extension.append(rows, rooms - before, ids, False)
        if rooms.min() == length:
            del table.pending[name]

    def cut(self, name: int, length: int) -> None:
        """Set the length of a sequence whose rows have at most as many tokens. O(tokens)."""
        table = self._table
        table.lengths[name] = length
        del table.digests[name][length // self._state.block_size :]
        if name in table.pending:
            ids = table.pending.pop(name)
            if self._state.rows.lengths[table.rows[:, name]].min() < length:
                table.pending[name] = None if ids is None else ids[:length]
