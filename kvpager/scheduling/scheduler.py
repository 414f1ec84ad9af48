"""Iteration-level scheduling: decides which tokens of which requests the next step computes.

    scheduler = Scheduler(manager)
    scheduler.submit(Request(request_id="a", prompt=ids, max_new_tokens=100))
    while scheduler.has_work:
        plan = scheduler.plan()                     # swaps, copies, rows, slots, block tables
        ...                                         # compute the step and sample tokens
        scheduler.complete(plan, parents, tokens)   # which rows continue, with which tokens

After Orca (Yu et al., 2022) and vLLM (Kwon et al., 2023). A step contains one token of every
decoding sequence. Chunks of prompts follow: first of running requests, then of requests that
resume, then of waiting requests.

`complete` covers decoding, parallel samples, beams and stopping. A row listed once in `parents`
continues, a row listed several times is forked, and a row that is not listed ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._atomic import Change
from kvpager.blocks.protocol import MEMBERS, CacheManager
from kvpager.plans import Int32, Reason, StepPlan, Transfer
from kvpager.scheduling.admission import AdmissionPolicy
from kvpager.scheduling.completion import Completion, read_continuations
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.progress import Progress
from kvpager.scheduling.queue import SchedulingPolicy, make_policy
from kvpager.scheduling.request import Request, RequestState, Status, checked_prompt
from kvpager.scheduling.request_table import RequestTable
from kvpager.scheduling.rows import Rows
from kvpager.scheduling.step import StepBuilder


class SchedulerStats(NamedTuple):
    """Counts at one moment, in requests unless the name says otherwise.

    Names that begin with `total_` count since the scheduler was made.
    """

    num_waiting: int
    num_running: int
    num_running_seqs: int
    num_preempted: int
    total_steps: int
    total_tokens: int  # of prompts and of decoding; recomputed tokens count again
    total_reused_tokens: int  # of prompts, found in the prefix cache
    total_preempted_by_swap: int
    total_preempted_by_recompute: int


class Scheduler:
    """Continuous batching over the blocks of one manager. No other code may allocate from it.

    Not thread-safe: callers on several threads need a lock. Python's signal handlers run after a
    call. If a `KeyboardInterrupt` keeps the caller from the result of `plan`, read it from `step`.

    Args:
        manager: a `BlockManager` made without `fences`, or another `CacheManager`.
        max_batch_tokens: maximum tokens per step.
        max_num_seqs: maximum sequences on the device; a request counts as `n`. Capped at
            `max_batch_tokens`, so that every decoding sequence fits in every step.
        max_queue_size: maximum waiting requests; None for no limit.
        policy: `"fifo"`, `"priority"`, `"fair"`, or a `SchedulingPolicy` of your own.
        watermark: fraction of the blocks to leave available when a request starts or resumes, so
            that running requests can grow: 0 <= watermark < 1. Ignored if no request runs.
        prefix_cache: share the KV of equal prefixes between requests.
        costs: the cost model for swap vs. recompute.
        max_model_len: maximum tokens per sequence, prompt included; None for no limit.
        chunked: split prompts over several steps. If False, a prompt longer than
            `max_batch_tokens` gets a step of its own.
        clock: returns seconds, for deadlines and ageing.

    Raises: `TypeError`, `ValueError` for arguments that are out of range.
    """

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_batch_tokens: int = 1024,
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
        self.manager = manager
        self.max_batch_tokens = arguments.count("max_batch_tokens", max_batch_tokens, at_least=1)
        num_seqs = arguments.count("max_num_seqs", max_num_seqs, at_least=1)
        limits = (
            _count_or_none("max_queue_size", max_queue_size),
            _count_or_none("max_model_len", max_model_len),
            arguments.number("watermark", watermark, at_least=0, at_most=1),
        )
        if watermark == 1:
            raise ValueError(f"watermark={watermark}: expected 0 <= watermark < 1.")
        self.prefix_cache = arguments.flag("prefix_cache", prefix_cache)
        self.chunked = arguments.flag("chunked", chunked)
        self.clock = clock
        self._lock: AbstractContextManager[Any] = threading.RLock()
        self._change = Change(self)
        self._table = RequestTable(make_policy(policy), min(num_seqs, self.max_batch_tokens))
        placement = Placement(manager, self._table, costs or PreemptionCosts(), prefix_cache)
        self._placement = placement
        self._admission = AdmissionPolicy(placement, *limits)
        self._rows = Rows(placement)
        self._completion = Completion(placement)
        self._step: tuple[StepPlan, StepBuilder] | None = None
        self._num_steps = self._num_tokens = 0

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queue a request. O(prompt).

        Raises: `QueueFull`; `TypeError`, `ValueError` for a request that could never run, a tenant
        or priority that the policy ignores, or an id that is in use. An id is free again after
        `StepPlan.ended` has listed it.
        """
        prompt = checked_prompt(request)
        self._table.policy.refuse_ignored(request)
        with self._lock, self._change:
            if self._table.is_known(request.request_id):
                raise ValueError(
                    f"request_id={request.request_id!r}: a live request has this id. "
                    "Choose another."
                )
            self._admission.refuse_impossible(request, prompt)
            self._admission.refuse_overflow()
            now = float(self.clock())
            self._change.begin()
            self._table.add(request, prompt, now)

    def refuse_starvation(self) -> None:
        """Raise `ValueError` if a live request could not run even alone. O(requests * tokens).

        Call it after pinning cached blocks of the manager, and undo the pin if this raises.
        """
        with self._lock:
            self._admission.refuse_starvation()

    @property
    def cache_version(self) -> int:
        """The number of times that the prefix cache was cleared. O(1)."""
        return self._table.cache_version

    def identity(self, request_id: Hashable) -> tuple[str | None, str | None]:
        """Return the namespace and LoRA under which a live request's prefix is cached. O(1).

        Raises: `KeyError` for a request that is not live.
        """
        with self._lock:
            return self._live(request_id).identity

    def hold(self, request_id: Hashable) -> None:
        """Keep a waiting request from starting until `release`. Others overtake it. O(1).

        A held request can be cancelled, and its deadline counts. Raises: `KeyError` for a request
        that is not live; `ValueError` for one that started.
        """
        with self._lock, self._change:
            state = self._live(request_id)
            if state.status is not Status.WAITING:
                raise ValueError(f"request_id={request_id!r}: the request started already.")
            self._change.begin()
            state.is_held = True

    def is_held(self, request_id: Hashable) -> bool:
        """Return True for a live request between `hold` and `release`. O(1)."""
        with self._lock:
            state = self._table.live.get(request_id)
            return state is not None and state.is_held

    def release(self, request_id: Hashable) -> None:
        """Let a held request start. O(1). Raises: `KeyError` for a request that is not live."""
        with self._lock, self._change:
            state = self._live(request_id)
            self._change.begin()
            state.is_held = False

    def _live(self, request_id: Hashable) -> RequestState:
        state = self._table.live.get(request_id)
        if state is None:
            raise KeyError(f"request_id={request_id!r}: no live request has this id.")
        return state

    def cancel(self, request_id: Hashable) -> bool:
        """End a request as `CANCELLED`; return True if it was live. O(its blocks + waiting).

        A request in the current step ends when the step is completed.
        """
        return self._stop(request_id, Reason.CANCELLED)

    def finish(self, request_id: Hashable) -> bool:
        """End a request as `cancel` does, with the reason `FINISHED`."""
        return self._stop(request_id, Reason.FINISHED)

    def _stop(self, request_id: Hashable, reason: Reason) -> bool:
        with self._lock, self._change:
            state = self._table.live.get(request_id)
            if state is None or state.ending is not None:
                return False
            self._change.begin()
            if self._step is not None and state.status is Status.RUNNING:
                state.ending = reason
            else:
                self._placement.end(state, reason)
            return True

    def clear_prefix_cache(self) -> None:
        """Drop the prefix cache, for example after the model changed. O(requests + cached blocks).

        Requests that start later reuse nothing computed before. Running and swapped requests
        continue with the KV they have.
        """
        with self._lock, self._change:
            self._change.begin()
            self._table.new_cache_version()
            self.manager.clear_prefix_cache()

    # ---------------------------------------------------------------- steps

    def plan(self, transfers: tuple[Transfer, ...] = ()) -> StepPlan | None:
        """Return the plan of the next step, or None if there is nothing to do. O(rows + tokens).

        A plan without rows only has swaps, transfers or ends to report; it needs no `complete`.
        `transfers` are passed on to followers: see `StepPlan`.
        Raises: `ValueError` while the last plan is neither completed nor aborted.
        """
        with self._lock, self._change:
            if self._step is not None:
                raise ValueError("plan: a step is under way. Complete or abort its plan first.")
            now = float(self.clock())
            self._change.begin()
            self._table.sequences.recycle()
            for state in self._table.take_expired(now):
                self._placement.end(state, Reason.EXPIRED)
            return self._plan(transfers)

    def _plan(self, transfers: tuple[Transfer, ...]) -> StepPlan | None:
        min_chunk = self.manager.block_size if self.chunked else None
        builder = StepBuilder(self.max_batch_tokens, min_chunk)
        self._rows.decode(builder)
        self._rows.prefill(builder)
        for state in self._admission.admit(builder):
            self._rows.add(state, builder)
        if not (builder.parts or builder.swaps or transfers or self._table.has_ended):
            return None
        plan = builder.finish(self.manager, self._table, transfers)
        if builder.parts:
            self._step = plan, builder
            self._num_steps += 1
            self._num_tokens += len(plan.token_ids)
        return plan

    @property
    def step(self) -> StepPlan | None:
        """Return the plan under way, for a caller that was interrupted in `plan`. O(1)."""
        return None if self._step is None else self._step[0]

    def complete(self, plan: StepPlan, parents: ArrayLike, tokens: ArrayLike) -> Int32:
        """Record that the step was computed, and how its rows continue.

        O(rows), plus the blocks of sequences that fork or end.

        Args:
            plan: the plan under way.
            parents: int [continuations], ascending: the index of the row of `plan` that each
                continuation extends. The row must have `needs_logits`.
            tokens: int32 [continuations], the next token of each continuation.

        A row with `needs_logits` that is not listed ends. The first continuation of a row keeps its
        sequence id; the others are forks. A sequence that reaches its `max_new_tokens`
        ends by itself. Continuations of cancelled requests are ignored. A request without sequences
        is finished.

        Returns the sequence id of each continuation, int32; -1 where the sequence ended.
        Raises: `ValueError`, `TypeError` before anything changes.
        """
        parents, tokens = read_continuations(parents, tokens)
        if not len(plan) and not len(parents):
            return parents.astype(np.int32)
        with self._lock, self._change:
            builder = self._under_way(plan)
            self._completion.refuse_bad_parents(plan, parents)
            self._change.begin()
            self._step = None
            self._completion.commit(plan, builder)
            keeps, stopped = plan.needs_logits, self._end_stopped()
            if stopped:
                keeps = keeps & ~np.isin(plan.seq_ids, stopped)
            return self._completion.advance(plan, keeps.nonzero()[0], parents, tokens)

    def abort(self, plan: StepPlan) -> list[Hashable]:
        """Record that the step failed: end all requests in it, as `FAILED`. O(their blocks).

        The swaps of the plan may not have happened, so requests that it swapped are recomputed.
        Returns the ids of the requests that failed. Raises: `ValueError` for another plan.
        """
        with self._lock, self._change:
            if not len(plan) and self._step is None:
                return []
            builder = self._under_way(plan)
            self._change.begin()
            self._step = None
            request_ids = list(dict.fromkeys(plan.request_ids))
            for state in map(self._table.live.get, request_ids):
                if state is not None:
                    self._placement.end(state, Reason.FAILED)
            for state in builder.swapped:
                if self._table.is_live(state) and state.status is not Status.DROPPED:
                    self._placement.drop(state)
            self._end_stopped()
            return request_ids

    def _end_stopped(self) -> list[int]:
        """End the requests that were stopped during the step; return their sequences."""
        seq_ids = []
        for state in [*self._table.running]:
            if state.ending is not None:
                seq_ids += state.seq_ids
                self._placement.end(state, state.ending)
        return seq_ids

    def _under_way(self, plan: StepPlan) -> StepBuilder:
        if self._step is None or self._step[0] is not plan:
            raise ValueError("plan: not the plan under way. Complete or abort each plan once.")
        return self._step[1]

    # ---------------------------------------------------------------- queries

    @property
    def num_waiting(self) -> int:
        """The number of waiting requests. O(1)."""
        return self._table.policy.num_waiting

    @property
    def num_running(self) -> int:
        """The number of running requests. O(1)."""
        return len(self._table.running)

    @property
    def num_preempted(self) -> int:
        """The number of preempted requests. O(1)."""
        return len(self._table.preempted)

    @property
    def has_work(self) -> bool:
        """True if a request is live, or an end is not reported yet. O(1)."""
        return len(self._table.live) > 0 or self._table.has_ended

    @property
    def request_ids(self) -> list[Hashable]:
        """The ids of the live requests, by arrival. O(requests)."""
        return list(self._table.live)

    @property
    def max_num_seqs(self) -> int:
        """The maximum number of sequences on the device. O(1)."""
        return self._table.max_num_seqs

    @property
    def max_queue_size(self) -> int | None:
        """The maximum number of waiting requests, or None. O(1)."""
        return self._admission.max_queue_size

    @property
    def max_model_len(self) -> int | None:
        """The maximum tokens of a sequence, or None. O(1)."""
        return self._admission.max_model_len

    @property
    def watermark(self) -> float:
        """The share of blocks that stays available when a request starts. O(1)."""
        return self._admission.watermark

    def progress(self) -> Progress:
        """Return a reader of how far requests are. It needs the scheduler's lock, if any. O(1)."""
        return Progress(self._table)

    def stats(self) -> SchedulerStats:
        """Return current counts, and totals since the start. O(running)."""
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
        """Recount the state of the scheduler and of its manager. O(blocks + tokens).

        Raises: `BrokenInvariant`, which names the broken invariant.
        """
        self.manager.check()
        self._table.check()


def _refuse_bad_manager(manager: CacheManager) -> None:
    missing = [name for name in MEMBERS if not hasattr(manager, name)]
    if missing or isinstance(manager, type):
        lacks = f" It lacks {', '.join(missing)}." if missing else ""
        raise TypeError(
            f"manager={arguments.shown(manager)}: expected a BlockManager or another CacheManager."
            f"{lacks}"
        )
    if manager.copies.is_fenced:
        raise ValueError(
            "manager: a scheduler applies plans in order. Make the manager without fences."
        )


def _count_or_none(name: str, value: int | None) -> int | None:
    return None if value is None else arguments.count(name, value, at_least=1)
