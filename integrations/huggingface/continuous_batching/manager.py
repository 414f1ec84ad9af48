"""transformers' continuous batching manager, with an engine inside."""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from transformers.generation.continuous_batching.requests import GenerationOutput

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.engine.stream import Stream
from kvpager.errors import KVPagerError, QueueFull, RequestCancelled
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.outputs import Handler, Job
from kvpager.integrations.huggingface.continuous_batching.policies import Policies, Wanted
from kvpager.integrations.huggingface.continuous_batching.sessions import Sessions
from kvpager.integrations.huggingface.runner.inputs import without_padding

logger = logging.getLogger("kvpager")

_PATIENCE = 10.0  # seconds that `add_request` waits for room in the queue, as transformers does


class _Name(str):
    """A request's name inside the engine: equal to no other, and printed as the caller's."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Padded(list[int]):
    """A prompt without its padding, which stays in the `row` that outputs show."""

    def __init__(self, row: Any, mask: Any) -> None:
        ids = arguments.token_ids(_as_list(row))
        super().__init__(without_padding(ids, mask).tolist())
        self.row = ids.tolist()


class _Asked(NamedTuple):
    """A request that was added, and not queued yet."""

    job: Job
    prompt: list[int]
    wanted: Wanted
    namespace: str | None
    seed: int | None


class PagedBatchingManager(Sessions):
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
        super().__init__(
            model,
            generation_config,
            continuous_batching_config,
            workload_hints,
            memory,
            may_be_kept,
        )
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self._namespace = namespace
        self._policies = Policies(
            model, generation_config, self._anatomy, per_request=self._options.per_request
        )
        self._held: list[_Asked] = []  # until `start`
        self._request_counter = 0
        self._seeds = itertools.count()

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
        wanted = Wanted(max_new_tokens, eos_token_id, logit_processor_kwargs)
        jobs: list[Job] = []
        try:
            self._add(jobs, input_ids, request_id, wanted, streaming, record_timestamps, _PATIENCE)
        except BaseException:
            self._take_back(jobs)
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
        wanted = Wanted(max_new_tokens, None, logit_processor_kwargs)
        jobs: list[Job] = []
        try:
            for ids in inputs:
                self._add(jobs, ids, None, wanted, streaming, record_timestamps, None)
        except BaseException:
            self._take_back(jobs)
            self.end_if_abandoned()
            raise
        return [job.names[0] for job in jobs]

    def _add(
        self,
        jobs: list[Job],
        input_ids: Any,
        request_id: str | None,
        wanted: Wanted,
        is_streaming: bool,
        with_timestamps: bool,
        patience: float | None,
    ) -> None:
        """Add a request, and its job to `jobs`; none if the manager is stopping."""
        self.process.refuse_fork()
        prompt, is_named = _as_list(input_ids), request_id is not None
        with self._changed:
            denial = self._status.can_accept_new_requests()
            if denial is not None:
                tokens = counted(len(prompt), "token")
                logger.warning("a request of %s is dropped: %s", tokens, denial)
                return
            while request_id is None or (request_id in self._jobs and not is_named):
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
            job = Job(
                self.output_router,
                request_id,
                input_ids.row if isinstance(input_ids, Padded) else prompt,
                num_samples=self.num_return_sequences,
                is_streaming=is_streaming,
                with_timestamps=with_timestamps,
                on_end=self._end,
            )
            taken = [name for name in job.names if name in self._jobs]
            if taken:
                raise ValueError(f"request {taken[0]!r} is not done yet; choose another name")
            self._jobs.update(dict.fromkeys(job.names, job))
            jobs.append(job)
            seed = None if self._options.seed is None else self._options.seed + next(self._seeds)
            asked = _Asked(job, prompt, wanted, self._namespace(), seed)
            if not self._is_serving:
                self._held.append(asked)
                return
        self._queue(asked, patience)

    def _take_back(self, jobs: list[Job]) -> None:
        """Let requests never have been added, with the outputs of their names. O(jobs)."""
        with self._changed:  # signals wait until all is done
            self._held = [asked for asked in self._held if asked.job not in jobs]
            for job in jobs:
                job.take_back()
                for name in job.names:
                    self.output_router.forget(name)
                self._forget(job)

    def _queue_held(self) -> None:
        held: list[_Asked] = []
        try:
            with self._changed:
                held += self._take_held()
            for asked in held:
                self._queue(asked, patience=None)
        except BaseException as error:
            for asked in held:  # those that run end with the session
                asked.job.fail(RequestCancelled(f"start was cut short by {error!r}"))
            raise

    def _fail_held(self) -> None:
        with self._changed:  # signals wait until all have failed
            for asked in self._take_held():
                asked.job.fail(RequestCancelled("the manager was destroyed before it was started"))

    def _take_held(self) -> list[_Asked]:
        held, self._held = self._held, []
        return held

    def _end(self, job: Job) -> None:
        self._patched.note_session(requests=1, tokens=job.num_generated)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._changed:
            for name in job.names:
                if self._jobs.get(name) is job:
                    del self._jobs[name]
            self._changed.notify_all()

    def _queue(self, asked: _Asked, patience: float | None) -> None:
        """Hand the request to the engine; what that refuses fails. Raises: `queue.Full`."""
        deadline = None if patience is None else time.monotonic() + patience
        try:
            stream = self._submit(asked)
            while stream is None:
                self._wait_for_room(asked, deadline)
                stream = self._submit(asked)
        except (KVPagerError, ValueError, TypeError) as error:
            asked.job.fail(error)
        else:
            asked.job.follow(stream)

    def _submit(self, asked: _Asked) -> Stream | None:
        engine = self._status.engine
        assert engine is not None
        policy = self._policies.policy(asked.wanted, len(asked.prompt), lambda: engine.stats().pool)
        try:
            return engine.submit(
                asked.prompt,
                name=_Name(asked.job.names[0]),
                namespace=asked.namespace,
                seed=asked.seed,
                logprobs=self._options.with_logprobs,
                policy=policy,
            )
        except QueueFull:
            return None

    def _wait_for_room(self, asked: _Asked, deadline: float | None) -> None:
        if asked.job.is_cancelled:
            raise RequestCancelled(f"request {asked.job.names[0]!r} was cancelled")
        if deadline is not None and time.monotonic() >= deadline:
            raise queue.Full(
                f"{self._options.max_waiting} requests wait already; raise max_queue_size"
            )
        with self._changed:
            # Nobody tells when a request begins.
            self._changed.wait(0.02)

    def cancel_request(self, request_id: str) -> None:
        """End a request, with all its samples; does nothing for one that has ended. O(1)."""
        self.process.refuse_fork()
        with self._changed:  # signals wait: what is not held any more has to fail
            job = self._jobs.get(request_id)
            if job is None:
                return
            job.is_cancelled = True
            is_held = any(asked.job is job for asked in self._held)
            self._held = [asked for asked in self._held if asked.job is not job]
            if is_held:
                job.fail(RequestCancelled(f"request {request_id!r} was cancelled"))
            elif job.stream is not None:
                job.stream.cancel()

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
            is_live = request_id is None or request_id in self._jobs
            return not (self._is_serving and is_live)

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


def _as_list(input_ids: Any) -> list[Any]:
    """Ids as a list, of a tensor with one row as well; the engine looks at what is in it."""
    ids: list[Any] = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    return ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids
