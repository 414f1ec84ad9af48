"""Turn the tokens of requests into `GenerationOutput`s, and deliver these."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from kvpager._atomic import Condition
from kvpager.engine.stream import Output, Stream, Token
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.continuous_batching.options import RequestOverrides

Handler = Callable[[GenerationOutput], object]


class Router:
    """Delivery of outputs: to a request's handler, or into a queue until they are taken.

    `changed` is notified of every change. Its lock guards all state.
    """

    def __init__(self) -> None:
        self.changed = Condition()
        self.result_handlers: dict[str, tuple[Handler, asyncio.AbstractEventLoop]] = {}
        self._waiting: OrderedDict[int, GenerationOutput] = OrderedDict()
        self._of_request: dict[str, deque[int]] = {}
        self._numbers = itertools.count()

    def deliver(self, output: GenerationOutput) -> None:
        """Deliver an output. O(1)."""
        with self.changed:
            if not self._hand_over(output):
                number = next(self._numbers)
                self._waiting[number] = output
                self._of_request.setdefault(output.request_id, deque()).append(number)
            self.changed.notify_all()

    def put_back(self, output: GenerationOutput) -> None:
        """Return a taken output to the front of the queue. O(1)."""
        with self.changed:
            number = next(self._numbers)
            self._waiting[number] = output
            self._waiting.move_to_end(number, last=False)
            self._of_request.setdefault(output.request_id, deque()).appendleft(number)
            self.changed.notify_all()

    def forget(self, request_id: str | None = None) -> None:
        """Drop the queued outputs of all requests, or of one. O(outputs)."""
        while self.take(request_id) is not None:
            pass

    def _hand_over(self, output: GenerationOutput) -> bool:
        handlers, name = self.result_handlers, output.request_id
        entry = handlers.pop(name, None) if output.is_finished() else handlers.get(name)
        if entry is None:
            return False
        handler, loop = entry
        try:
            loop.call_soon_threadsafe(handler, output)
        except RuntimeError:  # the event loop is closed, but the output may still be taken
            handlers.pop(name, None)
            return False
        return True

    def register(self, request_id: str, handler: Handler) -> None:
        """Call `handler` on the running event loop with the request's queued and future outputs.

        O(queued outputs).
        """
        loop = asyncio.get_running_loop()
        with self.changed:
            self.result_handlers[request_id] = handler, loop
            while (output := self.take(request_id)) is not None:
                self._hand_over(output)

    def take(self, request_id: str | None = None) -> GenerationOutput | None:
        """Take the oldest queued output of all requests, or of one; None if there is none. O(1)."""
        with self.changed:
            if request_id is None:
                if not self._waiting:
                    return None
                request_id = next(iter(self._waiting.values())).request_id
            numbers = self._of_request.get(request_id)
            if numbers is None:
                return None
            output = self._waiting.pop(numbers.popleft())
            if not numbers:
                del self._of_request[request_id]
            return output


class Job:
    """A live request, whose tokens it turns into outputs.

    Args:
        prompt: token ids, with the padding that the user passed.
        submission: the arguments of `Engine.submit`, without the settings.
        num_samples: the number of samples. Samples after the first have ids of children.
        is_streaming: True for an output per token, False for an output per sample.
        on_end: a function to call once after the last output.
    """

    def __init__(
        self,
        router: Router,
        request_id: str,
        prompt: list[int],
        *,
        wanted: RequestOverrides,
        submission: dict[str, Any],
        num_samples: int,
        is_streaming: bool,
        with_timestamps: bool,
        on_end: Callable[[Job], None],
    ) -> None:
        children = [f"{request_id}__child#{number}" for number in range(num_samples - 1)]
        self.names = [request_id, *children]
        self.wanted, self.submission = wanted, submission
        self.stream: Stream | None = None
        self.is_cancelled = False
        self.is_over = False
        # The last output of each sample. It grows, and copies of it are delivered.
        self._rows = [
            GenerationOutput(name, prompt, timestamps=[] if with_timestamps else None)
            for name in self.names
        ]
        self._router = router
        self._is_streaming = is_streaming
        self._on_end = on_end

    @property
    def num_generated(self) -> int:
        """Return the number of tokens of all samples so far."""
        return sum(len(row.generated_tokens) for row in self._rows)

    def follow(self, stream: Stream) -> None:
        """Read the tokens of the queued request from `stream`. O(tokens so far)."""
        self.stream = stream
        stream.listen(self._read)
        if self.is_cancelled:
            stream.cancel()

    def fail(self, error: Exception) -> None:
        """End the request with an error; no effect if it has ended. O(samples)."""
        self._end(str(error))

    def take_back(self) -> None:
        """End the request without further outputs. Idempotent. O(1)."""
        self.is_over = True
        if self.stream is not None:
            self.stream.cancel()

    def _read(self, tokens: list[Token], is_done: bool) -> None:
        assert self.stream is not None
        if self.is_over:  # `take_back` was called
            return
        partial = self.stream.partial()
        for token in tokens:
            self._add(token, partial)
        if is_done:
            try:
                self.stream.result(0)
            except KVPagerError as error:
                self._end(str(error))
            else:
                self._end(None)

    def _add(self, token: Token, partial: Output) -> None:
        now = time.perf_counter()
        row, sample = self._rows[token.sample], partial.samples[token.sample]
        if not row.generated_tokens and token.sample:
            row.created_time = now  # until now it was part of the first sample
        row.generated_tokens.append(token.id)
        if row.timestamps is not None:
            row.timestamps.append(now)
        if token.logprob is not None:
            row.logprobs.append(token.logprob)
        if sample.finish_reason is not None and len(sample.token_ids) == len(row.generated_tokens):
            self._deliver(row, RequestStatus.FINISHED)
        elif self._is_streaming:
            self._deliver(row, RequestStatus.DECODING)

    def _end(self, error: str | None) -> None:
        status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        with self._router.changed:  # only one thread ends it, and signals wait
            if self.is_over:
                return
            self.is_over = True
            for row in self._rows:
                if not row.is_finished():
                    self._deliver(row, status, error)
            self._on_end(self)

    def _deliver(
        self, row: GenerationOutput, status: RequestStatus, error: str | None = None
    ) -> None:
        now = time.perf_counter()
        began = None if self.stream is None else self.stream.partial().first_scheduled_time
        if began is not None:  # by the engine's clock; transformers has another
            began = now - (time.monotonic() - began)
        row.status, row.error = status, error
        row.lifespan = now if began is None else began, now if row.is_finished() else -1
        output = dataclasses.replace(
            row,
            generated_tokens=row.generated_tokens[:],
            logprobs=row.logprobs[:],
            timestamps=None if row.timestamps is None else row.timestamps[:],
        )
        self._router.deliver(output)
