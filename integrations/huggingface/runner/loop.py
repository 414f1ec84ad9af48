"""The thread of an engine: plans a step, has it computed, chooses tokens, hands them out."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch

from kvpager._atomic import Condition
from kvpager.engine.metrics import EngineStats, StepRecord
from kvpager.engine.processes import Process
from kvpager.engine.stream import (
    Channel,
    Dispatcher,
    Token,
    listener_errors_logged,
)
from kvpager.engine.threads import end_idle_workers
from kvpager.errors import EngineClosed, KVPagerError
from kvpager.integrations.huggingface.model_state.fingerprint import ModelState, ModelWatch
from kvpager.integrations.huggingface.runner.pauses import Pause
from kvpager.integrations.huggingface.runner.request_state import Live, Tracked
from kvpager.integrations.huggingface.runner.runner import Runner
from kvpager.integrations.huggingface.runner.sampling import Draw, Row, choose
from kvpager.plans import Reason, StepPlan
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler

logger = logging.getLogger("kvpager")

# Python ends threads like this one wherever they are when it exits, which C++ does not survive.
_open: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loop in list(_open):
        loop.close()


# How long to sleep while requests live and there is nothing to compute: a deadline may pass.
_PATIENCE_S = 0.05

_LOG_EVERY_S = 10.0  # preemptions, in INFO


class Loop:
    """Steps of a scheduler, one after the other, on a thread of its own.

    Args:
        scheduler: nobody else may call it.
        runner: computes its plans.
        on_step: is told of every step, on this thread.
        on_end: what is left to do when the thread ends.
        watch: tells whether the model is still the same; None where nothing is shared anyway.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        on_step: Callable[[StepRecord], None] | None,
        on_end: Callable[[], None],
        watch: ModelWatch | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._is_open = True
        self.process = Process("engine")
        self.error: BaseException | None = None  # what stopped the thread, a defect
        self._lock = threading.RLock()  # over the scheduler and what is tracked
        self._tracked: dict[Hashable, Tracked] = {}
        self._live: dict[int, Live] = {}  # by the scheduler's number of the sample
        # Cancellations come from finalisers as well, which may run inside any call.
        self._inbox: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._dispatcher = Dispatcher()
        self._unpaused = Condition()
        self._pauses: dict[object, threading.Thread] = {}  # and who is in each
        self._between_steps = threading.Lock()
        self._watch = watch
        self._state: ModelState | None = None  # of the model, at the last look
        self._num_changes = 0
        self._on_step = on_step
        self._on_end = on_end
        self._busy_seconds = 0.0
        self._num_preempted = 0
        self._logged: float | None = None  # when preemptions were, in INFO
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="kvpager-engine", daemon=True)

    # ---------------------------------------------------------------- for other threads

    @property
    def is_open(self) -> bool:
        """True while requests are taken. O(1)."""
        return self._is_open and self.process.is_current

    def start(self) -> None:
        """Begin. O(1)."""
        _open.add(self)
        self._thread.start()

    def submit(self, request: Request, tracked: Tracked) -> None:
        """Queue a request. O(tokens). Raises: `EngineClosed`, and as `Scheduler.submit`."""
        with self._locked():
            self.refuse_closed()
            if request.name in self._tracked:
                raise ValueError(f"request {request.name!r}: the name is in use; choose another")
            # First this: an interruption must not leave a request that nobody knows of.
            self._tracked[request.name] = tracked
            try:
                self.scheduler.submit(request)
            except BaseException:
                del self._tracked[request.name]
                self.scheduler.cancel(request.name)
                raise
        self._inbox.put(None)

    def cancel(self, channel: Channel) -> None:
        """End the request whose channel this is, soon. O(1); safe in a finaliser."""
        if self.process.is_current:
            self._inbox.put(channel)

    def channel(self, name: Hashable) -> Channel | None:
        """Return that of a live request. O(1). Raises: `EngineClosed` in a fork."""
        with self._locked():
            tracked = self._tracked.get(name)
        return None if tracked is None else tracked.channel

    # Not a generator: an interrupt's traceback would keep it, and the lock with it.
    def _locked(self) -> AbstractContextManager[Any]:
        """Return the lock. Raises: `EngineClosed` in a fork, whose copy may be held for ever."""
        self.process.refuse_fork()
        return self._lock

    def refuse_closed(self) -> None:
        """Raise `EngineClosed` if no request is taken any more."""
        self.process.refuse_fork()
        if not self.is_open:
            why = "" if self.error is None else f" after {self.error!r}"
            raise EngineClosed(f"this engine is closed{why}; make a new one") from self.error

    def stats(self) -> EngineStats:
        """Return counts of now. O(blocks + sequences). Raises: `EngineClosed` in a fork."""
        with self._locked():
            pool = self.scheduler.manager.stats()
            unshared = None if self._state is None else self._state.doubt
            counts = self.scheduler.stats()
            return EngineStats(counts, pool, self._busy_seconds, self._num_changes, unshared)

    def clear(self) -> None:
        """Give cached prompts up. O(cached blocks). Raises: `EngineClosed` in a fork."""
        with self._locked():
            self.scheduler.forget_prefixes()

    def pause(self) -> Pause:
        """Return a `with` block inside which no step is computed. O(1)."""
        return Pause(self)

    @property
    def is_paused_here(self) -> bool:
        """True inside a pause of the current thread. O(pauses)."""
        with self._unpaused:
            return threading.current_thread() in self._pauses.values()

    def begin_pause(self, pause: object) -> None:
        """Hold steps; the one under way ends first. Raises: as `Pause`."""
        self.process.refuse_fork()
        if threading.current_thread() is self._thread:
            raise KVPagerError("pause: this is the engine's own thread, within a step")
        with self._unpaused:
            self._pauses[pause] = threading.current_thread()
        with self._between_steps:
            pass

    def end_pause(self, pause: object) -> None:
        """Give cached prompts up, and let steps go on. Idempotent. Does nothing in a fork."""
        if self.process.is_current and pause in self._pauses:
            try:
                self.clear()
            finally:
                with self._unpaused:
                    self._pauses.pop(pause, None)
                    self._unpaused.notify_all()

    def drop_pause(self, pause: object) -> None:
        """Have a pause end soon. O(1); safe in a finaliser, and in a fork."""
        if self.process.is_current and pause in self._pauses:
            self._dispatcher.post(partial(self.end_pause, pause))

    def stop(self) -> None:
        """Have the thread end soon. O(1); safe in a finaliser, and in a fork."""
        if self.process.is_current:
            self._is_open = False
            self._inbox.put(None)

    def close(self) -> None:
        """End all requests and the thread. Idempotent. Does nothing in a fork."""
        if not self.process.is_current:
            return
        with self._lock:
            self.stop()
        with self._unpaused:
            self._unpaused.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # a new thread begins with one of its own
        self._dispatcher.start()
        try:
            while self._may_step():
                with self._between_steps:
                    is_idle = not self._pauses and not self._step()
                self._read_inbox(wait=is_idle)
        except BaseException as error:  # a defect of ours: nobody shall wait for ever
            logger.exception("the engine stopped")
            self.error = error
        with self._lock:
            self._is_open = False
            for name, tracked in self._tracked.items():
                tracked.error = self.error
                how = "was not done when the engine was closed"
                self._dispatcher.post(tracked.ending(Reason.CANCELLED, how))
                if self.error is None:
                    self.scheduler.cancel(name)
            self._tracked.clear()
        self._dispatcher.close()
        self._on_end()

    def _may_step(self) -> bool:
        with self._unpaused:
            self._unpaused.wait_for(lambda: not self._pauses or not self.is_open)
        return self.is_open

    def _read_inbox(self, *, wait: bool) -> None:
        """Act on cancellations; where there is nothing to compute, wait until something arrives."""
        while True:
            if wait:
                self._rest()
            try:
                channel = self._inbox.get(wait, self._patience() if wait else None)
            except queue.Empty:
                return
            wait = False
            if channel is None:
                continue
            with self._lock:
                name = channel.output.name
                tracked = self._tracked.get(name)
                # It may have ended by now, and another have its name.
                if tracked is not None and tracked.channel is channel:
                    self.scheduler.cancel(name)

    def _rest(self) -> None:
        if self.runner.anatomy.device.type == "cpu":
            end_idle_workers()

    def _patience(self) -> float | None:
        with self._lock:
            return _PATIENCE_S if self.scheduler.has_work else None

    def _step(self) -> bool:
        """Compute the scheduler's next step; whether there was anything to do."""
        with self._lock:
            if self._watch is not None:
                self._notice_change(self._watch)
            plan = self.scheduler.plan()
            if plan is None:
                return False
            for sample in plan.freed.tolist():
                self._live.pop(sample, None)
            for name, reason in plan.ended:
                self._end(name, reason)
            self._note_begun(plan)
            self._log_preemptions()
        began = time.perf_counter()
        try:
            logits = self.runner.run(plan, self._prompts(plan))
            draws = self._choose(plan, logits)
        except BaseException as error:  # of a hook of the caller's, SystemExit as well
            self._give_up(plan, error)
            return True
        if len(plan):
            self._go_on(plan, draws)
        self._note(plan, time.perf_counter() - began)
        return True

    def _note_begun(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for name in plan.names:
            output = self._tracked[name].channel.output
            if output.begun is None:
                output.begun = now

    def _prompts(self, plan: StepPlan) -> dict[int, list[int]]:
        """What an encoder reads for each sample."""
        if not self.runner.anatomy.is_encoder_decoder:
            return {}
        prompts = (self._tracked[name].channel.output.prompt for name in plan.names)
        return dict(zip(plan.samples.tolist(), prompts, strict=True))

    def _choose(self, plan: StepPlan, logits: torch.Tensor) -> list[Draw]:
        numbers = np.flatnonzero(plan.wants_logits).tolist()
        rows = [self._row(plan.names[i], int(plan.samples[i])) for i in numbers]
        with_logprobs = any(self._tracked[plan.names[i]].with_logprobs for i in numbers)
        return choose(logits, rows, with_logprobs=with_logprobs) if rows else []

    def _row(self, name: Hashable, sample: int) -> Row:
        tracked, live = self._tracked[name], self._live.get(sample)
        if live is None:
            return Row(tracked.choice, tracked.num_samples, tracked.generator, tracked.begin_ids)
        return Row(tracked.choice, 1, tracked.generator, live.ids)

    def _go_on(self, plan: StepPlan, draws: list[Draw]) -> None:
        """Hand the chosen tokens out and tell the scheduler who goes on with which."""
        parents: list[int] = []
        tokens: list[int] = []
        successors: list[Live] = []
        failed: list[Hashable] = []
        news: list[tuple[Channel, list[Token]]] = []
        now = time.monotonic()
        for row, draw in zip(np.flatnonzero(plan.wants_logits).tolist(), draws, strict=True):
            name, sample = plan.names[row], int(plan.samples[row])
            tracked = self._tracked[name]
            arrived, going_on = tracked.extend(self._live.get(sample), draw, now)
            news.append((tracked.channel, arrived))
            for live, token in going_on:
                parents.append(row)
                tokens.append(token)
                successors.append(live)
            if tracked.error is not None:
                failed.append(name)
        self._dispatcher.post(partial(_hand_out, news))
        with self._lock:
            samples = self.scheduler.complete(
                plan, np.array(parents, np.int64), np.array(tokens, np.int32)
            )
            for name in failed:
                self.scheduler.cancel(name)
        for row, sample, live in zip(parents, samples.tolist(), successors, strict=True):
            if sample < 0:  # it has ended by itself
                continue
            if sample != plan.samples[row]:
                self.runner.fork(int(plan.samples[row]), sample)
            self._live[sample] = live

    def _end(self, name: Hashable, reason: Reason) -> None:
        tracked = self._tracked.pop(name, None)
        if tracked is not None:
            self._dispatcher.post(tracked.ending(reason))

    def _notice_change(self, watch: ModelWatch) -> None:
        """Share nothing that another state of the model computed.

        Before a request begins, all of the model is looked at. While requests only go on, a part
        of it is, another one before each step.
        """
        begins = self.scheduler.num_waiting + self.scheduler.num_preempted
        if not begins + self.scheduler.num_running:
            return
        state = watch.look() if begins else watch.glance()
        before, self._state = self._state, state
        is_new = before is not None and before.version != state.version
        if state.doubt is not None and (before is None or before.doubt != state.doubt):
            logger.warning("requests share no prompts: %s", state.doubt)
        if is_new or state.doubt is not None:
            self._num_changes += is_new
            self.scheduler.forget_prefixes()

    def _log_preemptions(self) -> None:
        """Log requests that had to leave the device, in INFO once in a while, else in DEBUG."""
        if not self.scheduler.num_preempted:
            return
        counts = self.scheduler.stats()
        swaps, recomputes = counts.total_preempted_by_swap, counts.total_preempted_by_recompute
        if swaps + recomputes == self._num_preempted:
            return
        self._num_preempted = swaps + recomputes
        now = time.monotonic()
        is_due = self._logged is None or now - self._logged >= _LOG_EVERY_S
        logger.log(
            logging.INFO if is_due else logging.DEBUG,
            "KV cache is full: preempted %d times by swap, %d by recompute so far; %d requests "
            "run, %d wait. A larger memory= avoids it.",
            swaps,
            recomputes,
            counts.num_running,
            counts.num_waiting + counts.num_preempted,
        )
        self._logged = now if is_due else self._logged

    def _give_up(self, plan: StepPlan, error: BaseException) -> None:
        """The step failed, and with it the requests in it; the others go on."""
        names = list(dict.fromkeys(plan.names))
        shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        logger.error("a step failed, and requests %s: %r", shown, error, exc_info=error)
        with self._lock:
            for name in self.scheduler.abort(plan):
                if name in self._tracked:
                    self._tracked[name].error = error
                self._end(name, Reason.FAILED)

    def _note(self, plan: StepPlan, seconds: float) -> None:
        self._busy_seconds += seconds
        if self._on_step is None:
            return
        try:
            self._on_step(StepRecord(len(plan), len(plan.ids), seconds, self.stats()))
        except BaseException:  # the caller's: requests do not suffer for it
            logger.exception("on_step raised and is not called any more")
            self._on_step = None


def _hand_out(news: list[tuple[Channel, list[Token]]]) -> None:
    for channel, arrived in news:
        with listener_errors_logged():
            channel.put(arrived)
