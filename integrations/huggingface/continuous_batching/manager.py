"""transformers' continuous batching manager: sessions, each with an engine of its own."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from kvpager.engine.processes import Process
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.options import Options, read_options
from kvpager.integrations.huggingface.continuous_batching.outputs import Handler, Job, Router
from kvpager.integrations.huggingface.continuous_batching.requests import Requests, Status
from kvpager.integrations.huggingface.continuous_batching.sampling import (
    RequestOverrides,
    SettingsFactory,
)
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.integrations.huggingface.runner.unwrap import refuse_sharded

logger = logging.getLogger("kvpager")

_PATIENCE = 10.0  # seconds that `add_request` waits for room in the queue, as transformers does


class PagedBatchingManager(ContinuousBatchingManager):
    """Serves requests through transformers' interface. Made by `init_continuous_batching`.

    From `start` to the end of `stop` there is an engine: a session. A request that cannot be
    served, or fails, or is cancelled, has an output of status FAILED that says why.

    Args:
        model: to be served.
        generation_config: settings of all requests; those that it leaves open are off.
        continuous_batching_config: see `options.py`.
        workload_hints: what is to come, where that is known.
        memory: of the patch, whose options hold where the config says nothing.
        namespace: says whose prompts a request made now may share.
        may_be_kept: says whether the model may keep the manager for another session.

    Thread-safe; in a fork, calls raise `EngineClosed`, but for those that end it. Raises:
    `KVPagerError` for a model that cannot be batched; `ValueError` for
    settings that cannot.
    """

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any = None,
        *,
        memory: PagedMemory,
        namespace: Callable[[], str | None],
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
        refuse_sharded(model)
        self._info = inspect_model(model)
        self._refuse_placement()
        self._options = self._read_options(workload_hints)
        self._requests = Requests(
            self.output_router,
            self._status,
            SettingsFactory(
                model, generation_config, self._info, per_request=self._options.per_request
            ),
            self._options,
            memory,
            namespace,
            generation_config.num_return_sequences or 1,
        )
        self._changed: threading.Condition = self.output_router.changed
        self._control = threading.Lock()  # of those who make a session
        self._generation_thread: Any = None
        self._is_destroyed = False
        self.ends_with_call = False  # of `generate_batch`, whose caller has no other access

    def _refuse_placement(self) -> None:
        name, wanted = type(self.model).__name__, self._patched.dtype
        if wanted is not None and wanted != self._info.dtype:
            raise KVPagerError(
                f"{name} keeps keys and values in {self._info.dtype}, and the patch was made "
                f"for {wanted}"
            )

    def hint(self, workload_hints: Any) -> None:
        """Note what is to come in the next session, for the size of its pool. O(options)."""
        self._options = self._requests.options = self._read_options(workload_hints)

    def _read_options(self, workload_hints: Any) -> Options:
        return read_options(
            self.continuous_batching_config,
            self.generation_config,
            self._info,
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
                self.model, max_queue_size=self._options.max_queue_size, **options
            )
        self.warmed_up = True
        engine: Engine = self.batch_processor
        return engine

    def is_running(self) -> bool:
        """True if there is a session, in this process. O(1)."""
        return self._status.is_serving and self.process.is_current

    def start(self) -> None:
        """Begin a session: serve requests, those first that were added before.

        An interrupt ends the session again.
        Raises: as `warmup`; `ValueError` for a quota of the patch that is less than a block.
        """
        self.process.refuse_fork()
        has_begun = False
        try:
            with self._control:  # of several threads that start, one does
                if self.is_running():
                    logger.warning("this manager is running already")
                    return
                engine = self._warm()
                engine.quotas.update(self._patched.quotas)
                has_begun = True
                self._begin(engine)
            self._requests.queue_pending()
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
            self._generation_thread, self._status.is_serving = thread, True
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
                self._status.is_serving, self.batch_processor = False, None
                self._changed.notify_all()

    def note_doubt(self) -> None:
        """Let the report say why the session shares no prompts, if it shares none. O(blocks)."""
        engine = self._status.engine
        doubt = None if engine is None else engine.stats().unshared
        if doubt is not None:
            self._patched.session_doubts.add(doubt)

    def _may_end(self, engine: Engine) -> bool:
        status = self._status.local_status
        is_flushed = status == Status.FLUSH_AND_STOP and not self._requests.jobs
        return is_flushed or status == Status.HARD_STOP or engine.error is not None

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the session when its requests are done, or at once if `hard_stop`: they fail then.

        With `block`, waits for the end, for at most `timeout` seconds. Outputs that were not taken
        stay available. Does nothing in a fork.

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
            if self._status.is_serving:
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
                lambda: not self._status.is_serving or self._generation_thread is not thread,
                timeout,
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
        self._requests.fail_pending()

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

    # ---------------------------------------------------------------- requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Add a request; it waits for `start`. Its name, or None where none is taken. O(tokens).

        Raises: `ValueError` for a name that is in use; `queue.Full` where `max_queue_size` requests
        still wait after ten seconds.
        """
        wanted = RequestOverrides(max_new_tokens, eos_token_id, logit_processor_kwargs)
        jobs: list[Job] = []
        try:
            self._add(jobs, input_ids, request_id, wanted, streaming, record_timestamps, _PATIENCE)
        except BaseException:
            self._requests.take_back(jobs)
            raise
        return jobs[0].names[0] if jobs else None

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Add requests, waiting for room in the queue. Their names. O(tokens).

        An error, or an interrupt, takes all of them back: the caller has no names.
        """
        wanted = RequestOverrides(max_new_tokens, None, logit_processor_kwargs)
        jobs: list[Job] = []
        try:
            for ids in inputs:
                self._add(jobs, ids, None, wanted, streaming, record_timestamps, None)
        except BaseException:
            self._requests.take_back(jobs)
            self.end_if_abandoned()
            raise
        return [job.names[0] for job in jobs]

    def _add(self, jobs: list[Job], *asked: Any) -> None:
        self.process.refuse_fork()
        self._requests.add(jobs, *asked)

    def cancel_request(self, request_id: str) -> None:
        """End a request, with all its samples; does nothing for one that has ended. O(1)."""
        self.process.refuse_fork()
        self._requests.cancel(request_id)

    # ---------------------------------------------------------------- outputs

    def get_result(
        self, request_id: str | None = None, timeout: float | None = None
    ) -> GenerationOutput | None:
        """The next output, of any request or of one; None after `timeout` seconds, or where none
        can come: there is no session, or no such request."""
        self.process.refuse_fork()
        found: list[GenerationOutput] = []

        def is_settled() -> bool:
            output = self.output_router.take(request_id)
            if output is not None:
                found.append(output)
                return True
            is_live = request_id is None or request_id in self._requests.jobs
            return not (self._status.is_serving and is_live)

        try:
            with self._changed:
                self._changed.wait_for(is_settled, timeout)
        except BaseException:
            for output in found:
                self.output_router.put_back(output)
            self.end_if_abandoned()
            raise
        return found[0] if found else None

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Outputs as they come, until the session has ended and none is left."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Generator[GenerationOutput]:
        """The outputs of a request as they come, the last of them finished."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Handler) -> None:
        """Call `callback` with the request's outputs, on the event loop that runs here. Outputs
        that wait already are handed over first."""
        self.process.refuse_fork()
        self.output_router.register(request_id, callback)
