"""How a request comes onto the device, leaves it before its end, and returns.

It leaves by **swap**: its blocks move to the host and back, as they are. Or by **recompute**: they
are freed, and its known tokens are computed again, except for what the prefix index still has by
then. The unit is a request with all its rows, because rows that share blocks only free them
together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.plans import Int32, Plan, Reason
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import Draft


class Placement:
    """Takes blocks for requests, moves and frees them, and tells the table where they are.

    `num_swapped` and `num_dropped` count preemptions of requests, not of rows. `by_ids` says that
    the manager is told token ids, so that prefixes can be reused.
    """

    def __init__(
        self,
        manager: CacheManager,
        table: RequestTable,
        costs: PreemptionCosts,
        *,
        by_ids: bool,
    ) -> None:
        self._manager = manager
        self._table = table
        self._sequences = table.sequences
        self._costs = costs
        self._by_ids = by_ids
        self.num_swapped = self.num_dropped = 0

    def handles(self, state: RequestState) -> list[SequenceHandle]:
        """Return the sequences of a request that has blocks. O(rows)."""
        return [self._sequences.handle(seq_id) for seq_id in state.seq_ids]

    # ---------------------------------------------------------------- away

    def preempt(self, state: RequestState) -> Plan | None:
        """Take a running request off the device, the cheaper way. O(blocks).

        Returns the blocks to move, or None if they were freed. What was computed is committed.
        """
        if self._is_swap_cheaper(state):
            try:
                plan = self._manager.swap(self.handles(state), "host")
            except OutOfBlocks:
                pass  # the host is full
            else:
                self._table.preempt(state, Status.SWAPPED)
                self.num_swapped += 1
                return plan
        self.drop(state)
        self.num_dropped += 1
        return None

    def _is_swap_cheaper(self, state: RequestState) -> bool:
        manager = self._manager
        if not manager.num_host_blocks:
            return False
        tables = manager.block_tables(self.handles(state))
        num_blocks = len(np.unique(tables[tables >= 0]))
        computed = self._sequences.computed[state.seq_ids]
        tokens = int(computed.sum())
        if not any(manager.windows):  # rows share tokens as they share blocks
            tokens = min(tokens, num_blocks * manager.block_size)
        swap_s = self._costs.swap_s(num_blocks)
        return swap_s < self._costs.recompute_s(tokens, int(computed.max()))

    def drop(self, state: RequestState) -> None:
        """Free all blocks of a request, on the device and on the host; its rows live. O(blocks)."""
        self._manager.free(self.handles(state))
        for seq_id in state.seq_ids:
            self._sequences.unassign(seq_id)
        self._table.preempt(state, Status.DROPPED)

    def reclaim(self, among: Iterable[RequestState]) -> bool:
        """Drop the last swapped request that still has device blocks, if there is one. O(blocks).

        Shared blocks of a swapped request stay on the device while another request holds them.
        """
        swapped = [state for state in among if state.status is Status.SWAPPED]
        for state in sorted(swapped, key=self._table.policy.rank, reverse=True):
            if (self._manager.block_tables(self.handles(state)) >= 0).any():
                self.drop(state)
                return True
        return False

    def make_room(self, draft: Draft, error: OutOfBlocks) -> None:
        """Preempt the request that ranks last, none of which is in the step; never the first.

        So the first request always ends. If a quota has no room, only requests of its namespace
        count. O(running + blocks)
        """
        running, preempted = self._table.running, self._table.preempted
        if isinstance(error, OutOfQuota):
            draft.note_refusal(error)
            running = [each for each in running if each.request.namespace == error.namespace]
            preempted = [each for each in preempted if each.request.namespace == error.namespace]
        else:
            draft.is_blocked = True
        last = max(running, key=self._table.policy.rank)
        if len(running) == 1:
            # If nothing is to be had, another user of this manager took blocks: wait for them.
            if not self.reclaim(preempted):
                self.drop(last)
        elif (plan := self.preempt(last)) is not None:
            draft.swaps.append(plan)
            draft.moved.append(last)

    # ---------------------------------------------------------------- the end

    def end(self, state: RequestState, reason: Reason) -> None:
        """End a request: free all that it holds. O(blocks + waiting)."""
        self._free(state.seq_ids)
        self._table.end(state, reason)

    def end_sequence(self, seq_id: int) -> None:
        """End a row, and with the last row the request. O(blocks)."""
        state = self._sequences.owner(seq_id)
        if len(state.seq_ids) == 1:
            self.end(state, Reason.FINISHED)
            return
        self._free([seq_id])
        self._table.end_sequence(seq_id)

    def _free(self, seq_ids: Iterable[int]) -> None:
        handles = [self._sequences.handles[seq_id] for seq_id in seq_ids]
        held = [handle for handle in handles if handle is not None]
        if held:
            self._manager.free(held)

    # ---------------------------------------------------------------- onto the device

    def fork(self, parent: int, times: int) -> list[int]:
        """Add rows that share the blocks of the row `parent`. O(tokens)."""
        handles = self._manager.fork(self._sequences.handle(parent), times)
        return self._table.fork(parent, handles)

    def swap_in(self, state: RequestState, reserve: int) -> Plan:
        """Bring a swapped request back; leave `reserve` blocks. O(blocks). Raises `OutOfBlocks`."""
        plan = self._manager.swap(self.handles(state), "device", reserve=reserve)
        self._table.enter(state)
        return plan

    def begin(self, state: RequestState, reserve: int) -> Int32:
        """Give a waiting or dropped request room for all its known tokens; leave `reserve` blocks.

        Its rows share the blocks that all their tokens are equal in. Each row is forked off the
        earlier one that it has most in common with, at the last block boundary, and waits until
        that one has computed the common part. Returns the blocks to copy first.
        O(rows^2 * tokens). Raises `OutOfBlocks`; only cached blocks may have been evicted then.
        """
        branches = [self._branch(state, at) for at in range(1, len(state.seq_ids))]
        try:
            made = self._make(state, reserve, branches, by_index=self._by_ids)
        except OutOfBlocks:
            if not branches or not self._by_ids:
                raise
            # What the index has of one row may take a block more than sharing with another does.
            made = self._make(state, reserve, branches, by_index=False)
        sequences, seq_ids = self._sequences, state.seq_ids
        for seq_id, handle in zip(seq_ids, made, strict=True):
            sequences.assign(seq_id, handle)
        for seq_id, branch in zip(seq_ids[1:], branches, strict=True):
            if sequences.computed[seq_id] == branch.start > 0:
                sequences.wait_for(seq_id, seq_ids[branch.parent])
        self._table.enter(state)
        return np.concatenate([handle.copies for handle in made])

    def _make(
        self, state: RequestState, reserve: int, branches: list[_Branch], *, by_index: bool
    ) -> list[SequenceHandle]:
        more = sum(branch.num_blocks for branch in branches)
        made = [self._allocate(state.seq_ids[0], reserve + more)]
        try:
            for seq_id, branch in zip(state.seq_ids[1:], branches, strict=True):
                if not branch.start or (by_index and self._is_cached(seq_id, branch.start)):
                    made.append(self._allocate(seq_id, 0))
                else:
                    made.append(self._fork_at(seq_id, made[branch.parent], branch.start))
        except OutOfBlocks:
            self._manager.free(made)
            raise
        return made

    def _branch(self, state: RequestState, at: int) -> _Branch:
        sequences, manager, size = self._sequences, self._manager, self._manager.block_size
        seq_id = state.seq_ids[at]
        if any(manager.windows):
            # What a row has behind its window is gone when another could go on from there.
            return _Branch(0, 0, manager.queries.blocks_for(sequences.num_known(seq_id)))
        common = [sequences.num_common(seq_id, other) for other in state.seq_ids[:at]]
        parent = int(np.argmax(common))
        start = common[parent] // size * size
        own = manager.queries.blocks_for(sequences.num_known(seq_id)) - manager.queries.blocks_for(
            start
        )
        return _Branch(parent, start, own)

    def _is_cached(self, seq_id: int, start: int) -> bool:
        """True if the index has more of this row than what lies before `start`."""
        namespace, lora = self._sequences.owner(seq_id).identity
        ids = self._sequences.tokens(seq_id, 0, self._sequences.num_known(seq_id) - 1)
        cached = self._manager.match_prefix(ids, namespace=namespace, lora=lora)
        return cached > start

    def _allocate(self, seq_id: int, reserve: int) -> SequenceHandle:
        namespace, lora = self._sequences.owner(seq_id).identity
        length = self._sequences.num_known(seq_id)
        prompt = self._sequences.tokens(seq_id, 0, length) if self._by_ids else length
        return self._manager.allocate(prompt, namespace=namespace, lora=lora, reserve=reserve)

    def _fork_at(self, seq_id: int, parent: SequenceHandle, start: int) -> SequenceHandle:
        """Return blocks that are those of `parent` up to token `start`, and others from there."""
        stop = self._sequences.num_known(seq_id)
        child = self._manager.fork(parent)
        try:
            self._manager.truncate(child, start)
            if start < stop:
                ids = self._sequences.tokens(seq_id, start, stop)
                self._manager.append(child, ids if self._by_ids else stop - start)
        except OutOfBlocks:
            self._manager.free(child)
            raise
        child.num_cached_tokens = start  # the parent computes them
        return child


class _Branch(NamedTuple):
    """Where a row parts from an earlier one of its request, at a block boundary."""

    parent: int  # which row
    start: int  # the first token of its own
    num_blocks: int  # of its own
