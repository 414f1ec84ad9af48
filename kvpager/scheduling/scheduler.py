"""Iteration-level scheduling: which tokens of which requests are computed in the next step.

    scheduler = Scheduler(manager)
    scheduler.submit(Request(request_id="a", prompt=ids, max_new_tokens=100))
    while scheduler.has_work:
        plan = scheduler.plan()                     # swaps, copies, rows, slots, tables
        ...                                         # the data plane obeys, the sampler chooses
        scheduler.complete(plan, parents, tokens)   # which rows go on, each with which token

After Orca (Yu et al., 2022) and vLLM (Kwon et al., 2023). A step takes one token of every row that
decodes, then chunks of prompts: of those that are being computed, of those that were preempted
and return, of those that wait. `complete` is the one way on: a row that is named once continues,
one named several times is forked, one that is not named has ended. Plain decoding, parallel
samples, beams and stopping are the same thing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._atomic import Change
from kvpager.blocks.protocol import MEMBERS, CacheManager
from kvpager.plans import Int32, Reason, StepPlan
from kvpager.scheduling.admission import AdmissionPolicy
from kvpager.scheduling.completion import Completion, read_continuations
from kvpager.scheduling.decoding import Decoding
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.prefill import Prefill
from kvpager.scheduling.queue import SchedulingPolicy, make_policy
from kvpager.scheduling.request import Request, Status, read_prompt
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.stats import SchedulerStats
from kvpager.scheduling.step import Draft


class Scheduler:
    """Continuous batching over the blocks of one manager, which nobody else takes blocks of.

    Not thread-safe: callers on several threads need a lock. A signal waits for the end of a call.
    If it interrupts the caller before `plan` returns, `step` has the plan.

    Args:
        manager: a `BlockManager` made without `fences`, or another `CacheManager`.
        max_batch_tokens: tokens of a step.
        max_num_seqs: rows on the device; a request counts with all it may have. Never more than
            `max_batch_tokens`, so that every row that decodes is in every step.
        max_queue_size: `submit` refuses more than so many waiting requests. None: no bound.
        policy: who goes first, `"fifo"`, `"priority"` or `"fair"`, or a `SchedulingPolicy`.
        watermark: the share of the blocks that stays available when a request begins or returns,
            unless nothing runs: room for those that run to grow.
        prefix_cache: reuse what equal prompts have computed, and offer what is computed.
        costs: what decides whether a preempted request is swapped or computed again.
        max_model_len: tokens that a row may come to.
        chunked: divide prompts among steps. If not, a prompt that is longer than
            `max_batch_tokens` has its step for itself.
        clock: seconds, for deadlines and ageing.
    """

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_batch_tokens: int = 2048,
        max_num_seqs: int = 256,
        max_queue_size: int | None = None,
        policy: str | SchedulingPolicy = "fifo",
        watermark: float = 0.01,
        prefix_cache: bool = True,
        costs: PreemptionCosts | None = None,
        max_model_len: int | None = None,
        chunked: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _refuse_bad_manager(manager)
        _refuse_bad_watermark(watermark)
        self.manager = manager
        self.max_batch_tokens = arguments.count("max_batch_tokens", max_batch_tokens, at_least=1)
        rows = arguments.count("max_num_seqs", max_num_seqs, at_least=1)
        self.prefix_cache = arguments.flag("prefix_cache", prefix_cache)
        self.chunked = arguments.flag("chunked", chunked)
        self.clock = clock
        self._lock: AbstractContextManager[Any] = threading.RLock()
        self._change = Change(self)
        self._table = RequestTable(make_policy(policy), min(rows, self.max_batch_tokens))
        parts = manager, self._table
        placement = Placement(*parts, costs or PreemptionCosts(), by_ids=prefix_cache)
        self._placement = placement
        self._admission = AdmissionPolicy(
            *parts,
            placement,
            max_queue_size=_count_or_none("max_queue_size", max_queue_size),
            max_model_len=_count_or_none("max_model_len", max_model_len),
            watermark=watermark,
            prefix_cache=prefix_cache,
        )
        self._decoding = Decoding(*parts, placement, by_ids=prefix_cache)
        self._prefill = Prefill(*parts, placement)
        self._completion = Completion(*parts, placement, by_ids=prefix_cache)
        self._step: tuple[StepPlan, Draft] | None = None
        self._num_steps = self._num_tokens = 0

    # ---------------------------------------------------------------- requests come and go

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. O(prompt).

        Raises: `QueueFull`; `TypeError`, `ValueError` for an id in use (or whose end no plan has
        told yet) and for what could never be served: a prompt that is empty or too long, more
        samples than rows, more blocks than there are.
        """
        prompt = read_prompt(request)
        with self._lock, self._change:
            if self._table.is_known(request.request_id):
                raise ValueError(
                    f"request_id={request.request_id!r}: a live request has this id. "
                    "Choose another."
                )
            self._admission.refuse_impossible(request, len(prompt))
            self._admission.refuse_overflow()
            now = float(self.clock())
            self._change.begin()
            self._table.add(request, prompt, now)

    def cancel(self, request_id: Hashable) -> bool:
        """End a request, whatever its state; True if it was live. O(its blocks + waiting).

        While its step is being computed it ends with `complete`.
        """
        return self._stop(request_id, Reason.CANCELLED)

    def finish(self, request_id: Hashable) -> bool:
        """Do as `cancel` for a request that has all it wants: it ends as `FINISHED`."""
        return self._stop(request_id, Reason.FINISHED)

    def _stop(self, request_id: Hashable, reason: Reason) -> bool:
        with self._lock, self._change:
            state = self._table.get(request_id)
            if state is None or state.ending is not None:
                return False
            self._change.begin()
            if self._step is not None and state.status is Status.RUNNING:
                self._table.end_later(state, reason)
            else:
                self._placement.end(state, reason)
            return True

    def clear_prefix_cache(self) -> None:
        """Share nothing computed so far with what begins from now on: a model changed, say.

        Requests that run, or are swapped, go on with what they have. O(requests + cached blocks).
        """
        with self._lock, self._change:
            self._change.begin()
            self._table.new_generation()
            self.manager.clear_prefix_cache()

    # ---------------------------------------------------------------- a step

    def plan(self) -> StepPlan | None:
        """Return what to compute now, or None if there is nothing at all. O(rows + tokens).

        A plan without rows has swaps or ended requests only. It needs no `complete`.
        Raises: `ValueError` while the last plan is neither completed nor aborted.
        """
        with self._lock, self._change:
            if self._step is not None:
                raise ValueError("a step is under way; complete or abort its plan first")
            now = float(self.clock()) if self._table.has_deadlines else 0.0
            self._change.begin()
            self._table.sequences.recycle()
            for state in self._table.take_expired(now):
                self._placement.end(state, Reason.EXPIRED)
            return self._plan()

    def _plan(self) -> StepPlan | None:
        draft = Draft(self.max_batch_tokens, self.manager.block_size if self.chunked else None)
        self._decoding.extend(draft)
        self._prefill.extend(draft)
        for state in self._admission.admit(draft):
            if state.is_ready:
                self._decoding.add(state, draft)
            else:
                self._prefill.add(state, draft)
        if not (draft.parts or draft.swaps or self._table.has_ended):
            return None
        plan = draft.finish(self.manager, self._table)
        if draft.parts:
            self._step = plan, draft
            self._num_steps += 1
            self._num_tokens += len(plan.token_ids)
        return plan

    @property
    def step(self) -> StepPlan | None:
        """Return the current plan, for a caller whose call of `plan` was interrupted. O(1)."""
        return None if self._step is None else self._step[0]

    def complete(self, plan: StepPlan, parents: ArrayLike, tokens: ArrayLike) -> Int32:
        """Say that the step was computed, and how it goes on. O(rows), more for forks and ends.

        Args:
            plan: the last one.
            parents: int [continuations], ascending: the row of `plan` that each goes on from, one
                of those that want logits.
            tokens: int32 [continuations], the token it goes on with.

        A row that is not named has ended; of a row's continuations the first keeps its sample
        number, the others are forks. Those that have `max_new_tokens` end by themselves, and
        those of a request that was cancelled are left out. A request without samples is finished.

        Returns the sample number of each continuation, int32; -1 where it ended at once.
        Raises: `ValueError`, `TypeError` before anything is changed.
        """
        parents, tokens = read_continuations(parents, tokens)
        if not len(plan) and not len(parents):
            return parents.astype(np.int32)
        with self._lock, self._change:
            draft = self._under_way(plan)
            self._completion.refuse_bad_parents(plan, parents)
            self._change.begin()
            self._step = None
            self._completion.commit(plan, draft)
            keeps = plan.needs_logits
            for state in [state for state in self._table.running if state.ending is not None]:
                keeps = keeps & ~np.isin(plan.seq_ids, state.seq_ids)
                self._placement.end(state, state.ending or Reason.CANCELLED)
            return self._completion.advance(plan, keeps.nonzero()[0], parents, tokens)

    def abort(self, plan: StepPlan) -> list[Hashable]:
        """Say that the step failed: all requests in it end; the others live on. O(their blocks).

        Blocks that were to be moved may not have been: requests that the plan swapped are computed
        again. Returns the ids of those that ended. Raises: `ValueError` for another plan.
        """
        with self._lock, self._change:
            if not len(plan) and self._step is None:
                return []
            draft = self._under_way(plan)
            self._change.begin()
            self._step = None
            request_ids = list(dict.fromkeys(plan.request_ids))
            for state in map(self._table.get, request_ids):
                if state is not None:
                    self._placement.end(state, Reason.FAILED)
            for state in draft.moved:
                is_live = self._table.get(state.request_id) is state
                if is_live and state.status is not Status.DROPPED:
                    self._placement.drop(state)
            for state in [state for state in self._table.running if state.ending is not None]:
                self._placement.end(state, state.ending or Reason.CANCELLED)
            return request_ids

    def _under_way(self, plan: StepPlan) -> Draft:
        if self._step is None or self._step[0] is not plan:
            raise ValueError("this plan is not under way; each is completed or aborted once")
        return self._step[1]

    # ---------------------------------------------------------------- reading

    @property
    def num_waiting(self) -> int:
        """Return the number of requests that have not begun. O(1)."""
        return self._table.policy.num_waiting

    @property
    def num_running(self) -> int:
        """Return the number of requests on the device. O(1)."""
        return len(self._table.running)

    @property
    def num_preempted(self) -> int:
        """Return the number of requests that were taken off the device and will return. O(1)."""
        return len(self._table.preempted)

    @property
    def has_work(self) -> bool:
        """True if any request is live, or `plan` has an end to tell. O(1)."""
        return len(self._table) > 0 or self._table.has_ended

    @property
    def request_ids(self) -> list[Hashable]:
        """Return the ids of the live requests, by arrival. O(requests)."""
        return list(self._table)

    @property
    def max_num_seqs(self) -> int:
        """Return how many rows may be on the device. O(1)."""
        return self._table.max_num_seqs

    @property
    def max_queue_size(self) -> int | None:
        """Return how many requests may wait, or None for any number. O(1)."""
        return self._admission.max_queue_size

    @property
    def max_model_len(self) -> int | None:
        """Return how many tokens a row may come to, or None for any number. O(1)."""
        return self._admission.max_model_len

    @property
    def watermark(self) -> float:
        """Return the share of the blocks that stays available when a request begins. O(1)."""
        return self._admission.watermark

    def stats(self) -> SchedulerStats:
        """Return counts of now and totals. O(running)."""
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_running_seqs=self._table.count_seqs(),
            num_preempted=self.num_preempted,
            total_steps=self._num_steps,
            total_tokens=self._num_tokens,
            total_reused_tokens=self._admission.num_reused_tokens,
            total_preempted_by_swap=self._placement.num_swapped,
            total_preempted_by_recompute=self._placement.num_dropped,
        )

    def check(self) -> None:
        """Recount everything, the manager's blocks included. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law.
        """
        self.manager.check()
        self._table.check()


def _refuse_bad_manager(manager: CacheManager) -> None:
    missing = [name for name in MEMBERS if not hasattr(manager, name)]
    if missing or isinstance(manager, type):
        lacks = f" It lacks {', '.join(missing)}." if missing else ""
        raise TypeError(
            f"manager {arguments.shown(manager)}: expected a BlockManager, or another object with "
            f"the members of CacheManager.{lacks}"
        )
    if manager.copies.is_fenced:
        raise ValueError("manager: a step's plans are applied in order; make it without fences")


def _refuse_bad_watermark(watermark: float) -> None:
    arguments.number("watermark", watermark, at_least=0, at_most=1)
    if watermark == 1:
        raise ValueError(f"watermark {watermark}: expected a share, 0 <= watermark < 1")


def _count_or_none(name: str, value: int | None) -> int | None:
    return None if value is None else arguments.count(name, value, at_least=1)
