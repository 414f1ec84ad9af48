"""Append tokens over groups. A group with a window takes its blocks chunk by chunk.

tokens       0 1 2 3 4 5 6 7 8 9 ...           of a prompt, four computed, chunks of four
group 0      a a a a b b b b c c               blocks for all tokens
group 1      . . d d e e e e                   window 3: no blocks behind it, a chunk ahead;
                                               the tokens behind the chunk wait
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpager.blocks.block_tables import ranks
from kvpager.blocks.extension import Extension
from kvpager.blocks.state import BlockState
from kvpager.plans import AppendPlan, Int32, Int64


class GroupExtension(Extension):
    """Takes blocks for tokens, in groups with a window for a chunk only.

    The caller holds the lock. Writes what `Extension` writes, and `waiting`.
    """

    def __init__(self, state: BlockState) -> None:
        super().__init__(state)
        self._max_chunk = state.max_chunk if any(state.windows) else None

    def rooms(self, start: int, length: int) -> list[int]:
        """Return how many tokens get blocks in each group when `start` are computed. O(groups)."""
        room = length
        if self._max_chunk is not None:
            room = min(self._up_to_a_block(start + self._max_chunk), length)
        return [length if window is None else room for window in self._state.windows]

    def _up_to_a_block(self, num_tokens: int) -> int:
        size = self._state.block_size
        return -(-num_tokens // size) * size

    def append(
        self, sequences: Int64, num_new: int | Int64, ids: Int32 | None, speculative: bool
    ) -> AppendPlan:
        """Make room for `num_new` more tokens of each sequence. O(tokens * groups)."""
        rows, groups = self._state.rows, self._state.rows.num_groups
        members = rows.members(sequences)
        is_long = self._max_chunk is not None and np.max(num_new, initial=0) > self._max_chunk
        if is_long or (rows.waiting_ids and rows.waiting[members].any()):
            if speculative:
                raise ValueError(
                    "speculative=True: some tokens up to the new length get no slots yet. "
                    "Append fewer tokens, or call open_slots first."
                )
            return self._append_in_part(sequences, num_new, ids)
        step = super().append(
            members,
            num_new if isinstance(num_new, int) else np.tile(num_new, groups),
            None if ids is None else np.tile(ids, groups),
            speculative,
        )
        return replace(step, slots=step.slots.reshape(groups, -1))

    def _append_in_part(
        self, sequences: Int64, num_new: int | Int64, ids: Int32 | None
    ) -> AppendPlan:
        rows, groups = self._state.rows, self._state.rows.num_groups
        starts = rows.lengths_of(sequences)
        counts = np.broadcast_to(np.asarray(num_new, np.int64), starts.shape)
        members = rows.members(sequences).reshape(groups, -1)
        before = rows.lengths[members]
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
        step = super().append(members.ravel(), taken, theirs, False)
        places += np.repeat(np.arange(groups) * slots.shape[1], len(sequences))
        slots.reshape(-1)[np.repeat(places, taken) + ranks(taken)] = step.slots
        rows.waiting[members] = starts + counts - rooms
        for at, (first, start) in enumerate(zip(sequences.tolist(), starts.tolist(), strict=True)):
            if rooms[:, at].min() < start + counts[at]:
                known = rows.waiting_ids.get(first, np.zeros(start, np.int32))
                if ids is not None and len(known) == start:
                    known = np.concatenate([known, ids[firsts[at] : firsts[at] + counts[at]]])
                rows.waiting_ids[first] = known
        return replace(step, slots=slots)

    def open(self, first: int, stop: int) -> None:
        """Take the missing blocks of a sequence's first `stop` tokens. O(tokens)."""
        table, length = self._state.rows, self._state.rows.length(first)
        if first not in table.waiting_ids:
            return
        rows = np.array(table.rows_of(first))
        before = table.lengths[rows]
        rooms = np.maximum(before, min(self._up_to_a_block(stop), length))
        if not np.any(rooms > before):
            return
        known, ids = table.waiting_ids[first], None
        if len(known) >= rooms.max():
            pairs = zip(before.tolist(), rooms.tolist(), strict=True)
            ids = np.concatenate([known[start:end] for start, end in pairs])
        # Chunks end at block boundaries, so no block has to be copied.
        super().append(rows, rooms - before, ids, False)
        table.waiting[rows] = length - rooms
        if rooms.min() == length:
            del table.waiting_ids[first]

    def accept(self, sequences: Int64, kept: Int64, ids: Int32 | None) -> None:
        """Keep the first `kept` speculative tokens of each sequence. O(tokens * groups)."""
        rows, groups = self._state.rows, self._state.rows.num_groups
        theirs = None if ids is None else np.tile(ids, groups)
        super().accept(rows.members(sequences), np.tile(kept, groups), theirs)
