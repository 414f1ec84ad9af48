"""The life of a continuous batching manager: sessions, each with an engine of its own."""

from __future__ import annotations

import logging
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers.generation.continuous_batching import ContinuousBatchingManager

from kvpager.engine.processes import Process
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.options import read_options
from kvpager.integrations.huggingface.continuous_batching.outputs import Job, Router
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.model_info import study
from kvpager.integrations.huggingface.runner.unwrap import refuse_spread

logger = logging.getLogger("kvpager")


class Status:
    """How far a session's end has come. Changed under the lock of the manager's router."""

    DONT_STOP, FLUSH_AND_STOP, HARD_STOP, STOPPED = range(4)

    def __init__(self) -> None:
        self.local_status = self.DONT_STOP
        self.engine: Engine | None = None  # of the session, or of the last one

    @property
    def fatal_error(self) -> BaseException | None:
        """What stopped the session, other than `stop`."""
        return None if self.engine is None else self.engine.error

    def can_accept_new_requests(self) -> str | None:
        """Why requests are turned away; None where they are not. O(1)."""
        if self.fatal_error is not None:
            return f"the engine stopped: {self.fatal_error!r}"
        if self.local_status != self.DONT_STOP:
            return "the manager is stopping, or has stopped"
        return None


class Sessions(ContinuousBatchingManager):
    """The part of a `PagedBatchingManager` that starts and stops; that documents the arguments."""

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any,
        memory: PagedMemory,
        may_be_kept: Callable[[], bool],
    ) -> None:
        self.model: Any = model
        self.generation_config = generation_config
        self.continuous_batching_config = continuous_batching_config
        self.is_tp_driver = True
        self.warmed_up = False
        self.background_thread_status: Any = Status()
        self.output_router: Any = Router()
        self.batch_processor: Any = None  # the session's `Engine`
        self._patched, self._may_be_kept = memory, may_be_kept
        self.process = Process("manager")
        refuse_spread(model)
        self._anatomy = study(model)
        self._refuse_placement()
        self.hint(workload_hints)
        self._changed: threading.Condition = self.output_router.changed
        self._control = threading.Lock()  # of those who make a session
        self._jobs: dict[str, Job] = {}  # by all their names
        self._generation_thread: Any = None
        self._is_serving = False
        self._is_destroyed = False
        self.ends_with_call = False  # of `generate_batch`, whose caller has no other access

    def _refuse_placement(self) -> None:
        name, wanted = type(self.model).__name__, self._patched.dtype
        if wanted is not None and wanted != self._anatomy.dtype:
            raise KVPagerError(
                f"{name} keeps keys and values in {self._anatomy.dtype}, and the patch was made "
                f"for {wanted}"
            )

    def hint(self, workload_hints: Any) -> None:
        """What is to come in the next session, for the size of its pool. O(options)."""
        self._options = read_options(
            self.continuous_batching_config,
            self.generation_config,
            self._anatomy,
            self._patched,
            workload_hints,
        )

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing to do: an engine chooses the attention for its session."""

    def warmup(self) -> None:
        """Make the engine of the next session. A few short forward passes.

        Raises: `KVPagerError` for a model that cannot be batched; `EngineClosed` in a fork.
        """
        self.process.refuse_fork()
        with self._control:
            self._warm()

    def _warm(self) -> Engine:
        """Return the engine of the next session, which is made once. Under `_control`."""
        if self._is_destroyed:
            raise RuntimeError("this manager was destroyed; make a new one")
        if self.batch_processor is None:
            options = self._options.engine
            self.batch_processor = Engine(
                self.model, max_waiting=self._options.max_waiting, **options
            )
        self.warmed_up = True
        engine: Engine = self.batch_processor
        return engine

    def is_running(self) -> bool:
        """True if there is a session, in this process. O(1)."""
        return self._is_serving and self.process.is_current

    def start(self) -> None:
        """Begin a session: serve requests, those first that were added before.

        An interrupt ends the session again. Raises: as `warmup`.
        """
        self.process.refuse_fork()
        has_begun = False
        try:
            with self._control:  # of several threads that start, one does
                if self.is_running():
                    logger.warning("this manager is running already")
                    return
                engine = self._warm()
                has_begun = True
                self._begin(engine)
            self._queue_held()
        except BaseException:
            if has_begun:
                self.end_now()
            raise

    def _begin(self, engine: Engine) -> None:
        thread = threading.Thread(
            target=self._serve, args=(engine,), name="kvpager-batching", daemon=True
        )
        with self._changed:
            thread.start()  # it waits for this lock first
            self._status.local_status, self._status.engine = Status.DONT_STOP, engine
            self._generation_thread, self._is_serving = thread, True
        self._patched.note_session(sessions=1)

    def _serve(self, engine: Engine) -> None:
        """Keep the engine until the session may end."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._may_end(engine))
            engine.close()
            self.note_doubt()
        finally:
            with self._changed:
                self._status.local_status = Status.STOPPED
                self._is_serving, self.batch_processor = False, None
                self._changed.notify_all()

    def note_doubt(self) -> None:
        """Let the report say why the session shares no prompts, if it shares none. O(blocks)."""
        engine = self._status.engine
        doubt = None if engine is None else engine.stats().unshared
        if doubt is not None:
            self._patched.session_doubts.add(doubt)

    def _may_end(self, engine: Engine) -> bool:
        status = self._status.local_status
        is_flushed = status == Status.FLUSH_AND_STOP and not self._jobs
        return is_flushed or status == Status.HARD_STOP or engine.error is not None

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the session when its requests are done, or at once if `hard_stop`: they fail then.

        Waits for that if `block`, for `timeout` seconds at the most. Outputs that nobody has taken
        can still be. Does nothing in a fork.

        Raises: `RuntimeError` inside a `pause` of this thread.
        """
        if not self.process.is_current:
            return
        if self._generation_thread is None:
            logger.warning("this manager was not started, so there is nothing to stop")
            return
        engine = self.batch_processor
        if engine is not None and engine.is_paused_here:
            raise RuntimeError("stop inside pause would wait for ever; leave the pause first")
        with self._changed:
            wanted = Status.HARD_STOP if hard_stop else Status.FLUSH_AND_STOP
            self._status.local_status = max(wanted, self._status.local_status)
            self._changed.notify_all()
        if block:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session and self._may_be_kept():
            self.model._cached_continuous_batching_manager = self

    def end_now(self) -> None:
        """End the session after the step under way, without waiting for that. O(1)."""
        with self._changed:
            if self._is_serving:
                self._status.local_status = Status.HARD_STOP
                self._changed.notify_all()

    def end_if_abandoned(self) -> None:
        """End the session of a `generate_batch` that an interrupt has cut short. O(1)."""
        if self.ends_with_call and not isinstance(sys.exception(), Exception):
            self.end_now()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait for the session's end, for `timeout` seconds at the most; not in a fork."""
        thread = self._generation_thread
        if thread is None or not self.process.is_current:
            return
        with self._changed:
            # Not `Thread.join`: an interrupt of it can make a thread that runs pass for ended.
            has_ended = self._changed.wait_for(
                lambda: not self._is_serving or self._generation_thread is not thread, timeout
            )
        if not has_ended:
            logger.warning("the session has not ended after %s s", timeout)
        else:
            thread.join()  # it has nothing left to do
            seconds = time.perf_counter() - stop_trigger_time
            logger.info("the session ended after %.2f s", seconds)
            if self._generation_thread is thread:
                self._generation_thread = None

    def destroy(self) -> None:
        """End the session, for good. Idempotent. Does nothing in a fork. Raises: as `stop`."""
        if not self.process.is_current:
            return
        if self.is_running():
            self.stop()
        with self._control:
            self._is_destroyed = True
            engine, self.batch_processor = self.batch_processor, None
            if engine is not None:  # warmed up, and never started
                engine.close()
        self._fail_held()

    def pause(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """No step is computed inside, in whatever thread; requests go on afterwards.

        To change the model's weights, say: cached prompts are given up. Raises: `RuntimeError`
        without a session; `EngineClosed` in a fork.
        """
        self.process.refuse_fork()
        engine = self.batch_processor
        if not self.is_running() or engine is None:
            raise RuntimeError("there is no session to pause; start the manager first")
        pause: AbstractContextManager[None] = engine.pause()
        return pause

    @property
    def _status(self) -> Status:
        status: Status = self.background_thread_status
        return status

    # ---------------------------------------------------------------- requests of before

    @abstractmethod
    def _queue_held(self) -> None:
        """A session has begun: hand the requests over that were added before."""

    @abstractmethod
    def _fail_held(self) -> None:
        """There will be no session: end the requests that were added before."""
