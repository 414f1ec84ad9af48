"""What a scheduler knows of each sequence: a structure of arrays, one row per sequence.

A request begins as one sequence. Each time a sequence's logits choose, it continues once, several
times or not at all, so a request may have several. Each has a number of its own, its `seq_id`:

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

NO_LEADER = -1


class SequenceState:
    """The sequences of all live requests, by number. Only this class writes the arrays.

    A number is given again only after the plan that told of its end was followed by another.
    """

    def __init__(self) -> None:
        self.lengths: Int32 = np.zeros(0, np.int32)
        self.computed: Int32 = np.zeros(0, np.int32)
        self.pending: Int32 = np.zeros(0, np.int32)
        self.generated: Int32 = np.zeros(0, np.int32)
        self.limits: Int32 = np.zeros(0, np.int32)
        self.leaders: Int32 = np.zeros(0, np.int32)  # computes what it begins with, or NO_LEADER
        self.history = Ragged(0)  # tokens generated, the pending one last
        self.handles: list[SequenceHandle | None] = []
        self.owners: list[RequestState | None] = []
        self._free: list[int] = []
        self._ended: list[int] = []
        self._reported: list[int] = []

    # ---------------------------------------------------------------- sequences come and go

    def add(self, state: RequestState) -> int:
        """Return a new sequence of a request. O(1)."""
        number = self._take(state)
        self.lengths[number] = self.computed[number] = self.generated[number] = 0
        self.limits[number] = state.request.max_new_tokens
        self.leaders[number] = NO_LEADER
        return number

    def fork(self, parent: int, handle: SequenceHandle) -> int:
        """Return a sequence that has had the same life as `parent`. O(tokens generated)."""
        number = self._take(self.owner(parent))
        for column in (self.lengths, self.computed, self.generated, self.limits, self.leaders):
            column[number] = column[parent]
        count = int(self.generated[parent])
        self.history.reserve_row(number, count)
        self.history.row(number)[:count] = self.history.row(parent)[:count]
        self.handles[number] = handle
        return number

    def _take(self, state: RequestState) -> int:
        if not self._free:
            self._grow(max(8, len(self.owners)))
        number = self._free.pop()
        self.owners[number] = state
        return number

    def _grow(self, more: int) -> None:
        count = len(self.owners)
        for name in ("lengths", "computed", "pending", "generated", "limits", "leaders"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, np.int32)]))
        self.history.add_rows(more)
        self.handles.extend([None] * more)
        self.owners.extend([None] * more)
        self._free.extend(range(count + more - 1, count - 1, -1))

    def undo_add(self, number: int) -> None:
        """Take `add` back, before a plan has told of the number. O(1)."""
        self.owners[number] = None
        self._free.append(number)

    def drop(self, number: int) -> None:
        """End a sequence. Amortised O(1)."""
        self.history.release(number)
        self.owners[number] = self.handles[number] = None
        self._ended.append(number)

    def recycle(self) -> None:
        """Allow the numbers whose end was told to be given again. O(numbers)."""
        self._free.extend(self._reported)
        self._reported.clear()

    def report(self) -> Int32:
        """Return the sequences that ended since the last call. O(numbers)."""
        ended = np.array(self._ended, np.int32)
        self._reported.extend(self._ended)
        self._ended.clear()
        return ended

    @property
    def has_ended(self) -> bool:
        """True if `report` has any to tell of. O(1)."""
        return bool(self._ended)

    # ---------------------------------------------------------------- their blocks

    def assign(self, number: int, handle: SequenceHandle) -> None:
        """Give a sequence the blocks of `handle`, which hold all its known tokens. O(1)."""
        self.handles[number] = handle
        self.lengths[number] = self.num_known(number)
        self.computed[number] = handle.num_cached_tokens

    def unassign(self, number: int) -> None:
        """Forget the blocks of a sequence, which were freed. O(1)."""
        self.handles[number] = None
        self.computed[number] = self.lengths[number] = 0
        self.leaders[number] = NO_LEADER

    def follow(self, number: int, leader: int) -> None:
        """Let a sequence wait until `leader` has computed what they have in common. O(1)."""
        self.leaders[number] = leader

    def is_held_up(self, number: int) -> bool:
        """True if the leader of a sequence has not computed all of its beginning yet. O(1)."""
        leader = int(self.leaders[number])
        if leader == NO_LEADER:
            return False
        # A leader that follows another one has not computed what it counts as computed.
        if self.leaders[leader] != NO_LEADER or self.computed[leader] < self.computed[number]:
            return True
        self.leaders[number] = NO_LEADER
        return False

    # ---------------------------------------------------------------- tokens

    def make_room(self, numbers: Int32) -> None:
        """Count one more token, the pending one, as having room. O(numbers)."""
        self.lengths[numbers] += 1

    def mark_computed(self, numbers: Int32, counts: Int32) -> None:
        """Say that the KV of the first `counts` tokens of each sequence is written. O(numbers)."""
        self.computed[numbers] = counts

    def extend(self, numbers: Int32, tokens: Int32) -> None:
        """Continue each sequence with a token. O(numbers)."""
        index = numbers.astype(np.intp)
        counts = self.generated[index]
        self.history.reserve(index, counts + 1)
        self.history.data[self.history.starts[index] + counts] = tokens
        self.generated[index] = counts + 1
        self.pending[index] = tokens

    def owner(self, number: int) -> RequestState:
        """Return the request of a sequence. O(1)."""
        state = self.owners[number]
        assert state is not None, f"sequence {number} is not live"
        return state

    def handle(self, number: int) -> SequenceHandle:
        """Return the manager's handle: there is one while the request has blocks. O(1)."""
        handle = self.handles[number]
        assert handle is not None, f"sequence {number} has no blocks"
        return handle

    def num_known(self, number: int) -> int:
        """Return how many tokens to compute before it can continue: all but the pending. O(1)."""
        generated = int(self.generated[number])
        return len(self.owner(number).prompt) + max(generated - 1, 0)

    def tokens(self, number: int, start: int, stop: int) -> Int32:
        """Return the ids of tokens `start` to `stop`, the prompt's first. O(tokens)."""
        prompt = self.owner(number).prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        late = self.history.row(number)[max(start - len(prompt), 0) : stop - len(prompt)]
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
        """Raise `BrokenInvariant` unless each number is one live request's, or free. O(n)."""
        mine = [(number, state) for state in states for number in state.seq_ids]
        away = [*self._free, *self._ended, *self._reported]
        if sorted([number for number, _ in mine] + away) != list(range(len(self.owners))):
            raise BrokenInvariant("sequences: a number is used twice, or lost")
        if any(self.owners[number] is not state for number, state in mine):
            raise BrokenInvariant("sequences: a number is listed by another than its owner")
        for number in away:
            if self.owners[number] or self.handles[number]:
                raise BrokenInvariant(f"sequence {number}: ended, but has an owner or blocks")
        for number, _ in mine:
            self._check_sequence(number)

    def _check_sequence(self, number: int) -> None:
        handle = self.handles[number]
        length = 0 if handle is None else len(handle)
        computed = int(self.computed[number])
        if length != self.lengths[number] or not 0 <= computed <= length:
            raise BrokenInvariant(f"sequence {number}: {computed} of {length} tokens computed")
        if self.generated[number] >= self.limits[number]:
            raise BrokenInvariant(f"sequence {number}: has all its tokens, but is live")


def num_common(one: Int32, other: Int32) -> int:
    """Return how many leading tokens two arrays have in common. O(tokens)."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()[0]
    return int(differs[0]) if len(differs) else count
