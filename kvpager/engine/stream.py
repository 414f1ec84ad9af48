"""Streams: the tokens of a request as they arrive, and its output at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kvpager import _validate as arguments
from kvpager._atomic import Condition
from kvpager._text import counted
from kvpager.engine.detokenizer import Detokenizer
from kvpager.engine.processes import Process
from kvpager.errors import KVPagerError

logger = logging.getLogger("kvpager")

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One generated token."""

    id: int
    sample: int  # index of its sample in `Output.samples`
    logprob: float | None = None


@dataclass(slots=True)
class Sample:
    """One continuation of a prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish_reason: FinishReason | None = None  # None if the request ended before it was complete
    # The stop string, or the criterion's name; None if an end-of-text token stopped the sample.
    stop_reason: str | None = None
    text: str | None = None  # set when the request has ended, if the engine has a tokenizer


@dataclass(slots=True)
class Output:
    """The result of a request.

    Times are those of `time.monotonic`. A time is None if the request did not get that far.
    """

    request_id: Hashable
    prompt_token_ids: list[int]
    samples: list[Sample]
    arrival_time: float
    first_scheduled_time: float | None = None  # of its first step
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0  # of the prompt, whose keys and values were not computed again
    # Of these, how many came from each store of `tiers`, by name. The others were in the pool.
    cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)

    @property
    def token_ids(self) -> list[int]:
        """Return the token ids of the first sample, [] before its first token. O(1)."""
        return self.samples[0].token_ids if self.samples else []

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return why the first sample ended, None before that. O(1)."""
        return self.samples[0].finish_reason if self.samples else None

    @property
    def text(self) -> str:
        """Return the text of the first sample. O(1).

        Raises: `ValueError` before the request has ended, or without a tokenizer.
        """
        text = self.samples[0].text if self.samples else None
        if text is None:
            raise ValueError(
                f"request {self.request_id!r} has no text: an engine with a tokenizer sets it "
                f"at the end. {_NO_TOKENIZER}"
            )
        return text


_NO_TOKENIZER = "Make the engine with Engine(model, tokenizer=tokenizer)."


class Channel:
    """Passes the tokens of a request from the engine to a `Stream`. Thread-safe."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._arrived: deque[Token] = deque()
        self._changed = Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._reader: Callable[[list[Token], bool], None] | None = None
        self._process = Process("engine")
        self.is_done = False
        self.error: KVPagerError | None = None

    # Not a generator: the traceback of an interrupt would keep it alive, with the lock held.
    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        """Return the lock. In a fork, return no lock for an ended request.

        Raises: `EngineClosed` in a fork, for a request that has not ended.
        """
        if self._process.is_current:
            return self._changed
        if not self.is_done:
            self._process.refuse_fork()
        return contextlib.nullcontext()

    def put(self, tokens: list[Token]) -> None:
        """Deliver the tokens of one step. O(tokens + readers)."""
        with self._changed:
            self._arrived.extend(tokens)
            self._wake()

    def close(self, error: KVPagerError | None) -> None:
        """End the channel, with `error` if the request has no result. O(readers)."""
        with self._changed:
            self.error = error
            self.is_done = True  # set last: a fork reads it without the lock
            self._wake()

    def listen(self, reader: Callable[[list[Token], bool], None]) -> None:
        """Pass all tokens to `reader`, now and as they arrive. O(tokens)."""
        self._process.refuse_fork()
        with self._changed:
            self._reader = reader
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, woken in waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks with it
                loop.call_soon_threadsafe(_resolve, woken)
        if self._reader is not None:
            arrived, self._arrived = self._arrived, deque()
            self._reader(list(arrived), self.is_done)  # last, because it may raise

    def take(self, timeout: float | None = None) -> Token | None:
        """Return the next token, or None after the last one.

        Raises: `TimeoutError`, `EngineClosed`.
        """
        with self._locked():
            if not self._changed.wait_for(lambda: self._arrived or self.is_done, timeout):
                raise TimeoutError(f"no token of request {self.output.request_id!r} in {timeout} s")
            return self._arrived.popleft() if self._arrived else None

    def wait(self, timeout: float | None) -> None:
        """Wait for the end. Raises: `TimeoutError`, `EngineClosed`."""
        with self._locked():
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                request_id = self.output.request_id
                raise TimeoutError(f"request {request_id!r} is not done after {timeout} s")

    async def changed(self, is_enough: Callable[[], bool]) -> None:
        """Wait until `is_enough()`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        while True:
            woken = loop.create_future()
            with self._locked():
                if is_enough():
                    return
                self._waiting.append((loop, woken))
            await woken

    @property
    def has_ended(self) -> bool:
        """True if no token follows, as always in a fork."""
        return self.is_done or not self._process.is_current

    @property
    def has_news(self) -> bool:
        """True if `take` would return at once."""
        return bool(self._arrived) or self.is_done


