"""Decoding: each decoding sequence gets one token in every step."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.errors import OutOfBlocks
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import RequestState
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import DecodeBatch, StepBuilder


class Decoding:
    """Adds sequences to a step whose tokens are all computed except the newest."""

    def __init__(
        self,
        manager: CacheManager,
        table: RequestTable,
        placement: Placement,
        *,
        prefix_cache: bool,
    ) -> None:
        self._manager = manager
        self._table = table
        self._placement = placement
        self._prefix_cache = prefix_cache
        self._decode_batch: DecodeBatch | None = None
        self._version = -1  # `RequestTable.version` when `_decode_batch` was made

    def extend(self, builder: StepBuilder) -> None:
        """Add every decoding sequence. O(sequences).

        Preempts the requests that rank last until the remaining ones have room.
        """
        sequences, policy = self._table.sequences, self._table.policy
        while True:
            decode_batch = self._current()
            seq_ids = decode_batch.seq_ids
            if not len(seq_ids):
                return
            token_ids = sequences.pending[seq_ids]
            try:
                step = self._manager.append(
                    decode_batch.batch, token_ids if self._prefix_cache else 1
                )
            except OutOfBlocks as error:
                self._placement.make_room(builder, error)
                continue
            sequences.make_room(seq_ids)
            builder.decode(seq_ids, token_ids, step)
            builder.decode_batch = decode_batch
            for state, count in decode_batch.charges:
                policy.charge(state, 0, count)
            return

    def add(self, state: RequestState, builder: StepBuilder) -> None:
        """Add the sequences of a request that resumed ready to decode. O(sequences)."""
        sequences = self._table.sequences
        seq_ids = np.array(state.seq_ids, np.int32)
        token_ids = sequences.pending[seq_ids]
        try:
            step = self._manager.append(
                self._placement.handles(state), token_ids if self._prefix_cache else 1
            )
        except OutOfBlocks:
            return  # a quota is full; the next step tries again
        sequences.make_room(seq_ids)
        builder.decode(seq_ids, token_ids, step)

    def _current(self) -> DecodeBatch:
        """Return the decoding sequences, from a cache while the table is unchanged."""
        if self._decode_batch is None or self._version != self._table.version:
            self._decode_batch, self._version = self._find(), self._table.version
        return self._decode_batch

    def _find(self) -> DecodeBatch:
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
        return DecodeBatch(seq_ids, batch, request_ids, list(shares.values()))
