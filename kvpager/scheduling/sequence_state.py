"""The scheduler's state of each sequence: a structure of arrays, indexed by sequence id.

A request starts as one sequence. After each token a sequence continues once, forks, or ends, so a
request may have several sequences. Each has an id, its `seq_id`:

    seq_id      0      1      2        lengths: tokens that have room in the pool
    lengths    33     34      -        computed: leading tokens whose KV is written
    pending   871      9      -        pending: the newest token, which has no room yet
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvpager.blocks.block_tables import Ragged
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import BrokenInvariant
from kvpager.plans import Int32
from kvpager.scheduling.request import RequestState

NO_PREFIX = -1  # in `SequenceState.prefix_from`


class SequenceState:
    """The sequences of all live requests. Only this class writes the arrays.

    A sequence id is reused only after the plan that reports its end was followed by another plan.
    """

    def __init__(self) -> None:
        self.lengths: Int32 = np.zeros(0, np.int32)
        self.computed: Int32 = np.zeros(0, np.int32)
        self.pending: Int32 = np.zeros(0, np.int32)
        self.generated: Int32 = np.zeros(0, np.int32)
        self.limits: Int32 = np.zeros(0, np.int32)
        # The sequence that computes a common prefix, or NO_PREFIX.
        self.prefix_from: Int32 = np.zeros(0, np.int32)
        self.history = Ragged(0)  # generated tokens, the pending token last
        self.handles: list[SequenceHandle | None] = []
        self.owners: list[RequestState | None] = []
        self._free: list[int] = []
        self.ended: list[int] = []  # since the last `report`
        self._reported: list[int] = []

    # ---------------------------------------------------------------- add and end

    def add(self, state: RequestState) -> int:
        """Add a sequence to a request and return its id. O(1)."""
        seq_id = self._take(state)
        self.lengths[seq_id] = self.computed[seq_id] = self.generated[seq_id] = 0
        self.limits[seq_id] = state.request.max_new_tokens
        self.prefix_from[seq_id] = NO_PREFIX
        return seq_id

    def fork(self, parent: int, handle: SequenceHandle) -> int:
        """Add a copy of sequence `parent` and return its id. O(generated tokens)."""
        seq_id = self._take(self.owner(parent))
        for column in (self.lengths, self.computed, self.generated, self.limits, self.prefix_from):
            column[seq_id] = column[parent]
        count = int(self.generated[parent])
        self.history.reserve_row(seq_id, count)
        self.history.row(seq_id)[:count] = self.history.row(parent)[:count]
        self.handles[seq_id] = handle
        return seq_id

    def _take(self, state: RequestState) -> int:
        if not self._free:
            self._grow(max(8, len(self.owners)))
        seq_id = self._free.pop()
        self.owners[seq_id] = state
        return seq_id

    def _grow(self, more: int) -> None:
        count = len(self.owners)
        for name in ("lengths", "computed", "pending", "generated", "limits", "prefix_from"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, np.int32)]))
        self.history.add_rows(more)
        self.handles.extend([None] * more)
        self.owners.extend([None] * more)
        self._free.extend(range(count + more - 1, count - 1, -1))

    def undo_add(self, seq_id: int) -> None:
        """Undo `add`, before any plan contains the sequence. O(1)."""
        self.owners[seq_id] = None
        self._free.append(seq_id)

    def drop(self, seq_id: int) -> None:
        """End a sequence. Amortised O(1)."""
        self.history.release(seq_id)
        self.owners[seq_id] = self.handles[seq_id] = None
        self.ended.append(seq_id)

    def recycle(self) -> None:
        """Allow the ids that `report` returned to be reused. O(ids)."""
        self._free.extend(self._reported)
        self._reported.clear()

    def report(self) -> Int32:
        """Return the ids of sequences that ended since the last call. O(ids)."""
        ended = np.array(self.ended, np.int32)
        self._reported.extend(self.ended)
        self.ended.clear()
        return ended

    # ---------------------------------------------------------------- blocks

    def assign(self, seq_id: int, handle: SequenceHandle) -> None:
        """Assign `handle`, whose blocks have room for all known tokens, to a sequence. O(1)."""
        self.handles[seq_id] = handle
        self.lengths[seq_id] = self.num_known(seq_id)
        self.computed[seq_id] = handle.num_cached_tokens

    def unassign(self, seq_id: int) -> None:
        """Remove the handle of a sequence whose blocks were freed. O(1)."""
        self.handles[seq_id] = None
        self.computed[seq_id] = self.lengths[seq_id] = 0
        self.prefix_from[seq_id] = NO_PREFIX

    def wait_for(self, seq_id: int, other: int) -> None:
        """Make a sequence wait until `other` has computed their common prefix. O(1)."""
        self.prefix_from[seq_id] = other

    def is_waiting(self, seq_id: int) -> bool:
        """Return True if a sequence still waits for a common prefix. O(1)."""
        other = int(self.prefix_from[seq_id])
        if other == NO_PREFIX:
            return False
        # While `other` waits itself, the tokens it counts as computed are not computed yet.
        if self.prefix_from[other] != NO_PREFIX or self.computed[other] < self.computed[seq_id]:
            return True
        self.prefix_from[seq_id] = NO_PREFIX
        return False

    # ---------------------------------------------------------------- tokens

    def make_room(self, seq_ids: Int32) -> None:
        """Count the pending token of each sequence as having room. O(sequences)."""
        self.lengths[seq_ids] += 1

    def mark_computed(self, seq_ids: Int32, counts: Int32) -> None:
        """Record that the KV of the first `counts` tokens is written. O(sequences)."""
        self.computed[seq_ids] = counts

    def extend(self, seq_ids: Int32, tokens: Int32) -> None:
        """Append a generated token to each sequence. O(sequences)."""
        index = seq_ids.astype(np.intp)
        counts = self.generated[index]
        self.history.reserve(index, counts + 1)
        self.history.data[self.history.starts[index] + counts] = tokens
        self.generated[index] = counts + 1
        self.pending[index] = tokens

    def owner(self, seq_id: int) -> RequestState:
        """Return the request of a sequence. O(1)."""
        state = self.owners[seq_id]
        assert state is not None, f"sequence {seq_id} is not live"
        return state

    def handle(self, seq_id: int) -> SequenceHandle:
        """Return the manager's handle of a sequence that has blocks. O(1)."""
        handle = self.handles[seq_id]
        assert handle is not None, f"sequence {seq_id} has no blocks"
        return handle

    def num_known(self, seq_id: int) -> int:
        """Return how many tokens a sequence has, without the pending one. O(1)."""
        generated = int(self.generated[seq_id])
        return len(self.owner(seq_id).prompt) + max(generated - 1, 0)

    def tokens(self, seq_id: int, start: int, stop: int) -> Int32:
        """Return the token ids `start` to `stop` of prompt and reply. O(tokens)."""
        prompt = self.owner(seq_id).prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        late = self.history.row(seq_id)[max(start - len(prompt), 0) : stop - len(prompt)]
        return np.concatenate([prompt[start:], late])

    def num_common(self, one: int, other: int) -> int:
        """Return how many leading tokens two sequences of a request share. O(tokens)."""
        num_prompt = len(self.owner(one).prompt)
        count = min(self.num_known(one), self.num_known(other)) - num_prompt
        return num_prompt + num_common(
            self.history.row(one)[:count], self.history.row(other)[:count]
        )

    # ---------------------------------------------------------------- invariants

    def check(self, states: Iterable[RequestState]) -> None:
        """Raise `BrokenInvariant` unless each id is free or of one live request. O(ids)."""
        mine = [(seq_id, state) for state in states for seq_id in state.seq_ids]
        away = [*self._free, *self.ended, *self._reported]
        if sorted([seq_id for seq_id, _ in mine] + away) != list(range(len(self.owners))):
            raise BrokenInvariant("sequences: an id is lost or listed twice")
        if any(self.owners[seq_id] is not state for seq_id, state in mine):
            raise BrokenInvariant("sequences: a request lists an id that it does not own")
        for seq_id in away:
            if self.owners[seq_id] or self.handles[seq_id]:
                raise BrokenInvariant(f"sequence {seq_id}: ended, but still has an owner or blocks")
        for seq_id, _ in mine:
            self._check_sequence(seq_id)

    def _check_sequence(self, seq_id: int) -> None:
        handle = self.handles[seq_id]
        length = 0 if handle is None else len(handle)
        computed = int(self.computed[seq_id])
        if length != self.lengths[seq_id] or not 0 <= computed <= length:
            raise BrokenInvariant(f"sequence {seq_id}: {computed} of {length} tokens computed")
        if self.generated[seq_id] >= self.limits[seq_id]:
            raise BrokenInvariant(f"sequence {seq_id}: reached max_new_tokens, but is live")


def num_common(one: Int32, other: Int32) -> int:
    """Return the length of the common prefix of two arrays. O(tokens)."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()[0]
    return int(differs[0]) if len(differs) else count
