"""Placement of requests on the device: allocation, preemption, return and release.

A request is preempted by **swap** or by **recompute**. Swap moves its blocks to the host and back.
Recompute frees its blocks, and later computes its known tokens again unless the prefix cache still
has them. All sequences of a request are preempted together, because shared blocks become free only
when every sequence releases them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.plans import CopyPlan, Int32, Reason
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.step import StepBuilder


class Placement:
    """Allocates, moves and frees the blocks of requests, and updates the request table.

    With `prefix_cache`, the manager gets token ids and can share prefixes. Without it, the manager
    gets lengths. `num_swapped` and `num_dropped` count preemptions by swap and by recompute.
    """

    def __init__(
        self, manager: CacheManager, table: RequestTable, costs: PreemptionCosts, prefix_cache: bool
    ) -> None:
        self.manager = manager
        self.table = table
        self.prefix_cache = prefix_cache
        self.num_swapped = self.num_dropped = 0
        self._sequences = table.sequences
        self._costs = costs

    def handles(self, state: RequestState) -> list[SequenceHandle]:
        """Return the handles of a request that has blocks. O(sequences)."""
        return [self._sequences.handle(seq_id) for seq_id in state.seq_ids]

    # ---------------------------------------------------------------- preemption

    def _preempt(self, state: RequestState, builder: StepBuilder) -> None:
        """Preempt a running request in the cheaper way. O(blocks)."""
        if self._is_swap_cheaper(state):
            with suppress(OutOfBlocks):  # the host pool is full
                builder.swaps.append(self.manager.swap(self.handles(state), "host"))
                builder.swapped.append(state)
                self.table.preempt(state, Status.SWAPPED)
                self.num_swapped += 1
                return
        self.drop(state)
        self.num_dropped += 1

    def _is_swap_cheaper(self, state: RequestState) -> bool:
        manager = self.manager
        if not manager.num_host_blocks:
            return False
        tables = manager.block_tables(self.handles(state))
        num_blocks = len(np.unique(tables[tables >= 0]))
        computed = self._sequences.computed[state.seq_ids]
        tokens = int(computed.sum())
        if not any(manager.windows):  # shared blocks hold shared tokens
            tokens = min(tokens, num_blocks * manager.block_size)
        swap_s = self._costs.swap_s(num_blocks)
        return swap_s < self._costs.recompute_s(tokens, int(computed.max()))

    def drop(self, state: RequestState) -> None:
        """Free all blocks of a request, on both tiers; its sequences stay live. O(blocks)."""
        self.manager.free(self.handles(state))
        for seq_id in state.seq_ids:
            self._sequences.unassign(seq_id)
        self.table.preempt(state, Status.DROPPED)

    def reclaim(self, among: Iterable[RequestState]) -> bool:
        """Drop the swapped request that ranks last among those with device blocks. O(blocks).

        A swapped request keeps shared blocks on the device while another request holds them.
        Returns False if there is none.
        """
        swapped = [state for state in among if state.status is Status.SWAPPED]
        for state in sorted(swapped, key=self.table.policy.rank, reverse=True):
            if (self.manager.block_tables(self.handles(state)) >= 0).any():
                self.drop(state)
                return True
        return False

    def make_room(self, builder: StepBuilder, error: OutOfBlocks) -> None:
        """Preempt the running request that ranks last. O(running + blocks).

        The first request is never preempted by another, so it always ends. If a quota is full, only
        requests of its namespace are preempted. No row of the preempted request is in the step.
        """
        running, preempted = self.table.running, self.table.preempted
        if isinstance(error, OutOfQuota):
            builder.note_refusal(error)
            running = [each for each in running if each.request.namespace == error.namespace]
            preempted = [each for each in preempted if each.request.namespace == error.namespace]
        else:
            builder.is_blocked = True
        last = max(running, key=self.table.policy.rank)
        if len(running) == 1:
            # With nothing to reclaim, blocks are pinned, or another user of the manager holds them:
            # drop this request, which begins again later, with cached blocks if it can.
            if not self.reclaim(preempted):
                self.drop(last)
        else:
            self._preempt(last, builder)

    # ---------------------------------------------------------------- end

    def end(self, state: RequestState, reason: Reason) -> None:
        """End a request and free its blocks. O(blocks + waiting)."""
        self._free(state.seq_ids)
        self.table.end(state, reason)

    def end_sequence(self, seq_id: int) -> None:
        """End a sequence, and the request with its last sequence. O(blocks)."""
        state = self._sequences.owner(seq_id)
        if len(state.seq_ids) == 1:
            self.end(state, Reason.FINISHED)
            return
        self._free([seq_id])
        self.table.end_sequence(seq_id)

    def _free(self, seq_ids: Iterable[int]) -> None:
        handles = [self._sequences.handles[seq_id] for seq_id in seq_ids]
        held = [handle for handle in handles if handle is not None]
        if held:
            self.manager.free(held)

    # ---------------------------------------------------------------- allocation

    def fork(self, parent: int, times: int) -> list[int]:
        """Add `times` sequences that share the blocks of `parent`. O(tokens)."""
        handles = self.manager.fork(self._sequences.handle(parent), times)
        return self.table.fork(parent, handles)

    def swap_in(self, state: RequestState, reserve: int) -> CopyPlan:
        """Swap a request in; leave `reserve` blocks. O(blocks). Raises `OutOfBlocks`."""
        plan = self.manager.swap(self.handles(state), "device", reserve=reserve)
        self.table.enter(state)
        return plan

    def begin(self, state: RequestState, reserve: int) -> Int32:
        """Allocate blocks for all known tokens of a waiting or dropped request.

        Leaves `reserve` blocks available. The sequences of the request share equal leading blocks:
        each sequence is forked from the earlier sequence with the longest common prefix, at the
        last block boundary. It then waits until that sequence has computed the common part.

        Returns the blocks to copy first. O(sequences^2 * tokens).
        Raises: `OutOfBlocks`; cached blocks may have been evicted, nothing else changed.
        """
        branches = [self._branch(state, at) for at in range(1, len(state.seq_ids))]
        try:
            made = self._make(state, reserve, branches, use_prefix_cache=self.prefix_cache)
        except OutOfBlocks:
            if not branches or not self.prefix_cache:
                raise
            # A cached prefix may need one block more than sharing between sequences does.
            made = self._make(state, reserve, branches, use_prefix_cache=False)
        sequences, seq_ids = self._sequences, state.seq_ids
        for seq_id, handle in zip(seq_ids, made, strict=True):
            sequences.assign(seq_id, handle)
        for seq_id, branch in zip(seq_ids[1:], branches, strict=True):
            if sequences.computed[seq_id] == branch.start > 0:
                sequences.wait_for(seq_id, seq_ids[branch.parent])
        self.table.enter(state)
        return np.concatenate([handle.copies for handle in made])

    def _make(
        self, state: RequestState, reserve: int, branches: list[_Branch], *, use_prefix_cache: bool
    ) -> list[SequenceHandle]:
        more = sum(branch.num_blocks for branch in branches)
        made = [self._allocate(state.seq_ids[0], reserve + more)]
        try:
            for seq_id, branch in zip(state.seq_ids[1:], branches, strict=True):
                if not branch.start or (use_prefix_cache and self._is_cached(seq_id, branch.start)):
                    made.append(self._allocate(seq_id, 0))
                else:
                    made.append(self._fork_at(seq_id, made[branch.parent], branch.start))
        except OutOfBlocks:
            self.manager.free(made)
            raise
        return made

    def _branch(self, state: RequestState, at: int) -> _Branch:
        sequences, manager, size = self._sequences, self.manager, self.manager.block_size
        seq_id = state.seq_ids[at]
        if any(manager.windows):
            # Blocks behind a window are freed, so another sequence cannot continue from them.
            return _Branch(0, 0, manager.queries.blocks_for(sequences.num_known(seq_id)))
        common = [sequences.num_common(seq_id, other) for other in state.seq_ids[:at]]
        parent = int(np.argmax(common))
        start = common[parent] // size * size
        blocks_for = manager.queries.blocks_for
        own = blocks_for(sequences.num_known(seq_id)) - blocks_for(start)
        return _Branch(parent, start, own)

    def _is_cached(self, seq_id: int, start: int) -> bool:
        """Return True if more than the first `start` tokens of this sequence are cached."""
        namespace, lora = self._sequences.owner(seq_id).identity
        ids = self._sequences.tokens(seq_id, 0, self._sequences.num_known(seq_id) - 1)
        return self.manager.match_prefix(ids, namespace=namespace, lora=lora) > start

    def _allocate(self, seq_id: int, reserve: int) -> SequenceHandle:
        namespace, lora = self._sequences.owner(seq_id).identity
        length = self._sequences.num_known(seq_id)
        prompt = self._sequences.tokens(seq_id, 0, length) if self.prefix_cache else length
        return self.manager.allocate(prompt, namespace=namespace, lora=lora, reserve=reserve)

    def _fork_at(self, seq_id: int, parent: SequenceHandle, start: int) -> SequenceHandle:
        """Return a sequence that shares the first `start` tokens of `parent`. O(tokens)."""
        stop = self._sequences.num_known(seq_id)
        child = self.manager.fork(parent)
        try:
            self.manager.truncate(child, start)
            if start < stop:
                ids = self._sequences.tokens(seq_id, start, stop)
                self.manager.append(child, ids if self.prefix_cache else stop - start)
        except OutOfBlocks:
            self.manager.free(child)
            raise
        child.num_cached_tokens = start  # computed by the parent
        return child


class _Branch(NamedTuple):
    """Where a sequence diverges from an earlier sequence of its request."""

    parent: int  # index of the earlier sequence in the request
    start: int  # tokens in common, a multiple of the block size
    num_blocks: int  # blocks that the sequence does not share
