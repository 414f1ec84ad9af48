"""Admission: resume preempted requests, then admit waiting ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpager._text import counted
from kvpager.blocks.stats import Withheld
from kvpager.errors import OutOfBlocks, QueueFull
from kvpager.plans import Int32
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.request import (
    Request,
    RequestState,
    Status,
    blocks_needed,
    lora_of_version,
)
from kvpager.scheduling.sequence_state import num_common
from kvpager.scheduling.step import StepBuilder

_LOOK_PAST = 32  # maximum waiting requests that one plan skips because they wait for a prefix


class AdmissionPolicy:
    """Decides which requests the scheduler accepts, and which start or resume in a step.

    The arguments after `placement` are those of `Scheduler`.
    """

    def __init__(
        self,
        placement: Placement,
        max_queue_size: int | None,
        max_model_len: int | None,
        watermark: float,
    ) -> None:
        self._placement = placement
        self._manager, self._table = placement.manager, placement.table
        self.max_queue_size = max_queue_size
        self.max_model_len = max_model_len
        self.watermark = watermark
        stats = self._manager.stats()
        usable = stats.num_held + stats.num_cached + stats.num_kept + stats.num_free
        self._num_reserved = stats.num_blocks - usable  # 1 if the manager has a null block, else 0
        self.num_reused_tokens = 0  # prompt tokens found in the prefix cache

    @property
    def _num_usable(self) -> int:
        return self._manager.num_blocks - self._num_reserved

    # ---------------------------------------------------------------- accept or refuse

    def refuse_impossible(self, request: Request, prompt: Int32) -> None:
        """Raise `ValueError` if the request could not run even alone. O(1).

        O(tokens + blocks) if blocks are pinned.
        """
        what, max_num_seqs = f"request {request.request_id!r}:", self._table.max_num_seqs
        num_prompt = len(prompt)
        if request.n > max_num_seqs:
            raise ValueError(
                f"{what} n={request.n} is more than max_num_seqs={max_num_seqs}. "
                "Lower n or raise max_num_seqs."
            )
        what += f" {num_prompt} prompt tokens and {request.max_new_tokens} new tokens"
        most = self.max_model_len
        if most is not None and num_prompt + request.max_new_tokens > most:
            raise ValueError(
                f"{what} exceed max_model_len={most}. Shorten the prompt or lower max_new_tokens."
            )
        self._refuse_without_room(request, prompt, what)

    def _refuse_without_room(self, request: Request, prompt: Int32, what: str) -> None:
        need = blocks_needed(request, len(prompt), self._manager)
        what += f" in {counted(request.n, 'sample')} may need {need} blocks, but"
        fix = "Lower max_new_tokens or the number of samples, or"
        withheld = self._withheld(request, prompt)
        if withheld.pinned:  # samples may need a block more to share cached blocks
            need += request.n - 1
        if need > self._num_usable - withheld.pinned - withheld.reserved:
            room, fix = f"the pool has {self._num_usable}", f"{fix} enlarge the pool"
            if withheld.pinned:
                room += f", {withheld.pinned} of them retained for other prompts"
                fix += ", or release retained prompts"
            if withheld.reserved:
                room += f", {withheld.reserved} of them reserved for other namespaces"
                fix += ", or lower their floors"
            raise ValueError(f"{what} {room}. {fix}.")
        ceiling = self._manager.quotas.ceiling(request.namespace)
        if ceiling is not None and need > ceiling - withheld.own:
            room, fix = f"the quota of its namespace is {ceiling}", f"{fix} raise the quota"
            if withheld.own:
                room += f", {withheld.own} of them retained for other prompts"
                fix += ", or release retained prompts"
            raise ValueError(f"{what} {room}. {fix}.")

    def _withheld(self, request: Request, prompt: Int32) -> Withheld:
        lora = lora_of_version(request.lora, self._table.cache_version)
        shared = prompt if self._placement.prefix_cache else None
        return self._manager.queries.withheld(shared, request.namespace, lora)

    def refuse_starvation(self) -> None:
        """Raise `ValueError` if a live request could not end, because of pins. O(live requests)."""
        for state in self._table.live.values():
            self.refuse_impossible(state.request, state.prompt)

    def refuse_overflow(self) -> None:
        """Raise `QueueFull` if the queue is full. O(1)."""
        num_waiting = self._table.policy.num_waiting
        if self.max_queue_size is not None and num_waiting >= self.max_queue_size:
            raise QueueFull(num_waiting, self.max_queue_size)

    # ---------------------------------------------------------------- start and resume

    def admit(self, builder: StepBuilder) -> Iterator[RequestState]:
        """Yield each request that starts or resumes in this step.

        The caller adds the request's rows to `builder` before it asks for the next request.
        """
        if not builder.is_blocked:
            yield from self._resume(builder)
        if not builder.is_blocked:
            yield from self._begin_waiting(builder)

    def _resume(self, builder: StepBuilder) -> Iterator[RequestState]:
        """Resume preempted requests before any waiting request starts.

        A request whose quota is full waits for its own namespace; other requests overtake it.
        """
        table = self._table
        while candidates := [
            each for each in table.preempted if not self._is_over_quota(each, builder)
        ]:
            state = min(candidates, key=table.policy.rank)
            if table.has_room_for(state) and self._resume_one(state, builder):
                yield state
            elif self._reclaim_for(state, builder):
                builder.over_quota.discard(state.request.namespace)
            elif not self._is_over_quota(state, builder):
                builder.is_blocked = True
                return

    def _is_over_quota(self, state: RequestState, builder: StepBuilder) -> bool:
        return state.request.namespace in builder.over_quota

    def _reclaim_for(self, state: RequestState, builder: StepBuilder) -> bool:
        """Drop a swapped request whose device blocks `state` may take. O(blocks).

        If there is none, drop `state` if it is swapped: it may begin again with cached blocks that
        are pinned. Returns False if nothing was dropped, as when a running request will release
        blocks anyway.
        """
        others = [*self._table.running, *self._table.preempted]
        if self._is_over_quota(state, builder):
            namespace = state.request.namespace
            others = [each for each in others if each.request.namespace == namespace]
        if any(each.status is Status.RUNNING for each in others):
            return False
        if self._placement.reclaim(each for each in others if each is not state):
            return True
        if state.status is not Status.SWAPPED or not self._table.has_room_for(state):
            return False
        self._placement.drop(state)
        return True

    def _resume_one(self, state: RequestState, builder: StepBuilder) -> bool:
        if state.status is Status.DROPPED:
            return self._begin(state, builder)
        # The data plane applies swaps before copies: no swap may overwrite the source of a copy.
        if builder.is_prompt_copied or not self._has_budget(state, builder):
            return False
        try:
            builder.swaps.append(self._placement.swap_in(state, self._num_to_reserve(state)))
        except OutOfBlocks as error:
            builder.note_refusal(error)
            return False
        builder.swapped.append(state)
        return True

    def _has_budget(self, state: RequestState, builder: StepBuilder) -> bool:
        if state.is_ready:
            return len(state.seq_ids) <= builder.budget
        mine, sequences = state.seq_ids, self._table.sequences
        return builder.chunk(int((sequences.lengths[mine] - sequences.computed[mine]).max())) > 0

    def _begin_waiting(self, builder: StepBuilder) -> Iterator[RequestState]:
        """Start waiting requests by rank until the next one finds no room.

        Skips requests that are held, whose quota is full, or that wait for a prefix.
        """
        table = self._table
        if not builder.budget or table.num_seqs_reserved == table.max_num_seqs:
            return
        num_passed = 0
        for state in table.policy.waiting():
            if state.is_held or self._is_over_quota(state, builder):
                continue
            if not table.has_room_for(state) or num_passed == _LOOK_PAST:
                return
            if self._placement.prefix_cache and self._must_wait_for_prefix(state):
                num_passed += 1
            elif self._begin(state, builder):
                yield state
            elif not self._is_over_quota(state, builder):
                return

    def _begin(self, state: RequestState, builder: StepBuilder) -> bool:
        """Allocate the blocks of a waiting or dropped request if a chunk of it fits in the step."""
        self._table.begin(state)
        length = self._table.sequences.num_known(state.seq_ids[0])
        remaining = length - self._num_cached(state, length)
        copies = None
        if builder.chunk(remaining):
            try:
                copies = self._placement.begin(state, self._num_to_reserve(state))
            except OutOfBlocks as error:
                builder.note_refusal(error)
        if copies is None:
            self._table.undo_begin(state)
            return False
        state.waits_for = None  # otherwise requests would keep each other alive in a chain
        builder.copy(copies)
        builder.is_prompt_copied |= len(copies) > 0
        self.num_reused_tokens += length - remaining
        return True

    def _num_to_reserve(self, state: RequestState) -> int:
        """Return how many blocks must stay available when this request starts or resumes.

        If nothing runs, the request's own worst case fits, so nothing is reserved. A resuming
        request leaves one block per sequence, or it would soon be preempted again.
        """
        if not self._table.running:
            return 0
        reserve = int(np.ceil(self.watermark * self._num_usable))
        if state.status is Status.WAITING:
            return reserve
        return max(reserve, self._table.count_seqs()) + len(state.seq_ids)

    # ---------------------------------------------------------------- shared prefixes

    def _num_cached(self, state: RequestState, length: int) -> int:
        """Return how many leading tokens of the request's first sequence are cached. O(tokens)."""
        if not self._placement.prefix_cache:
            return 0
        ids = state.prompt[: length - 1]
        if state.seq_ids:
            ids = self._table.sequences.tokens(state.seq_ids[0], 0, length - 1)
        namespace, lora = state.identity
        return self._manager.match_prefix(ids, namespace=namespace, lora=lora)

    def _must_wait_for_prefix(self, state: RequestState) -> bool:
        """Return True while another request computes a prefix of this prompt.

        A request waits for one other request at most, and only during its prefill.
        """
        if state.waits_for is None:
            self._find_prefill(state)
        other = state.waits_for
        if other is None or other.status is not Status.RUNNING or other.is_ready:
            return False
        return bool(other.seq_ids) and self._num_computed(other) < state.num_shared

    def _find_prefill(self, state: RequestState) -> None:
        identity, running = state.identity, self._table.running
        begun = [each for each in running if not each.is_ready and each.identity == identity]
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
