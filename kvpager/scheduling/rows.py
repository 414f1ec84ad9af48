"""The rows of a step: a token of each decoding sequence, and chunks of the others."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.sequences import Target
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.step import DecodeBatch, StepBuilder


class Rows:
    """Adds rows of running requests to a step.

    A sequence decodes if all of its tokens are computed except the newest. Otherwise it is in
    prefill: its prompt, or the tokens that it recomputes after a preemption, come in chunks.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._manager, self._table = placement.manager, placement.table
        self._sequences = placement.table.sequences
        self._decode_batch: DecodeBatch | None = None
        self._version = -1  # `RequestTable.version` when `_decode_batch` was made

    def add(self, state: RequestState, builder: StepBuilder) -> None:
        """Add the rows of a request that starts or resumes, as far as blocks suffice. O(tokens).

        If blocks are missing, or its quota is reached, the next step tries again.
        """
        try:
            if state.is_ready:
                seq_ids = np.array(state.seq_ids, np.int32)
                self._decode(seq_ids, self._placement.handles(state), builder)
            else:
                self._add_chunks(state, builder)
        except OutOfBlocks:
            pass

    # ---------------------------------------------------------------- decoding

    def decode(self, builder: StepBuilder) -> None:
        """Add every decoding sequence. O(sequences).

        Preempts the requests that rank last until the remaining ones have room.
        """
        while len((decode_batch := self._current()).seq_ids):
            try:
                self._decode(decode_batch.seq_ids, decode_batch.batch, builder)
            except OutOfBlocks as error:
                self._placement.make_room(builder, error)
                continue
            builder.decode_batch = decode_batch
            for state, count in decode_batch.charges:
                self._table.policy.charge(state, 0, count)
            return

    def _decode(self, seq_ids: Int32, handles: Target, builder: StepBuilder) -> None:
        token_ids = self._sequences.pending[seq_ids]
        step = self._manager.append(handles, token_ids if self._placement.prefix_cache else 1)
        self._sequences.make_room(seq_ids)
        builder.decode(seq_ids, token_ids, step)

    def _current(self) -> DecodeBatch:
        """Return the decoding sequences, from a cache while the table is unchanged."""
        if self._decode_batch is None or self._version != self._table.version:
            self._decode_batch, self._version = self._find(), self._table.version
        return self._decode_batch

    def _find(self) -> DecodeBatch:
        ready = [state for state in self._table.running if state.is_ready]
        rows = [seq_id for state in ready for seq_id in state.seq_ids]
        seq_ids = np.array(rows, np.int32)
        seq_ids.flags.writeable = False
        batch = self._manager.batch([self._sequences.handle(seq_id) for seq_id in rows])
        request_ids = [state.request_id for state in ready for _ in state.seq_ids]
        shares: dict[str | None, tuple[RequestState, int]] = {}
        for state in ready:
            queue = self._table.policy.queue_of(state)
            shares[queue] = state, shares.get(queue, (state, 0))[1] + len(state.seq_ids)
        return DecodeBatch(seq_ids, batch, request_ids, list(shares.values()))

    # ---------------------------------------------------------------- prefill

    def prefill(self, builder: StepBuilder) -> None:
        """Add a chunk of each running request that is in prefill. O(tokens).

        Stops at the first request that exceeds the token budget or finds no blocks.
        """
        begun = [state for state in self._table.running if not state.is_ready]
        for state in sorted(begun, key=self._table.policy.rank):
            if not self._add_or_make_room(state, builder):
                builder.is_blocked = True
                return

    def _add_or_make_room(self, state: RequestState, builder: StepBuilder) -> bool:
        """Add chunks; if the step is empty, preempt requests to make room.

        Returns False if the token budget or the blocks do not suffice. Returns True without
        chunks if this request itself was preempted.
        """
        while state.status is Status.RUNNING:
            try:
                return self._add_chunks(state, builder)
            except OutOfBlocks as error:  # only groups of layers with a window need blocks here
                if builder.parts:
                    return False  # requests in the step will release blocks
                self._placement.make_room(builder, error)
        return True

    def _add_chunks(self, state: RequestState, builder: StepBuilder) -> bool:
        """Add a chunk of each sequence; return False if the token budget does not suffice."""
        sequences = self._sequences
        for seq_id in state.seq_ids:
            start, length = int(sequences.computed[seq_id]), int(sequences.lengths[seq_id])
            if sequences.is_waiting(seq_id) or start == length:
                continue
            count = builder.chunk(length - start)
            if not count:
                return False
            stop = start + count
            slot_mapping = self._manager.open_slots(sequences.handle(seq_id), start, stop)
            token_ids = sequences.tokens(seq_id, start, stop)
            # A recomputed sequence already has its next token.
            is_first = not sequences.generated[seq_id]
            builder.compute(seq_id, token_ids, slot_mapping, is_first and stop == length)
            if is_first:
                self._table.policy.charge(state, count, 0)
        return True
