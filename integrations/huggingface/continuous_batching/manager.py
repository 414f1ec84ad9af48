"""A continuous batching manager of transformers that runs an engine for each session."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from kvpager.engine.processes import Process
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.options import (
    RequestOverrides,
    SettingsFactory,
    engine_options,
)
from kvpager.integrations.huggingface.continuous_batching.outputs import Handler, Job, Router
from kvpager.integrations.huggingface.continuous_batching.requests import Requests, Status
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.integrations.huggingface.runner.wrappers import refuse_sharded

logger = logging.getLogger("kvpager")

_QUEUE_SECONDS_MAX = 10.0  # `add_request` waits this long for room in the queue, as in transformers


class PagedBatchingManager(ContinuousBatchingManager):
    """A server of requests with transformers' interface. `init_continuous_batching` makes it.

    A session lasts from `start` to the end of `stop` and has an engine. A request that is invalid,
    fails or is cancelled has an output of status FAILED with the reason.

    Args:
        model: the model to serve.
        generation_config: settings of all requests. Settings that it leaves open are off.
        continuous_batching_config: settings of the engine; see `options.py`.
        workload_hints: the expected requests, or None.
        patch: the patch that serves the model. Its options fill the gaps of the config.

    Thread-safe. In a fork, all calls but those that end the session raise `EngineClosed`.
    Raises: `KVPagerError` for a model that cannot be batched; `ValueError` for invalid settings.
    """

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any,
        patch: Any,
    ) -> None:
        self.model: Any = model
        self.generation_config = generation_config
        self.continuous_batching_config = continuous_batching_config
        self.is_tp_driver = True
        self.warmed_up = False
        self.background_thread_status: Any = Status()
        self._status: Status = self.background_thread_status
        self.output_router: Any = Router()
        self.batch_processor: Any = None  # the session's `Engine`
        self._patch = patch
        self._memory: PagedMemory = patch.memory
        self.process = Process("manager")
        refuse_sharded(model)
        self._info = inspect_model(model)
        wanted = self._memory.dtype
        if wanted is not None and wanted != self._info.dtype:
            raise KVPagerError(
                f"dtype={wanted} of the patch: {type(model).__name__} keeps keys and values in "
                f"{self._info.dtype}. Load the model in {wanted}, or leave dtype out."
            )
        self.hint(workload_hints)
        self._requests = Requests(
            self.output_router,
            self._status,
            SettingsFactory(
                model,
                generation_config,
                self._info,
                per_request=continuous_batching_config.per_request_processors,
            ),
            continuous_batching_config,
            self._memory,
        )
        self._changed: threading.Condition = self.output_router.changed
        self._control = threading.Lock()  # held by a thread that starts or destroys a session
        self._generation_thread: Any = None
        self._is_destroyed = False
        self.ends_with_call = False  # True in `generate_batch`, whose caller never sees the manager

    def hint(self, workload_hints: Any) -> None:
        """Set the expected requests of the next session, which size its pool. O(options)."""
        config, generation = self.continuous_batching_config, self.generation_config
        self._options = engine_options(config, generation, self._info, self._memory, workload_hints)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Do nothing: an engine chooses the attention for its session."""

    def warmup(self) -> None:
        """Make the engine of the next session. Runs a few short forward passes.

        Raises: `KVPagerError` for a model that cannot be batched; `EngineClosed` in a fork.
        """
        self.process.refuse_fork()
        with self._control:
            self._warm()

    def _warm(self) -> Engine:
        """Return the engine of the next session; make it once. The caller holds `_control`."""
        if self._is_destroyed:
            raise RuntimeError("this manager was destroyed. Make a new one.")
        if self.batch_processor is None:
            self.batch_processor = Engine(self.model, **self._options)
        self.warmed_up = True
        engine: Engine = self.batch_processor
        return engine

    def _cool(self) -> None:
        """Close an engine that no session uses. The caller holds `_control`."""
        engine, self.batch_processor = self.batch_processor, None
        if engine is not None:
            engine.close()

    def is_running(self) -> bool:
        """Return True if a session is running in this process. O(1)."""
        return self._status.is_serving and self.process.is_current

    def start(self) -> None:
        """Begin a session, and serve the requests that were added before.

        An interrupt ends the session.
        Raises: as `warmup`; `ValueError` if a quota of the patch is less than a block.
        """
        self.process.refuse_fork()
        has_begun = False
        try:
            with self._control:  # if several threads call this, one starts the session
                if self.is_running():
                    logger.warning("this manager is running already")
                    return
                try:
                    engine = self._warm()
                    engine.quotas.update(self._memory.quotas)
                except BaseException:
                    self._cool()
                    raise
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
            thread.start()  # the thread waits for this lock first
            self._status.local_status, self._status.engine = Status.DONT_STOP, engine
            self._generation_thread, self._status.is_serving = thread, True
        self._memory.note_session(sessions=1)

    def _serve(self, engine: Engine) -> None:
        """Wait until the session may end; then close the engine."""
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
        """Tell the report why the session shares no prompts, if so. O(blocks)."""
        engine = self._status.engine
        doubt = None if engine is None else engine.stats().unshared
        if doubt is not None:
            self._memory.session_doubts.add(doubt)

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
        """End the session when its requests are done.

        With `hard_stop`, ends it at once, and unfinished requests fail. With `block`, waits for the
        end for at most `timeout` seconds. Outputs stay available. Does nothing in a fork.

        Raises: `RuntimeError` inside a `pause` of this thread.
        """
        if not self.process.is_current:
            return
        if self._generation_thread is None:
            logger.warning("stop: this manager was not started")
            return
        engine = self.batch_processor
        if engine is not None and engine.is_paused_here:
            raise RuntimeError("stop() inside pause would never return. Leave the pause first.")
        # An interrupted `generate_batch` does not return its outputs.
        is_abandoned = self.ends_with_call and not isinstance(sys.exception(), Exception | None)
        with self._changed:
            wanted = Status.HARD_STOP if hard_stop or is_abandoned else Status.FLUSH_AND_STOP
            self._status.local_status = max(wanted, self._status.local_status)
            self._changed.notify_all()
        if block:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session and self._patch.is_active:
            self.model._cached_continuous_batching_manager = self

    def end_now(self) -> None:
        """End the session after the current step, without waiting for it. O(1)."""
        with self._changed:
            if self._status.is_serving:
                self._status.local_status = Status.HARD_STOP
                self._changed.notify_all()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait for the session's end, at most `timeout` seconds. Does nothing in a fork."""
        thread = self._generation_thread
        if thread is None or not self.process.is_current:
            return
        with self._changed:
            # Not `Thread.join`: if interrupted, it can take a running thread for an ended one.
            has_ended = self._changed.wait_for(
                lambda: not self._status.is_serving or self._generation_thread is not thread,
                timeout,
            )
        if not has_ended:
            logger.warning("the session has not ended after %s s", timeout)
        else:
            thread.join()  # returns at once
            seconds = time.perf_counter() - stop_trigger_time
            logger.info("the session ended after %.2f s", seconds)
            if self._generation_thread is thread:
                self._generation_thread = None

    def destroy(self) -> None:
        """End the session and allow no other. Idempotent. No effect in a fork. Raises as `stop`."""
        if not self.process.is_current:
            return
        if self.is_running():
            self.stop()
        with self._control:
            self._is_destroyed = True
            self._cool()
        self._requests.fail_pending()

    def pause(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Hold all steps inside the `with` block, and drop cached prompts afterwards.

        Use it to change the model's weights. Requests continue after the block.
        Raises: `RuntimeError` without a session; `EngineClosed` in a fork.
        """
        self.process.refuse_fork()
        engine = self.batch_processor
        if not self.is_running() or engine is None:
            raise RuntimeError("pause: no session is running. Call start() first.")
        pause: AbstractContextManager[None] = engine.pause()
        return pause

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
        """Add a request; before `start`, it waits. Return its id; None if stopped. O(tokens).

        Raises: `ValueError` for an id in use; `queue.Full` if `max_queue_size` requests still wait
        after ten seconds.
        """
        wanted = RequestOverrides(max_new_tokens, eos_token_id, logit_processor_kwargs)
        names = self._add(
            [(input_ids, request_id)], wanted, streaming, record_timestamps, _QUEUE_SECONDS_MAX
        )
        return names[0] if names else None

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Add requests, waiting for room in the queue. Return their ids. O(tokens).

        On an error or interrupt, removes all of them, because the caller does not get their ids.
        """
        wanted = RequestOverrides(max_new_tokens, None, logit_processor_kwargs)
        asked: list[tuple[Any, str | None]] = [(ids, None) for ids in inputs]
        return self._add(asked, wanted, streaming, record_timestamps, None)

    def _add(
        self,
        asked: list[tuple[Any, str | None]],
        wanted: RequestOverrides,
        is_streaming: bool,
        with_timestamps: bool,
        patience: float | None,
    ) -> list[str]:
        """Add a request for each of `asked` (input ids and request id); return their ids."""
        jobs: list[Job] = []
        try:
            for ids, name in asked:
                self.process.refuse_fork()
                self._requests.add(jobs, ids, name, wanted, is_streaming, with_timestamps, patience)
        except BaseException:
            self._requests.take_back(jobs)
            raise
        return [job.names[0] for job in jobs]

    def cancel_request(self, request_id: str) -> None:
        """End a request with all its samples; no effect if it has ended. O(1)."""
        self.process.refuse_fork()
        self._requests.cancel(request_id)

    # ---------------------------------------------------------------- outputs

    def get_result(
        self, request_id: str | None = None, timeout: float | None = None
    ) -> GenerationOutput | None:
        """Return the next output of one request, or of any request. O(1).

        Returns None after `timeout` seconds, without a session, or without such a request.
        """
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
            raise
        return found[0] if found else None

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Yield outputs as they arrive, until the session has ended and all are taken."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Generator[GenerationOutput]:
        """Yield the outputs of a request as they arrive, up to its finished output."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Handler) -> None:
        """Call `callback` with the request's outputs, on the current event loop. O(outputs).

        Outputs that are already available come first.
        """
        self.process.refuse_fork()
        self.output_router.register(request_id, callback)
