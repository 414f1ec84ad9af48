"""Sequences over several groups of layers: their rows in the sequence table.

sequence   0   1   2        a handle names (sequence, generation)
group 0    0   3   -        rows of `SequenceTable`, one for each group
group 1    1   4   -
lengths   33   9   -        a row of a group with a window may have blocks for fewer tokens
"""

from __future__ import annotations

import numpy as np

from kvpager.blocks.groups.windows import first_needed
from kvpager.blocks.sequences import Batch, Owner, SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.errors import BrokenInvariant, SequenceSwapped, StaleSequence
from kvpager.plans import Int32, Int64


class GroupTable:
    """The sequences of a manager over groups. The caller holds the lock.

    Attributes:
        rows: int64 [groups, sequences], of the sequence table.
        lengths: int64 [sequences], tokens.
        digests: of the leading full blocks of each sequence, see `prefix.py`.
        pending: the token ids, None if unknown, of each sequence with tokens that lack slots in
            some group.
    """

    def __init__(self, owner: Owner, state: BlockState, num_groups: int) -> None:
        self.owner = owner
        self._state = state
        self.rows: Int64 = np.zeros((num_groups, 0), np.int64)
        self.lengths: Int64 = np.zeros(0, np.int64)
        self.generations: Int64 = np.zeros(0, np.int64)
        self.digests: list[list[bytes]] = []
        self.pending: dict[int, Int32 | None] = {}
        self.free: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths) - len(self.free)

    def live(self) -> Int64:
        """Return the sequences in use. O(sequences)."""
        return np.setdiff1d(np.arange(len(self.lengths)), self.free)

    # ---------------------------------------------------------------- handles

    def sequence(self, handle: SequenceHandle) -> int:
        """Return the sequence of a handle. O(1). Raises `StaleSequence`."""
        if not isinstance(handle, SequenceHandle):
            raise TypeError(f"expected a SequenceHandle, got {type(handle).__name__}")
        if handle._owner is not self.owner:
            raise StaleSequence(f"{handle.name} belongs to another manager")
        if self.generations[handle._row] != handle._generation:
            raise StaleSequence(f"{handle.name} was freed")
        return handle._row

    def resolve(self, target: SequenceHandle | Batch | list[SequenceHandle]) -> Int64:
        """Return the sequences of a handle, several, or a batch. O(n).

        Raises: `StaleSequence`, `ValueError` for a repeated sequence.
        """
        if isinstance(target, Batch):
            if target.owner is not self.owner:
                raise StaleSequence("the batch belongs to another manager")
            if target.epoch != self._state.rows.epoch:
                stale = self.generations[target.rows] != target.generations
                if stale.any():
                    row, generation = target.rows[stale][0], target.generations[stale][0]
                    raise StaleSequence(
                        f"SequenceHandle {row}.{generation} of the batch was freed. "
                        "Make a new batch."
                    )
            return target.rows
        handles = [target] if isinstance(target, SequenceHandle) else target
        found = np.array([self.sequence(handle) for handle in handles], np.int64)
        if len(np.unique(found)) != len(found):
            raise ValueError("sequences: one is repeated. Pass each sequence once.")
        return found

    def resident(self, target: SequenceHandle | Batch | list[SequenceHandle]) -> Int64:
        """Return the sequences of handles. O(n). Raises `StaleSequence`, `SequenceSwapped`."""
        epoch = self._state.rows.epoch
        if isinstance(target, Batch) and target.epoch == epoch and target.owner is self.owner:
            return target.rows
        found = self.resolve(target)
        away = self._state.rows.swapped[self.rows[:, found]].any(axis=0)
        if away.any():
            name = self._shown(int(found[away][0]))
            raise SequenceSwapped(f'{name} is on the host. Call swap(seq, "device").')
        if isinstance(target, Batch):
            target.epoch = epoch
        return found

    def swappable(self, names: Int64) -> list[int]:
        """Return the rows that are not wholly on the host. O(n * groups).

        Raises: `SequenceSwapped` for a sequence without such a row.
        """
        table, found = self._state.rows, list[int]()
        for name in names.tolist():
            here = [
                row
                for row in self.rows[:, name].tolist()
                if len(table.device_blocks(row)) or not len(table.host_blocks(row))
            ]
            if not here:
                raise SequenceSwapped(f"{self._shown(name)} is wholly on the host already")
            found += here
        return found

    def _shown(self, sequence: int) -> str:
        """Return the name of a sequence, as `SequenceHandle.name`. O(1)."""
        return f"SequenceHandle {sequence}.{self.generations[sequence]}"

    # ---------------------------------------------------------------- begin and end sequences

    def reserve(self, count: int) -> None:
        """Make room for `count` more sequences. Amortised O(1)."""
        if count <= len(self.free):
            return
        old = len(self.lengths)
        more = max(count - len(self.free), 8, old)
        rows = np.zeros((len(self.rows), old + more), np.int64)
        rows[:, :old] = self.rows
        lengths, generations = (np.zeros(old + more, np.int64) for _ in range(2))
        lengths[:old], generations[:old] = self.lengths, self.generations
        digests = [*self.digests, *([] for _ in range(more))]
        free = [*range(old + more - 1, old - 1, -1), *self.free]
        # Nothing can fail from here on.
        self.rows, self.lengths, self.generations = rows, lengths, generations
        self.digests, self.free = digests, free

    def handles(self, count: int, num_cached: int) -> list[SequenceHandle]:
        """Return handles for the next `count` sequences, which are reserved. O(count)."""
        names = self.free[: -count - 1 : -1]
        return [
            SequenceHandle(self.owner, name, int(self.generations[name]), num_cached)
            for name in names
        ]

    def add(self, rows: Int64 | list[int], length: int, digests: list[bytes]) -> int:
        """Begin the next sequence, one reserved. O(groups)."""
        name = self.free.pop()
        self.rows[:, name], self.lengths[name], self.digests[name] = rows, length, digests
        return name

    def fork(self, parent: int, rows: Int64 | list[int]) -> None:
        """Begin the next sequence, one reserved, as a copy of `parent`. O(groups + blocks)."""
        name = self.add(rows, int(self.lengths[parent]), self.digests[parent].copy())
        if parent in self.pending:
            self.pending[name] = self.pending[parent]

    def drop(self, name: int) -> None:
        """End a sequence and make its handles stale. O(groups)."""
        self.rows[:, name] = self.lengths[name] = 0
        self.digests[name] = []
        self.pending.pop(name, None)
        self.generations[name] += 1
        self.free.append(name)

    # ---------------------------------------------------------------- check

    def check(self, windows: tuple[int | None, ...]) -> None:
        """Raise `BrokenInvariant` unless each row belongs to one sequence. O(sequences * groups).

        `windows` has an entry for each group.
        """
        table, size = self._state.rows, self._state.block_size
        live = self.live()
        if len(live) != len(self):
            raise BrokenInvariant("groups: a sequence is free twice")
        if sorted(self.rows[:, live].ravel().tolist()) != table.live_rows():
            raise BrokenInvariant("groups: a row belongs to two sequences, or to none")
        for name in live.tolist():
            length, rows = int(self.lengths[name]), self.rows[:, name]
            rooms = table.lengths[rows]
            if np.any(rooms > length) or bool((rooms < length).any()) != (name in self.pending):
                raise BrokenInvariant(f"sequence {name}: room for {rooms}, {length} tokens")
            if np.any((rooms < length) & (rooms % size > 0)):
                raise BrokenInvariant(f"sequence {name}: its room {rooms} ends within a block")
            if len(self.digests[name]) * size > length:
                raise BrokenInvariant(f"sequence {name}: a digest stands for no tokens")
            for group, row in enumerate(rows.tolist()):
                if table.prompt(row).group != group:
                    raise BrokenInvariant(f"sequence {name}: a row is of another group")
                committed = int(table.committed[row])
                if table.first_blocks[row] > first_needed(committed, windows[group], size):
                    raise BrokenInvariant(f"sequence {name}: a block within its window is gone")
