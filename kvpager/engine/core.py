"""An engine for any runner. Serves requests of token ids on its own thread.

with EngineCore(scheduler, runner, sampler) as core:
    request = Request(request_id="a", prompt=ids, max_new_tokens=100)
    for token in core.submit(request, RequestSettings(stop_ids=frozenset({2}))):
        print(token.id)
"""

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

from kvpager._atomic import Uninterrupted
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.engine.detokenizer import Detokenizer
from kvpager.engine.fetching import Fetching
from kvpager.engine.kv_events import publish
from kvpager.engine.loop import Loop
from kvpager.engine.metrics import EngineStats, StepRecord
from kvpager.engine.model_watch import ModelGuard, ModelWatch
from kvpager.engine.pauses import Pause, Pauses
from kvpager.engine.processes import Process
from kvpager.engine.quotas import LiveQuotas
from kvpager.engine.recording import Record, record_engine
from kvpager.engine.request_state import RequestSettings, TrackedRequest
from kvpager.engine.runner import Runner, Sampler
from kvpager.engine.stream import Channel, Dispatcher, Output, Stream
from kvpager.engine.threads import end_idle_workers
from kvpager.engine.tiers import EngineTiers
from kvpager.errors import EngineClosed
from kvpager.kv_events.settings import KVEvents
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.tiers.controls import TierControls
from kvpager.storage.tiers.tiering import Tiering

logger = logging.getLogger("kvpager")

# At exit Python stops daemon threads anywhere, and C++ code does not survive that.
_open_engines: weakref.WeakSet[EngineCore] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for core in list(_open_engines):
        core.close()


# Maximum sleep while requests live but nothing is computed: a deadline may pass.
_WAIT_S_MAX = 0.05


