"""The steps of an engine: plan, compute, choose tokens, deliver them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from kvpager.engine.fetching import Fetching
from kvpager.engine.metrics import EngineStats, StepRecord
from kvpager.engine.model_watch import ModelGuard
from kvpager.engine.request_state import TrackedRequest, TrackedSample
from kvpager.engine.runner import Draw, Runner, Sampler
from kvpager.engine.stream import Channel, Dispatcher, Token, listener_errors_logged
from kvpager.plans import Reason, StepPlan
from kvpager.recording.recorder import Recorder
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler

logger = logging.getLogger("kvpager")

_LOG_EVERY_S = 10.0  # interval of INFO messages about preemptions


class Loop:
    """Computes the steps of a scheduler, one after another.

    The engine's thread calls `step` and `end_all`. Any thread may call the other methods while it
    holds `lock`.

    Args:
        scheduler: accessed only while `lock` is held.
        runner: computes the plans of the scheduler.
        sampler: chooses tokens from logits.
        dispatcher: delivers tokens to streams on its own thread.
        lock: a reentrant lock.
        guard: drops cached prefixes when the model changes; None if requests share no prefixes.
        fetching: fetches the beginnings of requests from tiers; None without tiers.
        on_step: callback invoked after every step.

    The callbacks of `between_steps` are invoked before each step, without the lock. Unlike a pause,
    calling them drops no cached prefixes. A callback that raises stops the engine. `recorder`, if
    any, records each plan before it is computed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        dispatcher: Dispatcher,
        lock: AbstractContextManager[Any],
        guard: ModelGuard | None,
        fetching: Fetching | None,
        on_step: Callable[[StepRecord], None] | None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.requests: dict[Hashable, TrackedRequest] = {}  # the live ones
        self.between_steps: list[Callable[[], None]] = []
        self.recorder: Recorder | None = None
        if guard is not None:
            self.between_steps.append(guard.between_steps)
        if fetching is not None:
            self.between_steps.append(fetching.between_steps)
        self._fetching = fetching
        self._sampler = sampler
        self._dispatcher = dispatcher
        self._lock = lock
        self._guard = guard
        self._on_step = on_step
        self._samples: dict[int, TrackedSample] = {}  # by sequence id
        self._busy_seconds = 0.0
        self._num_preempted = 0
        self._logged: float | None = None  # time of the last INFO message about preemptions

    # ---------------------------------------------------------------- any thread, under the lock

    def submit(self, request: Request, tracked: TrackedRequest) -> None:
        """Queue a request. Call under the lock. O(tokens). Raises: as `Scheduler.submit`."""
        if request.request_id in self.requests:
            raise ValueError(
                f"request_id={request.request_id!r}: a live request has this id. Choose another."
            )
        if self._fetching is not None:
            self._fetching.note_arrival()
        # Track the request first: after an interrupt, no queued request may be untracked.
        self.requests[request.request_id] = tracked
        try:
            self.scheduler.submit(request)
        except BaseException:
            del self.requests[request.request_id]
            self.scheduler.cancel(request.request_id)
            raise
        if self._guard is not None:
            self._guard.note_arrival()
        if self._fetching is not None:
            self._fetching.begin(request)

    def cancel(self, channel: Channel) -> None:
        """Cancel the request of a channel. Call under the lock. O(its blocks + waiting)."""
        request_id = channel.output.request_id
        tracked = self.requests.get(request_id)
        # The request may have ended, and another request may have its id.
        if tracked is not None and tracked.channel is channel:
            self.scheduler.cancel(request_id)

    def stats(self) -> EngineStats:
        """Return current counts. Call under the lock. O(blocks + sequences)."""
        num_changes, doubt = 0, None
        if self._guard is not None:
            num_changes, doubt = self._guard.num_changes, self._guard.doubt
        pool = self.scheduler.manager.stats()
        tiers = None if self._fetching is None else self._fetching.stats()
        counts = self.scheduler.stats()
        return EngineStats(counts, pool, self._busy_seconds, num_changes, doubt, tiers)

    # ---------------------------------------------------------------- the engine's thread only

    def step(self) -> bool:
        """Compute the next step of the scheduler; return False if there is nothing to do."""
        for function in self.between_steps:
            function()
        with self._lock:
            plan = self._plan()
        if plan is None:
            return False
        began = time.perf_counter()
        try:
            draws = self._compute(plan)
        except BaseException as error:  # a hook of the caller may raise anything, even SystemExit
            self._give_up(plan, error)
            return True
        if len(plan):
            self._advance(plan, draws)
        self._record(plan, time.perf_counter() - began)
        return True

    def run_transfers(self) -> None:
        """Let followers carry out their transfers, after the last step. O(blocks)."""
        with self._lock:
            plan = self._plan()
        if plan is not None:
            self.runner.run(plan, {})

    def end_all(self, error: BaseException | None) -> None:
        """End all requests, with `error` if a defect stopped the engine. O(requests).

        Call under the lock.
        """
        how = "was not done when the engine was closed"
        for request_id, tracked in self.requests.items():
            tracked.error = error
            self._dispatcher.post(tracked.ending(Reason.CANCELLED, how))
            if error is None:
                self.scheduler.cancel(request_id)
        self.requests.clear()

    def _plan(self) -> StepPlan | None:
        if self._guard is not None:
            self._guard.catch_up()
        fetching = self._fetching
        plan = self.scheduler.plan(() if fetching is None else fetching.take_transfers())
        if self.recorder is not None:
            self.recorder.step(plan, is_needed=plan is not None)
        if plan is None:
            return None
        for sample in plan.freed.tolist():
            self._samples.pop(sample, None)
        for request_id, reason in plan.ended:
            self._end(request_id, reason)
        now = time.monotonic()
        for row, request_id in enumerate(plan.request_ids):
            output = self.requests[request_id].channel.output
            if output.first_scheduled_time is None:
                output.first_scheduled_time = now
                output.num_cached_tokens = int(plan.num_computed[row])
                if fetching is not None:
                    output.cached_tokens_by_tier = fetching.take_tokens_by_store(request_id)
        self._log_preemptions()
        return plan

    def _compute(self, plan: StepPlan) -> list[Draw]:
        """Run the plan; return a draw for each row that needs logits."""
        tracked = [self.requests[request_id] for request_id in plan.request_ids]
        prompts = (each.channel.output.prompt_token_ids for each in tracked)
        logits = self.runner.run(plan, dict(zip(plan.seq_ids.tolist(), prompts, strict=True)))
        needed = np.flatnonzero(plan.needs_logits).tolist()
        rows = [tracked[row].row(self._samples.get(int(plan.seq_ids[row]))) for row in needed]
        return self._sampler.choose(logits, rows) if rows else []

    def _advance(self, plan: StepPlan, draws: list[Draw]) -> None:
        """Deliver the chosen tokens, and complete the plan with the continuations."""
        parents: list[int] = []
        successors: list[TrackedSample] = []
        begun: list[Request] = []
        failed: list[Hashable] = []
        news: list[tuple[Channel, list[Token]]] = []
        now = time.monotonic()
        for row, draw in zip(np.flatnonzero(plan.needs_logits).tolist(), draws, strict=True):
            tracked = self.requests[plan.request_ids[row]]
            sample = self._samples.get(int(plan.seq_ids[row]))
            if sample is None:
                begun.append(tracked.request)
            arrived, continuing = tracked.extend(sample, draw, now)
            news.append((tracked.channel, arrived))
            parents += [row] * len(continuing)
            successors += continuing
            if tracked.error is not None:
                failed.append(plan.request_ids[row])
        tokens = [successor.sample.token_ids[-1] for successor in successors]
        self._dispatcher.post(partial(_hand_out, news))
        with self._lock:
            if self._fetching is not None:
                self._fetching.note_prompts(begun)
            seq_ids = self.scheduler.complete(
                plan, np.array(parents, np.int64), np.array(tokens, np.int32)
            )
            for request_id in failed:
                self.scheduler.cancel(request_id)
        for row, seq_id, successor in zip(parents, seq_ids.tolist(), successors, strict=True):
            if seq_id < 0:  # the sequence has max_new_tokens
                continue
            if seq_id != plan.seq_ids[row]:
                self.runner.fork(int(plan.seq_ids[row]), seq_id)
            self._samples[seq_id] = successor

    def _end(self, request_id: Hashable, reason: Reason) -> None:
        tracked = self.requests.pop(request_id, None)
        report = partial(self._report, tracked, reason)
        if self._fetching is None:
            report()
        else:
            self._fetching.note_end(request_id, report, may_wait=reason is Reason.FINISHED)

    def _report(self, tracked: TrackedRequest | None, reason: Reason) -> None:
        if tracked is not None:
            self._dispatcher.post(tracked.ending(reason))

    def _give_up(self, plan: StepPlan, error: BaseException) -> None:
        """End the requests of a failed step. Other requests continue."""
        request_ids = list(dict.fromkeys(plan.request_ids))
        shown = ", ".join(map(repr, request_ids[:3])) + (", ..." if len(request_ids) > 3 else "")
        logger.error("step failed for requests %s: %r", shown, error, exc_info=error)
        with self._lock:
            for request_id in self.scheduler.abort(plan):
                if request_id in self.requests:
                    self.requests[request_id].error = error
                self._end(request_id, Reason.FAILED)
            if self._fetching is not None:
                self._fetching.note_failed_step(plan)

    def _record(self, plan: StepPlan, seconds: float) -> None:
        self._busy_seconds += seconds
        if self._on_step is None:
            return
        with self._lock:
            stats = self.stats()
        try:
            self._on_step(StepRecord(len(plan), len(plan.token_ids), seconds, stats))
        except BaseException:  # a defect of the callback must not end requests
            logger.exception("on_step raised an exception and is disabled")
            self._on_step = None

    def _log_preemptions(self) -> None:
        """Log new preemptions, at INFO at most every 10 seconds and otherwise at DEBUG."""
        if not self.scheduler.num_preempted:
            return
        counts = self.scheduler.stats()
        swaps, recomputes = counts.total_preempted_by_swap, counts.total_preempted_by_recompute
        if swaps + recomputes == self._num_preempted:
            return
        self._num_preempted = swaps + recomputes
        now, level = time.monotonic(), logging.DEBUG
        if self._logged is None or now - self._logged >= _LOG_EVERY_S:
            self._logged, level = now, logging.INFO
        logger.log(
            level,
            "KV cache is full: %d preemptions by swap and %d by recompute so far; %d requests "
            "run, %d wait. Raise memory= to avoid preemption.",
            *(swaps, recomputes, counts.num_running, counts.num_waiting + counts.num_preempted),
        )


def _hand_out(news: list[tuple[Channel, list[Token]]]) -> None:
    for channel, arrived in news:
        with listener_errors_logged():
            channel.put(arrived)
