"""The rows that decode: one token each in every step, and who makes room for them."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.errors import OutOfBlocks
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import RequestState
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import Decoders, Draft


class Decoding:
    """Adds the rows to a step that have all their other tokens computed."""

    def __init__(
        self, manager: CacheManager, table: RequestTable, placement: Placement, *, by_ids: bool
    ) -> None:
        self._manager = manager
        self._table = table
        self._placement = placement
        self._by_ids = by_ids
        self._decoders: Decoders | None = None
        self._version = -1  # of the table, when `_decoders` was made

    def extend(self, draft: Draft) -> None:
        """Add all rows that decode; preempt the last requests until these have room. O(rows)."""
        sequences, policy = self._table.sequences, self._table.policy
        while True:
            decoders = self._current()
            seq_ids = decoders.seq_ids
            if not len(seq_ids):
                return
            token_ids = sequences.pending[seq_ids]
            try:
                step = self._manager.append(decoders.batch, token_ids if self._by_ids else 1)
            except OutOfBlocks as error:
                self._placement.make_room(draft, error)
                continue
            sequences.make_room(seq_ids)
            draft.decode(seq_ids, token_ids, step)
            draft.decoders = decoders
            for state, count in decoders.shares:
                policy.charge(state, 0, count)
            return

    def add(self, state: RequestState, draft: Draft) -> None:
        """Add the rows of a request that returned ready to decode. O(rows)."""
        sequences = self._table.sequences
        seq_ids = np.array(state.seq_ids, np.int32)
        token_ids = sequences.pending[seq_ids]
        try:
            step = self._manager.append(
                self._placement.handles(state), token_ids if self._by_ids else 1
            )
        except OutOfBlocks:
            return  # a quota: the next step will see
        sequences.make_room(seq_ids)
        draft.decode(seq_ids, token_ids, step)

    def _current(self) -> Decoders:
        """Return the rows that decode, kept as long as they are the same."""
        if self._decoders is None or self._version != self._table.version:
            self._decoders, self._version = self._find(), self._table.version
        return self._decoders

    def _find(self) -> Decoders:
        sequences = self._table.sequences
        ready = [state for state in self._table.running if state.is_ready]
        rows = [seq_id for state in ready for seq_id in state.seq_ids]
        seq_ids = np.array(rows, np.int32)
        seq_ids.flags.writeable = False
        batch = self._manager.batch([sequences.handle(seq_id) for seq_id in rows])
        request_ids = [state.request_id for state in ready for _ in state.seq_ids]
        shares: dict[str | None, tuple[RequestState, int]] = {}
        for state in ready:
            queue = self._table.policy.queue_of(state)
            shares[queue] = state, shares.get(queue, (state, 0))[1] + len(state.seq_ids)
        return Decoders(seq_ids, batch, request_ids, list(shares.values()))
