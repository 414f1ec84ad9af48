"""Prefill: prompts in chunks, and the tokens that preempted requests recompute."""

from __future__ import annotations

from kvpager.blocks.protocol import CacheManager
from kvpager.errors import OutOfBlocks
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import StepBuilder


class Prefill:
    """Adds chunks of sequences that cannot decode yet to a step."""

    def __init__(self, manager: CacheManager, table: RequestTable, placement: Placement) -> None:
        self._manager = manager
        self._table = table
        self._placement = placement

    def extend(self, builder: StepBuilder) -> None:
        """Add a chunk of each running request that is in prefill. O(tokens).

        Stops at the first request that exceeds the token budget or finds no blocks.
        """
        begun = [state for state in self._table.running if not state.is_ready]
        for state in sorted(begun, key=self._table.policy.rank):
            if not self._add_or_make_room(state, builder):
                builder.is_blocked = True
                return

    def _add_or_make_room(self, state: RequestState, builder: StepBuilder) -> bool:
        """Add chunks as `add`; if the step is empty, preempt requests to make room."""
        while state.status is Status.RUNNING:
            try:
                return self._add(state, builder)
            except OutOfBlocks as error:  # only groups of layers with a window need blocks here
                if builder.parts:
                    return False  # requests in the step will release blocks
                self._placement.make_room(builder, error)
        return True

    def add(self, state: RequestState, builder: StepBuilder) -> bool:
        """Add a chunk of each sequence of a request. O(tokens).

        Returns False if the token budget or the blocks do not suffice for all of its sequences.
        """
        try:
            return self._add(state, builder)
        except OutOfBlocks:
            return False

    def _add(self, state: RequestState, builder: StepBuilder) -> bool:
        sequences = self._table.sequences
        for seq_id in state.seq_ids:
            if sequences.is_waiting(seq_id):
                continue
            start, length = int(sequences.computed[seq_id]), int(sequences.lengths[seq_id])
            if start == length:
                continue
            count = builder.chunk(length - start)
            if not count:
                return False
            stop = start + count
            slot_mapping = self._manager.open_slots(sequences.handle(seq_id), start, stop)
            # A recomputed sequence already has its next token.
            is_first = not sequences.generated[seq_id]
            builder.compute(
                seq_id,
                sequences.tokens(seq_id, start, stop),
                slot_mapping,
                needs_logits=is_first and stop == length,
            )
            if is_first:
                self._table.policy.charge(state, count, 0)
        return True