def _resolve(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Dispatcher:
    """Runs tasks in order on a thread of its own, so that steps need not wait for them."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvpager-dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread. Call it off the main thread, where no signal interrupts it. O(1)."""
        self._thread.start()

    def post(self, task: Callable[[], object]) -> None:
        """Run `task` soon. O(1)."""
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread after all tasks. Idempotent."""
        self._tasks.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            with listener_errors_logged():
                task()


@contextlib.contextmanager
def listener_errors_logged() -> Iterator[None]:
    """Log each exception raised inside the `with` block instead of raising it, even SystemExit.

    A listener that raises must not stop other requests from getting their tokens.
    """
    try:
        yield
    except BaseException:
        logger.exception("a listener raised an exception")


class Stream:
    """A submitted request: iterate over its tokens, or wait for its result.

        for token in engine.submit(prompt):           # or: async for
            print(token.id)
        output = engine.submit(prompt).result()       # or: await engine.submit(prompt)
        for piece in engine.submit(prompt).text():    # or: async for
            print(piece, end="")

    Keep a reference to the stream until its end (a loop over it keeps one): garbage-collecting it
    earlier cancels the request.
    """

    def __init__(
        self,
        channel: Channel,
        cancel: Callable[[Channel], None],
        *,
        n: int = 1,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self._channel = channel
        self._cancel = cancel
        self._n = n
        self._detokenizer = detokenizer

    def __repr__(self) -> str:
        # Takes no lock: a debugger may call it while another thread holds the lock.
        channel, output = self._channel, self._channel.output
        if channel.is_done:
            state = "done" if channel.error is None else type(channel.error).__name__
        else:
            state = "waiting" if output.first_scheduled_time is None else "running"
        counts = [len(sample.token_ids) for sample in output.samples] or [0]
        tokens = " + ".join([*map(str, counts[:-1]), counted(counts[-1], "token")])
        num_prompt = len(output.prompt_token_ids)
        return f"<Stream of {output.request_id!r}: {state}, {num_prompt} -> {tokens}>"

    @property
    def request_id(self) -> Hashable:
        """The id of the request."""
        return self._channel.output.request_id

    @property
    def done(self) -> bool:
        """True if the request has ended, for any reason."""
        return self._channel.has_ended

    def cancel(self) -> None:
        """Cancel the request, unless it has ended. O(1).

        Iteration then yields the tokens that have arrived and raises `RequestCancelled`, as does
        `result`. `partial` still returns the output. To stop early without an error, leave the loop
        and drop the stream.
        """
        if not self._channel.is_done:
            self._cancel(self._channel)

    def result(self, timeout: float | None = None) -> Output:
        """Wait for the end and return the output.

        Raises: `RequestCancelled`, also after the caller's own `cancel`; `RequestExpired`,
        `RequestFailed`; `TimeoutError` after `timeout` seconds. The request continues after a
        timeout.
        """
        if timeout is not None:
            timeout = arguments.seconds("timeout", timeout)
        self._channel.wait(timeout)
        return self._outcome()

    def listen(self, reader: Callable[[list[Token], bool], None]) -> None:
        """Call `reader(tokens, is_done)` with each step's new tokens. O(tokens).

        `is_done` is True in the last call, when the request has ended. The first call happens at
        once, the others after each step on the thread that delivers tokens to all streams. So
        `reader` must not block.
        """
        self._channel.listen(reader)

    def partial(self) -> Output:
        """Return the output so far: not a copy, it grows until the request ends. O(1)."""
        return self._channel.output

    def _outcome(self) -> Output:
        if self._channel.error is not None:
            raise self._channel.error
        return self._channel.output

    def text(self) -> TextStream:
        """Return an iterable of text pieces, for `for` and `async for`.

        Iteration resumes where reading stopped. Every piece ends with a complete character. Special
        tokens are omitted. The joined pieces equal `Output.text` if the tokens are valid UTF-8.

        Raises: `ValueError` for an engine without a tokenizer, or a request with several samples.
        After the last piece, iteration raises the errors of `result`.
        """
        if self._detokenizer is None:
            raise ValueError(f"text: the engine has no tokenizer. {_NO_TOKENIZER}")
        if self._n > 1:
            raise ValueError(
                f"text: the request has {self._n} samples, whose tokens are interleaved. "
                "Use result(), or submit a request for each sample."
            )
        return TextStream(self, self._detokenizer)

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens from where reading stopped. Raises: as `result`, after the last token."""
        yield from self._tokens()
        self._outcome()

    async def __aiter__(self) -> AsyncIterator[Token]:
        async for token in self._atokens():
            yield token
        self._outcome()

    def _tokens(self) -> Iterator[Token]:
        while (token := self._channel.take()) is not None:
            yield token

    async def _atokens(self) -> AsyncIterator[Token]:
        channel = self._channel
        while True:
            await channel.changed(lambda: channel.has_news)
            token = channel.take(0)
            if token is None:
                break
            yield token

    def __await__(self) -> Generator[Any, None, Output]:
        channel = self._channel
        yield from channel.changed(lambda: channel.is_done).__await__()
        return self._outcome()

    def __del__(self) -> None:
        # getattr: a stream whose constructor was interrupted is finalised, too.
        channel = getattr(self, "_channel", None)
        if channel is not None and not channel.is_done:
            self._cancel(channel)


class TextStream:
    """The text of a `Stream` as it arrives, from `Stream.text`."""

    def __init__(self, stream: Stream, detokenizer: Detokenizer) -> None:
        self._stream = stream
        self._detokenizer = detokenizer

    def __iter__(self) -> Iterator[str]:
        """Yield non-empty pieces. Raises: as `Stream.result`, after the last piece."""
        for token in self._stream._tokens():
            if piece := self._detokenizer.add(token.id):
                yield piece
        if piece := self._detokenizer.end():
            yield piece
        self._stream._outcome()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for token in self._stream._atokens():
            if piece := self._detokenizer.add(token.id):
                yield piece
        if piece := self._detokenizer.end():
            yield piece
        self._stream._outcome()