class EngineCore:
    """Runs a scheduler, a runner and a sampler on a thread of its own.

    Thread-safe. The thread keeps the engine alive, so close the engine after use.

    Args:
        scheduler: no other code may call it.
        runner: computes the plans of the scheduler.
        sampler: chooses tokens from logits.
        tokenizer: decodes replies; a result of `text_tokenizer` in `kvpager.engine.detokenizer`,
            or None.
        watch: reports changes of the model; None if requests share no prefixes.
        tiering: moves cached blocks to tiers below the device and back; None without tiers. The
            engine closes it.
        save_wait_s: how long the end of a request waits until tiers have its prompt, in seconds.
            None saves blocks later.
        kv_events: where to publish which blocks are cached, for routers; None for nowhere. The
            manager must log events.
        record: the file to record steps in, and what to call them; None for none.
        on_step: callback invoked after every step, on the engine's thread.
        on_begin: callback invoked at the start of the engine's thread.
        on_end: callback invoked at the end of the engine's thread.

    Attributes:
        quotas: the maximum blocks of each namespace.
        tiers: what callers may ask of the tiers; None without tiers.
        kv_events: the publisher; None without `kv_events`.
        error: the defect that stopped the engine, or None.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        *,
        tokenizer: Any = None,
        watch: ModelWatch | None = None,
        tiering: Tiering | None = None,
        save_wait_s: float | None = None,
        kv_events: KVEvents | None = None,
        record: Record | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        on_begin: Callable[[], object] = lambda: None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.process = Process("engine")
        self.error: BaseException | None = None
        self._tokenizer = tokenizer
        self._on_begin, self._on_end = on_begin, on_end
        self._is_open = True
        self._lock = threading.RLock()  # guards the scheduler and the requests
        # Finalisers cancel requests too, and may run inside any call: they must not take locks.
        self._inbox: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._dispatcher = Dispatcher()
        self._pauses = Pauses(self.process, self.clear_prefix_cache, self._dispatcher.post)
        guard = None if watch is None else ModelGuard(watch, scheduler, self._lock)
        self._fetching = self.tiers = None
        if tiering is not None:
            wake = partial(self._inbox.put, None)
            self._fetching = Fetching(scheduler, tiering, self._lock, guard, wake, save_wait_s)
            owner = EngineTiers(tiering, self._fetching, self._locked, self.refuse_closed)
            self.tiers = TierControls(owner)
        parts = scheduler, runner, sampler, self._dispatcher, self._lock
        self._loop = Loop(*parts, guard, self._fetching, on_step)
        quotas = LiveQuotas(scheduler, self._loop.requests)
        self.quotas = NamespaceQuotas(lambda: [(quotas, runner.block_bytes)], self._locked)
        self._thread = threading.Thread(target=self._run, name="kvpager-engine", daemon=True)
        self.kv_events: Any = None  # `Publisher` needs the extra `events`
        try:
            self._start(kv_events, record, tiering)
        except BaseException:
            self.stop()
            self._close_outputs()
            raise

    def _start(
        self, kv_events: KVEvents | None, record: Record | None, tiering: Tiering | None
    ) -> None:
        if kv_events is not None:
            self.kv_events = publish(self.scheduler, kv_events, tiering)
        if record is not None:
            parts = self.scheduler, self.runner, self._fetching
            self._loop.recorder = record_engine(*parts, record)
        with self._lock, Uninterrupted(self._lock):
            self._thread.start()
            _open_engines.add(self)

    @property
    def is_open(self) -> bool:
        """True while the engine accepts requests. O(1)."""
        return self._is_open and self.process.is_current

    @property
    def block_bytes(self) -> int:
        """The bytes of a block. O(1)."""
        return self.runner.block_bytes

    @property
    def between_steps(self) -> list[Callable[[], None]]:
        """Functions that the engine's thread calls before each step; see `Loop`."""
        return self._loop.between_steps

    def submit(
        self, request: Request, settings: RequestSettings, prompt: list[int] | None = None
    ) -> Stream:
        """Queue a request. O(tokens).

        Args:
            request: the request. Its deadline is on the clock of `time.monotonic`.
            settings: how to choose its tokens, and when to stop.
            prompt: token ids that the runner gets as the prompt, such as the input of an encoder.
                None passes `request.prompt`.

        Raises: `EngineClosed`; otherwise as `Scheduler.submit`.
        """
        ids, tokenizer = request.prompt.tolist(), self._tokenizer
        shown = ids if prompt is None else prompt
        output = Output(request.request_id, shown, [], arrival_time=time.monotonic())
        tracked = TrackedRequest(Channel(output), request, settings, ids, tokenizer)
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        # The stream exists before the request: if an interrupt drops it, it cancels the request.
        stream = Stream(tracked.channel, self._cancel, n=request.n, detokenizer=detokenizer)
        with self._locked():
            self.refuse_closed()
            self._loop.submit(request, tracked)
        self._inbox.put(None)
        self._end_idle_workers()
        return stream

    def cancel(self, request_id: Hashable) -> None:
        """Cancel a request, unless it has ended. O(1). Raises: `EngineClosed`."""
        with self._locked():
            tracked = self._loop.requests.get(request_id)
        if tracked is not None:
            self._cancel(tracked.channel)

    def _cancel(self, channel: Channel) -> None:
        """Cancel the request of a channel soon. O(1); safe in a finaliser."""
        if self.process.is_current:
            self._inbox.put(channel)

    # Not a generator: the traceback of an interrupt would keep the generator alive, with the lock
    # held.
    def _locked(self) -> AbstractContextManager[Any]:
        """Return the lock. Raises: `EngineClosed` in a fork, where the lock may never be free."""
        self.process.refuse_fork()
        return self._lock

    def refuse_closed(self) -> None:
        """Raise `EngineClosed` if the engine accepts no more requests."""
        self.process.refuse_fork()
        if not self.is_open:
            why = "" if self.error is None else f" after {self.error!r}"
            raise EngineClosed(f"the engine is closed{why}. Make a new one.") from self.error

    def stats(self) -> EngineStats:
        """Return current counts. O(blocks + sequences). Raises: `EngineClosed` in a fork."""
        with self._locked():
            return self._loop.stats()

    def clear_prefix_cache(self) -> None:
        """Drop cached prompts. O(cached blocks). Raises: `EngineClosed` in a fork."""
        with self._locked():
            self.scheduler.clear_prefix_cache()

    def pause(self) -> Pause:
        """Return a context manager that holds all steps. Its end drops cached prefixes."""
        return Pause(self._pauses)

    @property
    def is_paused_here(self) -> bool:
        """True inside a pause of the current thread. O(pauses)."""
        return self._pauses.is_mine

    def stop(self) -> None:
        """Ask the thread to end soon. O(1); safe in a finaliser, and in a fork."""
        if self.process.is_current:
            self._is_open = False
            self._inbox.put(None)

    def close(self) -> None:
        """Cancel all requests and end the thread. Idempotent. Does nothing in a fork."""
        if not self.process.is_current:
            return
        with self._lock:
            self.stop()
        self._pauses.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> EngineCore:
        self.refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        self._on_begin()
        self._dispatcher.start()
        try:
            while self._may_step():
                with self._pauses.step():
                    is_idle = not self._pauses.is_any and not self._loop.step()
                self._read_inbox(wait=is_idle)
        except BaseException as error:  # a defect of kvpager: callers must not wait forever
            logger.exception("the engine stopped")
            self.error = error
        with self._lock:
            self._is_open = False
            self._loop.end_all(self.error)
        if self._fetching is not None:
            try:
                saving = self.error is None
                self._fetching.close(saving=saving, run_plan=self._loop.run_transfers)
            except Exception:
                logger.exception("a tier failed to close")
        self._close_outputs()
        self._dispatcher.close()
        self._on_end()

    def _close_outputs(self) -> None:
        if self._loop.recorder is not None:
            self._loop.recorder.close()
        if self.kv_events is not None:
            self.kv_events.close()

    def _may_step(self) -> bool:
        self._pauses.wait(lambda: not self.is_open)
        return self.is_open

    def _read_inbox(self, *, wait: bool) -> None:
        """Carry out cancellations. With `wait`, wait for the next request or cancellation."""
        while True:
            if wait:
                self._end_idle_workers()
            try:
                channel = self._inbox.get(wait, self._wait_s() if wait else None)
            except queue.Empty:
                return
            wait = False
            if channel is not None:
                with self._lock:
                    self._loop.cancel(channel)

    def _wait_s(self) -> float | None:
        with self._lock:
            is_waiting = self._fetching is not None and self._fetching.is_waiting
            return _WAIT_S_MAX if self.scheduler.has_work or is_waiting else None

    def _end_idle_workers(self) -> None:
        if self.runner.device_type == "cpu":
            end_idle_workers()
