"""What a scheduler knows of each sequence: a structure of arrays, one row per sequence.

A request begins as one sequence. Each time a sequence's logits choose, it continues once, several
times or not at all, so a request may have several. Each has a seq_id of its own, its `seq_id`:

    seq_id      0      1      2        lengths: tokens that have room in the pool
    lengths    33     34      -        computed: leading tokens whose KV is written
    pending   871      9      -        the token chosen last, which has no room yet
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvpager.blocks.block_tables import Ragged
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import BrokenInvariant
from kvpager.plans import Int32
from kvpager.scheduling.request import RequestState

NO_PREFIX = -1


class SequenceState:
    """The sequences of all live requests, by seq_id. Only this class writes the arrays.

    A seq_id is given again only after the plan that told of its end was followed by another.
    """

    def __init__(self) -> None:
        self.lengths: Int32 = np.zeros(0, np.int32)
        self.computed: Int32 = np.zeros(0, np.int32)
        self.pending: Int32 = np.zeros(0, np.int32)
        self.generated: Int32 = np.zeros(0, np.int32)
        self.limits: Int32 = np.zeros(0, np.int32)
        self.prefix_from: Int32 = np.zeros(
            0, np.int32
        )  # computes what it begins with, or NO_PREFIX
        self.history = Ragged(0)  # tokens generated, the pending one last
        self.handles: list[SequenceHandle | None] = []
        self.owners: list[RequestState | None] = []
        self._free: list[int] = []
        self._ended: list[int] = []
        self._reported: list[int] = []

    # ---------------------------------------------------------------- sequences come and go

    def add(self, state: RequestState) -> int:
        """Return a new sequence of a request. O(1)."""
        seq_id = self._take(state)
        self.lengths[seq_id] = self.computed[seq_id] = self.generated[seq_id] = 0
        self.limits[seq_id] = state.request.max_new_tokens
        self.prefix_from[seq_id] = NO_PREFIX
        return seq_id

    def fork(self, parent: int, handle: SequenceHandle) -> int:
        """Return a sequence that has had the same life as `parent`. O(tokens generated)."""
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
        """Take `add` back, before a plan has told of the seq_id. O(1)."""
        self.owners[seq_id] = None
        self._free.append(seq_id)

    def drop(self, seq_id: int) -> None:
        """End a sequence. Amortised O(1)."""
        self.history.release(seq_id)
        self.owners[seq_id] = self.handles[seq_id] = None
        self._ended.append(seq_id)

    def recycle(self) -> None:
        """Allow the seq_ids whose end was told to be given again. O(seq_ids)."""
        self._free.extend(self._reported)
        self._reported.clear()

    def report(self) -> Int32:
        """Return the sequences that ended since the last call. O(seq_ids)."""
        ended = np.array(self._ended, np.int32)
        self._reported.extend(self._ended)
        self._ended.clear()
        return ended

    @property
    def has_ended(self) -> bool:
        """True if `report` has any to tell of. O(1)."""
        return bool(self._ended)

    # ---------------------------------------------------------------- their blocks

    def assign(self, seq_id: int, handle: SequenceHandle) -> None:
        """Give a sequence the blocks of `handle`, which hold all its known tokens. O(1)."""
        self.handles[seq_id] = handle
        self.lengths[seq_id] = self.num_known(seq_id)
        self.computed[seq_id] = handle.num_cached_tokens

    def unassign(self, seq_id: int) -> None:
        """Forget the blocks of a sequence, which were freed. O(1)."""
        self.handles[seq_id] = None
        self.computed[seq_id] = self.lengths[seq_id] = 0
        self.prefix_from[seq_id] = NO_PREFIX

    def wait_for(self, seq_id: int, other: int) -> None:
        """Let a sequence wait until `leader` has computed what they have in common. O(1)."""
        self.prefix_from[seq_id] = other

    def is_waiting(self, seq_id: int) -> bool:
        """True if the leader of a sequence has not computed all of its beginning yet. O(1)."""
        other = int(self.prefix_from[seq_id])
        if other == NO_PREFIX:
            return False
        # A leader that follows another one has not computed what it counts as computed.
        if self.prefix_from[other] != NO_PREFIX or self.computed[other] < self.computed[seq_id]:
            return True
        self.prefix_from[seq_id] = NO_PREFIX
        return False

    # ---------------------------------------------------------------- tokens

    def make_room(self, seq_ids: Int32) -> None:
        """Count one more token, the pending one, as having room. O(seq_ids)."""
        self.lengths[seq_ids] += 1

    def mark_computed(self, seq_ids: Int32, counts: Int32) -> None:
        """Say that the KV of the first `counts` tokens of each sequence is written. O(seq_ids)."""
        self.computed[seq_ids] = counts

    def extend(self, seq_ids: Int32, tokens: Int32) -> None:
        """Continue each sequence with a token. O(seq_ids)."""
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
        """Return the manager's handle: there is one while the request has blocks. O(1)."""
        handle = self.handles[seq_id]
        assert handle is not None, f"sequence {seq_id} has no blocks"
        return handle

    def num_known(self, seq_id: int) -> int:
        """Return how many tokens to compute before it can continue: all but the pending. O(1)."""
        generated = int(self.generated[seq_id])
        return len(self.owner(seq_id).prompt) + max(generated - 1, 0)

    def tokens(self, seq_id: int, start: int, stop: int) -> Int32:
        """Return the ids of tokens `start` to `stop`, the prompt's first. O(tokens)."""
        prompt = self.owner(seq_id).prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        late = self.history.row(seq_id)[max(start - len(prompt), 0) : stop - len(prompt)]
        return np.concatenate([prompt[start:], late])

    def num_common(self, one: int, other: int) -> int:
        """Return how many leading known tokens two of a request have in common. O(tokens)."""
        num_prompt = len(self.owner(one).prompt)
        count = min(self.num_known(one), self.num_known(other)) - num_prompt
        return num_prompt + num_common(
            self.history.row(one)[:count], self.history.row(other)[:count]
        )

    # ---------------------------------------------------------------- laws

    def check(self, states: Iterable[RequestState]) -> None:
        """Raise `BrokenInvariant` unless each seq_id is one live request's, or free. O(n)."""
        mine = [(seq_id, state) for state in states for seq_id in state.seq_ids]
        away = [*self._free, *self._ended, *self._reported]
        if sorted([seq_id for seq_id, _ in mine] + away) != list(range(len(self.owners))):
            raise BrokenInvariant("sequences: a seq_id is used twice, or lost")
        if any(self.owners[seq_id] is not state for seq_id, state in mine):
            raise BrokenInvariant("sequences: a seq_id is listed by another than its owner")
        for seq_id in away:
            if self.owners[seq_id] or self.handles[seq_id]:
                raise BrokenInvariant(f"sequence {seq_id}: ended, but has an owner or blocks")
        for seq_id, _ in mine:
            self._check_sequence(seq_id)

    def _check_sequence(self, seq_id: int) -> None:
        handle = self.handles[seq_id]
        length = 0 if handle is None else len(handle)
        computed = int(self.computed[seq_id])
        if length != self.lengths[seq_id] or not 0 <= computed <= length:
            raise BrokenInvariant(f"sequence {seq_id}: {computed} of {length} tokens computed")
        if self.generated[seq_id] >= self.limits[seq_id]:
            raise BrokenInvariant(f"sequence {seq_id}: has all its tokens, but is live")


def num_common(one: Int32, other: Int32) -> int:
    """Return how many leading tokens two arrays have in common. O(tokens)."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()[0]
    return int(differs[0]) if len(differs) else count
