"""Commit tokens over groups: publish full blocks, release those behind windows."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.groups.table import GroupTable
from kvpager.blocks.publication import Publication
from kvpager.blocks.state import BlockState
from kvpager.blocks.truncation import Truncation
from kvpager.plans import Int64


class GroupCommit:
    """Commits tokens in all groups, and releases the blocks behind windows.

    The caller holds the lock. Writes what `Publication`, `WindowIndex` and `Truncation` write, and
    `committed`.
    """

    def __init__(
        self,
        state: BlockState,
        table: GroupTable,
        index: WindowIndex,
        truncation: Truncation,
        windows: tuple[int | None, ...],
    ) -> None:
        self._state = state
        self._table = table
        self._index = index
        self._truncation = truncation
        self._spans: Int64 = np.array([w for w in windows if w is not None], np.int64)[:, None]
        self._publication = Publication(state)
        is_windowed = np.array([window is not None for window in windows])
        self._full, self._windowed = (~is_windowed).nonzero()[0], is_windowed.nonzero()[0]

    def settled(self, names: Int64) -> Int64:
        """Return how many tokens have slots in all groups, without speculative ones. O(n)."""
        rows, members = self._state.rows, self._table.rows[:, names]
        settled: Int64 = (rows.lengths[members] - rows.speculative[members]).min(axis=0)
        return settled

    def commit(self, names: Int64, settled: Int64) -> None:
        """Record that the KV of each sequence's first `settled` tokens is written.

        O(n * groups + new full blocks).
        """
        state, rows = self._state, self._state.rows
        members = self._table.rows[:, names]
        state.change.begin()
        full, windowed = members[self._full], members[self._windowed]
        if full.size:
            self._publication.commit(full.ravel(), np.tile(settled, len(full)))
        if not windowed.size:
            return
        committed = np.maximum(rows.committed[windowed], settled)
        rows.committed[windowed] = committed
        ends = np.minimum(committed, rows.known[windowed]) >> state.shift
        news = ends > rows.published[windowed]
        if np.count_nonzero(news):
            for group, at in np.argwhere(news).tolist():
                digests = self._table.digests[int(names[at])]
                self._index.publish(int(windowed[group, at]), digests, int(ends[group, at]))
            state.index.settle()
        starts = np.maximum(committed - self._spans + 1, 0)  # see `first_visible`
        self._truncation.release_before(windowed.ravel(), starts.ravel())
