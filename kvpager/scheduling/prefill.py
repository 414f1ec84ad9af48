"""Prompts in chunks, and the tokens of preempted requests that are computed again."""

from __future__ import annotations

from kvpager.blocks.protocol import CacheManager
from kvpager.errors import OutOfBlocks
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import Draft


class Prefill:
    """Adds chunks of the rows to a step that cannot decode yet."""

    def __init__(self, manager: CacheManager, table: RequestTable, placement: Placement) -> None:
        self._manager = manager
        self._table = table
        self._placement = placement

    def extend(self, draft: Draft) -> None:
        """Add a chunk of each request that was begun, as far as budget and blocks go. O(tokens)."""
        begun = [state for state in self._table.running if not state.is_ready]
        for state in sorted(begun, key=self._table.policy.rank):
            if not self._add_for_sure(state, draft):
                draft.is_blocked = True
                return

    def _add_for_sure(self, state: RequestState, draft: Draft) -> bool:
        """As `add`; where nothing is in the step yet, preempt the last requests for room."""
        while state.status is Status.RUNNING:
            try:
                return self._add(state, draft)
            except OutOfBlocks as error:  # of a group of layers with a window
                if draft.parts:
                    return False  # what is in the step ends, and gives blocks back
                self._placement.make_room(draft, error)
        return True

    def add(self, state: RequestState, draft: Draft) -> bool:
        """Add a chunk of each row of a request; False if the budget ends before. O(tokens)."""
        try:
            return self._add(state, draft)
        except OutOfBlocks:
            return False

    def _add(self, state: RequestState, draft: Draft) -> bool:
        sequences = self._table.sequences
        for seq_id in state.seq_ids:
            if sequences.is_waiting(seq_id):
                continue
            start, length = int(sequences.computed[seq_id]), int(sequences.lengths[seq_id])
            if start == length:
                continue
            count = draft.chunk(length - start)
            if not count:
                return False
            stop = start + count
            slot_mapping = self._manager.open_slots(sequences.handle(seq_id), start, stop)
            # A row that has chosen tokens is computed again: it has its next token already.
            is_first = not sequences.generated[seq_id]
            draft.compute(
                seq_id,
                sequences.tokens(seq_id, start, stop),
                slot_mapping,
                needs_logits=is_first and stop == length,
            )
            if is_first:
                self._table.policy.charge(state, count, 0)
        return True
