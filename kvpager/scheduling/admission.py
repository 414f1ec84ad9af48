"""The requests that come onto the device: preempted ones first, then those that wait."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.errors import OutOfBlocks, QueueFull
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import Request, RequestState, Status, blocks_needed
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.sequence_state import num_common
from kvpager.scheduling.step import Draft

_LOOK_PAST = 32  # waiting requests that a plan looks past, at the most


class AdmissionPolicy:
    """Decides which requests are taken, and which begin or return in a step.

    Args:
        manager: has the blocks.
        table: where the requests are.
        placement: gives a request its blocks.
        max_queue_size: see `Scheduler`, as the others.
        max_model_len: tokens of a row.
        watermark: share of the blocks that stays available.
        prefix_cache: prompts may share what is computed.
    """

    def __init__(
        self,
        manager: CacheManager,
        table: RequestTable,
        placement: Placement,
        *,
        max_queue_size: int | None,
        max_model_len: int | None,
        watermark: float,
        prefix_cache: bool,
    ) -> None:
        self._manager = manager
        self._table = table
        self._placement = placement
        self.max_queue_size = max_queue_size
        self.max_model_len = max_model_len
        self.watermark = watermark
        self._prefix_cache = prefix_cache
        stats = manager.stats()
        usable = stats.num_held + stats.num_cached + stats.num_kept + stats.num_free
        self._num_reserved = stats.num_blocks - usable  # the null block, if there is one
        self.num_reused_tokens = 0  # of prompts, found in the prefix index

    @property
    def _num_usable(self) -> int:
        return self._manager.num_blocks - self._num_reserved

    # ---------------------------------------------------------------- what is taken at all

    def refuse_impossible(self, request: Request, num_prompt: int) -> None:
        """Raise `ValueError` if the request could not be served even alone. O(1)."""
        request_id, length = request.request_id, num_prompt + request.max_new_tokens
        max_num_seqs = self._table.max_num_seqs
        if request.n > max_num_seqs:
            raise ValueError(
                f"request {request_id!r}: {request.n} samples, but at most "
                f"{max_num_seqs} rows run; ask for fewer, or raise max_num_seqs"
            )
        what = f"a prompt of {num_prompt} and {request.max_new_tokens} new tokens"
        if self.max_model_len is not None and length > self.max_model_len:
            raise ValueError(
                f"request {request_id!r}: {what} are more than max_model_len {self.max_model_len}; "
                "shorten the prompt or lower max_new_tokens"
            )
        need = blocks_needed(request, num_prompt, self._manager)
        if need > self._num_usable:
            raise ValueError(
                f"request {request_id!r}: {what} in {request.n} samples may need {need} "
                f"blocks, the pool has {self._num_usable}; ask for less, or make the pool larger"
            )
        ceiling = self._manager.quotas.ceiling(request.namespace)
        if ceiling is not None and need > ceiling:
            raise ValueError(
                f"request {request_id!r}: {what} in {request.n} samples may need {need} "
                f"blocks, its namespace may have {ceiling}; ask for less or raise the quota"
            )

    def refuse_overflow(self) -> None:
        """Raise `QueueFull` if no more requests may wait. O(1)."""
        num_waiting = self._table.policy.num_waiting
        if self.max_queue_size is not None and num_waiting >= self.max_queue_size:
            raise QueueFull(num_waiting, self.max_queue_size)

    # ---------------------------------------------------------------- onto the device

    def admit(self, draft: Draft) -> Iterator[RequestState]:
        """Yield each request that comes onto the device in this step.

        The caller adds its rows to `draft` before it asks for the next one.
        """
        if not draft.is_blocked:
            yield from self._return(draft)
        if not draft.is_blocked:
            yield from self._begin_waiting(draft)

    def _return(self, draft: Draft) -> Iterator[RequestState]:
        """Bring back preempted requests, before any new one begins.

        Requests whose quota is full wait for their own namespace; other requests pass them.
        """
        table = self._table
        while candidates := [each for each in table.preempted if not self._must_wait(each, draft)]:
            state = min(candidates, key=table.policy.rank)
            if table.has_room_for(state) and self._bring_back(state, draft):
                yield state
            elif self._reclaim_for(state, draft):
                draft.over_quota.discard(state.request.namespace)
            elif not self._must_wait(state, draft):
                draft.is_blocked = True
                return

    def _must_wait(self, state: RequestState, draft: Draft) -> bool:
        """True if the quota of a request's namespace was found to have no room in this step."""
        return state.request.namespace in draft.over_quota

    def _reclaim_for(self, state: RequestState, draft: Draft) -> bool:
        """Take blocks of swapped requests, unless one that runs will give some back. O(blocks)."""
        rivals = [*self._table.running, *self._table.preempted]
        if self._must_wait(state, draft):
            namespace = state.request.namespace
            rivals = [each for each in rivals if each.request.namespace == namespace]
        if any(each.status is Status.RUNNING for each in rivals):
            return False
        return self._placement.reclaim(each for each in rivals if each is not state)

    def _bring_back(self, state: RequestState, draft: Draft) -> bool:
        if state.status is Status.DROPPED:
            return self._begin(state, draft)
        # Moves are made before copies, so none may write where a copy made earlier reads.
        if draft.is_prompt_copied or not self._has_budget(state, draft):
            return False
        try:
            draft.swaps.append(self._placement.swap_in(state, self._spare(state)))
        except OutOfBlocks as error:
            draft.note_refusal(error)
            return False
        draft.moved.append(state)
        return True

    def _has_budget(self, state: RequestState, draft: Draft) -> bool:
        if state.is_ready:
            return len(state.seq_ids) <= draft.budget
        mine, sequences = state.seq_ids, self._table.sequences
        return draft.chunk(int((sequences.lengths[mine] - sequences.computed[mine]).max())) > 0

    def _begin_waiting(self, draft: Draft) -> Iterator[RequestState]:
        """Let waiting requests begin, in their order, as long as there is room for the next.

        A request whose quota has no room is passed over.
        """
        table = self._table
        if not draft.budget or table.num_seqs_reserved == table.max_num_seqs:
            return
        num_passed = 0
        for state in table.policy.waiting():
            if self._must_wait(state, draft):
                continue
            if not table.has_room_for(state) or num_passed == _LOOK_PAST:
                return
            if self._prefix_cache and self._must_wait_for_prefix(state):
                num_passed += 1
            elif self._begin(state, draft):
                yield state
            elif not self._must_wait(state, draft):
                return

    def _begin(self, state: RequestState, draft: Draft) -> bool:
        """Give a waiting or dropped request its blocks, if there is room for a chunk of it."""
        self._table.begin(state)
        length = self._table.sequences.num_known(state.seq_ids[0])
        remaining = length - self._num_cached(state, length)
        copies = None
        if draft.chunk(remaining):
            try:
                copies = self._placement.begin(state, self._spare(state))
            except OutOfBlocks as error:
                draft.note_refusal(error)
        if copies is None:
            self._table.undo_begin(state)
            return False
        state.waits_for = None  # or a chain of them would never be let go
        draft.copy(copies)
        draft.is_prompt_copied |= len(copies) > 0
        self.num_reused_tokens += length - remaining
        return True

    def _spare(self, state: RequestState) -> int:
        """Return how many blocks stay available when this request comes onto the device.

        Where nothing runs, the request's own worst case has room, and that is all it may ask for.
        One that returns leaves a block for each row, or it would soon have to leave again.
        """
        if not self._table.running:
            return 0
        reserve = int(np.ceil(self.watermark * self._num_usable))
        if state.status is Status.WAITING:
            return reserve
        return max(reserve, self._table.count_seqs()) + len(state.seq_ids)

    # ---------------------------------------------------------------- shared beginnings

    def _num_cached(self, state: RequestState, length: int) -> int:
        """Return how many of its first row's leading tokens are cached now. O(tokens)."""
        if not self._prefix_cache:
            return 0
        if state.seq_ids:
            ids = self._table.sequences.tokens(state.seq_ids[0], 0, length - 1)
        else:
            ids = state.prompt[: length - 1]
        namespace, lora = state.identity
        return self._manager.match_prefix(ids, namespace=namespace, lora=lora)

    def _must_wait_for_prefix(self, state: RequestState) -> bool:
        """True if another request is computing what its prompt begins with.

        It waits for one request at the most, and only while that computes: so not for long.
        """
        if state.waits_for is None:
            self._find_prefill(state)
        other = state.waits_for
        if other is None or other.status is not Status.RUNNING or other.is_ready:
            return False
        return bool(other.seq_ids) and self._num_computed(other) < state.num_shared

    def _find_prefill(self, state: RequestState) -> None:
        identity = state.identity
        begun = [
            other
            for other in self._table.running
            if not other.is_ready and other.identity == identity
        ]
        if not begun:
            return
        size = self._manager.block_size
        shares = [num_common(state.prompt[:-1], other.prompt) // size * size for other in begun]
        most = int(np.argmax(shares))
        if shares[most] <= self._num_computed(begun[most]):
            return  # committed already
        if shares[most] >= self._num_cached(state, len(state.prompt)) + size:
            state.waits_for, state.num_shared = begun[most], shares[most]

    def _num_computed(self, state: RequestState) -> int:
        return int(self._table.sequences.computed[state.seq_ids[0]])
