"""Commit tokens over groups: publish full blocks, release those behind windows."""

from __future__ import annotations

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.groups.continuations import Continuations
from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.publication import Publication
from kvpager.blocks.state import BlockState
from kvpager.blocks.truncation import Truncation
from kvpager.plans import Int64


class GroupCommit(Publication):
    """Commits tokens in all groups, and releases the blocks behind windows.

    The caller holds the lock. Writes what `Publication`, `WindowIndex`, `Continuations` and
    `Truncation` write, and `committed`.
    """

    def __init__(self, state: BlockState, index: WindowIndex, continuations: Continuations) -> None:
        super().__init__(state)
        self._index, self._continuations = index, continuations
        self._truncation = Truncation(state)
        windows = [window for window in state.windows if window is not None]
        self._spans: Int64 = np.array(windows, np.int64)[:, None]
        is_windowed = np.array([window is not None for window in state.windows])
        self._full, self._windowed = (~is_windowed).nonzero()[0], is_windowed.nonzero()[0]

    def commit_row(self, row: int, length: int | None) -> None:
        """Do as `commit` for one sequence."""
        self.commit(np.array([row]), length)

    def commit(self, sequences: Int64, length: int | Int64 | None) -> None:
        """Record that the KV of each sequence's first `length` tokens is written.

        None: of all tokens with slots. O(n * groups + new full blocks).
        Raises: `ValueError` if a group has slots for fewer tokens, not counting speculative ones.
        """
        state, rows = self._state, self._state.rows
        members = rows.members(sequences).reshape(rows.num_groups, -1)
        settled: Int64 = (rows.lengths[members] - rows.speculative[members]).min(axis=0)
        if length is not None:
            arguments.within("length", length, settled)
            settled = np.full_like(settled, length)
        state.change.begin()
        full, windowed = members[self._full], members[self._windowed]
        if full.size:
            super().commit(full.ravel(), np.tile(settled, len(full)))
        if not windowed.size:
            return
        committed = np.maximum(rows.committed[windowed], settled)
        rows.committed[windowed] = committed
        ends = np.minimum(committed, rows.known[windowed]) >> state.shift
        news = ends > rows.published[windowed]
        if np.count_nonzero(news):
            self._publish_windowed(windowed[news].tolist(), ends[news].tolist())
        starts = np.maximum(committed - self._spans + 1, 0)  # see `first_visible`
        self._truncation.release_before(windowed.ravel(), starts.ravel())

    def _publish_windowed(self, rows: list[int], ends: list[int]) -> None:
        state, begins = self._state, self._state.rows.published[rows].tolist()
        published = [self._index.publish(row, end) for row, end in zip(rows, ends, strict=True)]
        state.index.settle()
        for row, begin, end, blocks in zip(rows, begins, ends, published, strict=True):
            own = state.rows.tables.part(row, begin, end)
            self._continuations.publish(row, begin, own, blocks)
