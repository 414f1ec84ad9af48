"""The requests of a continuous batching manager: they wait for a session, run, and end."""

from __future__ import annotations

import itertools
import logging
import queue
import time
from typing import Any

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.engine.stream import Stream
from kvpager.errors import KVPagerError, QueueFull, RequestCancelled
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.options import (
    RequestOverrides,
    SettingsFactory,
)
from kvpager.integrations.huggingface.continuous_batching.outputs import Job, Router
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.prompt_reader import without_padding

logger = logging.getLogger("kvpager")


class Status:
    """The progress of a session towards its end. The lock of the manager's router guards it."""

    DONT_STOP, FLUSH_AND_STOP, HARD_STOP, STOPPED = range(4)

    def __init__(self) -> None:
        self.local_status = self.DONT_STOP
        self.engine: Engine | None = None  # of the current or last session
        self.is_serving = False  # True from the start of a session to its end

    @property
    def fatal_error(self) -> BaseException | None:
        """Return the error that stopped the session; None if `stop` did."""
        return None if self.engine is None else self.engine.error

    def can_accept_new_requests(self) -> str | None:
        """Return the reason for refusing requests; None if they are accepted. O(1)."""
        if self.fatal_error is not None:
            return f"the engine stopped: {self.fatal_error!r}"
        if self.local_status != self.DONT_STOP:
            return "the manager is stopping, or has stopped"
        return None


class _RequestId(str):
    """A request id inside the engine: printed as the user's id, but unequal to every other id."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Padded(list[int]):
    """A prompt without padding. Its `row` has the padding, for outputs."""

    def __init__(self, row: Any, mask: Any) -> None:
        ids = arguments.token_ids(_as_list(row))
        super().__init__(without_padding(ids, mask).tolist())
        self.row = ids.tolist()


class Requests:
    """The requests of a manager that have not ended. The lock of `router` guards them.

    `config` is a `ContinuousBatchingConfig`, `memory` the memory of the patch.
    """

    def __init__(
        self,
        router: Router,
        status: Status,
        factory: SettingsFactory,
        config: Any,
        memory: PagedMemory,
    ) -> None:
        self._router, self._status, self._factory = router, status, factory
        self._config, self._memory = config, memory
        self.jobs: dict[str, Job] = {}  # by the ids of all samples
        self._pending: list[Job] = []  # until a session begins
        self._request_counter = 0
        self._seeds = itertools.count()

    def add(
        self,
        jobs: list[Job],
        input_ids: Any,
        request_id: str | None,
        wanted: RequestOverrides,
        is_streaming: bool,
        with_timestamps: bool,
        patience: float | None,
    ) -> None:
        """Add a request, and append its job to `jobs`. Refuses it if the manager is stopping."""
        prompt, is_named = _as_list(input_ids), request_id is not None
        with self._router.changed:
            denial = self._status.can_accept_new_requests()
            if denial is not None:
                tokens = counted(len(prompt), "token")
                logger.warning("a request of %s was refused: %s", tokens, denial)
                return
            while request_id is None or (request_id in self.jobs and not is_named):
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
            seed = None if self._config.seed is None else self._config.seed + next(self._seeds)
            job = Job(
                self._router,
                request_id,
                input_ids.row if isinstance(input_ids, Padded) else prompt,
                wanted=wanted,
                submission={
                    "prompt": prompt,
                    "request_id": _RequestId(request_id),
                    "namespace": self._memory.namespaces.current,
                    "seed": seed,
                    "logprobs": self._config.return_logprobs,
                },
                num_samples=self._factory.num_samples,
                is_streaming=is_streaming,
                with_timestamps=with_timestamps,
                on_end=self._end,
            )
            taken = [name for name in job.names if name in self.jobs]
            if taken:
                raise ValueError(f"request_id={taken[0]!r}: in use. Choose another id.")
            self.jobs.update(dict.fromkeys(job.names, job))
            jobs.append(job)
            if not self._status.is_serving:
                self._pending.append(job)
                return
        self._queue(job, patience)

    def take_back(self, jobs: list[Job]) -> None:
        """Remove requests and their outputs, as if they were never added. O(jobs)."""
        with self._router.changed:  # signals wait until all is done
            self._pending = [job for job in self._pending if job not in jobs]
            for job in jobs:
                job.take_back()
                for name in job.names:
                    self._router.forget(name)
                self._forget(job)

    def queue_pending(self) -> None:
        """Queue the requests that were added before the session began. O(tokens)."""
        taken: list[Job] = []
        try:
            with self._router.changed:
                taken, self._pending = self._pending, []
            for job in taken:
                self._queue(job, patience=None)
        except BaseException as error:
            for job in taken:  # running requests end with the session
                job.fail(RequestCancelled(f"start() was interrupted by {error!r}"))
            raise

    def fail_pending(self) -> None:
        """End the pending requests, since no session will follow. O(requests)."""
        with self._router.changed:  # signals wait until all have failed
            taken, self._pending = self._pending, []
            for job in taken:
                job.fail(RequestCancelled("the manager was destroyed before it was started"))

    def _end(self, job: Job) -> None:
        self._memory.note_session(requests=1, tokens=job.num_generated)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._router.changed:
            for name in job.names:
                if self.jobs.get(name) is job:
                    del self.jobs[name]
            self._router.changed.notify_all()

    def _queue(self, job: Job, patience: float | None) -> None:
        """Submit the request to the engine; a refused request fails. Raises: `queue.Full`."""
        deadline = None if patience is None else time.monotonic() + patience
        try:
            while (stream := self._submit(job)) is None:
                self._wait_for_room(job, deadline)
        except (KVPagerError, ValueError, TypeError) as error:
            job.fail(error)
        else:
            job.follow(stream)

    def _submit(self, job: Job) -> Stream | None:
        engine = self._status.engine
        assert engine is not None
        num_prompt = len(job.submission["prompt"])
        sampling = self._factory.settings_for(job.wanted, num_prompt, lambda: engine.stats().pool)
        try:
            return engine.submit(**job.submission, sampling_settings=sampling)
        except QueueFull:
            return None

    def _wait_for_room(self, job: Job, deadline: float | None) -> None:
        if job.is_cancelled:
            raise RequestCancelled(f"request {job.names[0]!r} was cancelled")
        if deadline is not None and time.monotonic() >= deadline:
            raise queue.Full(
                f"request queue is full (max_queue_size={self._config.max_queue_size}). "
                "Retry later or raise max_queue_size."
            )
        with self._router.changed:
            # Poll: no callback reports that a request begins.
            self._router.changed.wait(0.02)

    def cancel(self, request_id: str) -> None:
        """End a request with all its samples; no effect if it has ended. O(1)."""
        with self._router.changed:  # signals wait until a request that is removed has failed
            job = self.jobs.get(request_id)
            if job is None:
                return
            job.is_cancelled = True
            if job in self._pending:
                self._pending.remove(job)
                job.fail(RequestCancelled(f"request {request_id!r} was cancelled"))
            elif job.stream is not None:
                job.stream.cancel()


def _as_list(input_ids: Any) -> list[Any]:
    """Return ids, or the single row of a tensor, as a list. The engine checks the content."""
    ids: list[Any] = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    return ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids
