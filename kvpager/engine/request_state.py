"""The engine's state of a live request and of its samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kvpager.engine.detokenizer import decode
from kvpager.engine.runner import Draw, Row
from kvpager.engine.stream import Channel, Sample, Token
from kvpager.errors import KVPagerError, RequestCancelled, RequestExpired, RequestFailed
from kvpager.plans import Reason
from kvpager.scheduling.request import Request


class RequestSettings(NamedTuple):
    """How to choose the tokens of a request, and when to end a sample.

    `sampling` and `generator` are opaque to the engine; the sampler reads them.
    """

    sampling: Any = None
    generator: Any = None  # random number generator of the request
    stop_ids: frozenset[int] = frozenset()  # token ids that end a sample
    # Maps the tokens of a sample to its `stop_reason`, or to None if it continues.
    find_stop: Callable[[list[int]], str | None] | None = None
    with_logprobs: bool = False


@dataclass(slots=True, eq=False)
class TrackedSample:
    """A sample that continues."""

    tracked: TrackedRequest
    index: int  # in `Output.samples`
    sample: Sample

    def ids(self) -> list[int]:
        """Return all tokens so far, the prompt included. O(tokens)."""
        return self.tracked.begins + self.sample.token_ids


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request from submission to its end."""

    channel: Channel
    request: Request
    settings: RequestSettings
    begins: list[int]  # the tokens before the generated ones
    tokenizer: Any = None
    error: BaseException | None = None

    def row(self, sample: TrackedSample | None) -> Row:
        """Return the row of logits for the next token of a sample; None: for the first of all."""
        settings, times = self.settings, self.request.n if sample is None else 1
        ids = (lambda: self.begins) if sample is None else sample.ids
        return Row(settings.sampling, times, settings.generator, ids, settings.with_logprobs)

    def extend(
        self, parent: TrackedSample | None, draw: Draw, now: float
    ) -> tuple[list[Token], list[TrackedSample]]:
        """Append the tokens drawn for a row. O(drawn tokens).

        `parent` is None for the row that ends the prompt, from which all samples start.
        Returns the tokens to deliver, and the samples that continue.
        """
        arrived: list[Token] = []
        continuing: list[TrackedSample] = []
        if draw.error is not None:
            self.error = draw.error
            return arrived, continuing
        samples = self._begin(len(draw.tokens), now) if parent is None else [parent]
        for index, (each, token) in enumerate(zip(samples, draw.tokens, strict=True)):
            logprob = draw.logprobs[index] if draw.logprobs else None
            arrived.append(self._note(each, token, logprob))
            try:
                self._finish(each, token)
            # A criterion of the caller may raise anything, even SystemExit.
            except BaseException as error:
                self.error = error
                break
            if each.sample.finish_reason is None:
                continuing.append(each)
        return arrived, continuing

    def _begin(self, count: int, now: float) -> list[TrackedSample]:
        output = self.channel.output
        output.first_token_time = now
        with_logprobs = self.settings.with_logprobs
        samples = [Sample(logprobs=[] if with_logprobs else None) for _ in range(count)]
        output.samples.extend(samples)
        return [TrackedSample(self, index, sample) for index, sample in enumerate(samples)]

    def _note(self, each: TrackedSample, token: int, logprob: float | None) -> Token:
        each.sample.token_ids.append(token)
        if each.sample.logprobs is None or logprob is None:
            return Token(token, each.index)
        each.sample.logprobs.append(logprob)
        return Token(token, each.index, logprob)

    def _finish(self, each: TrackedSample, token: int) -> None:
        """Set the finish reason of a sample if `token` ends it."""
        sample, find_stop = each.sample, self.settings.find_stop
        if token in self.settings.stop_ids:
            sample.finish_reason = "stop"
        elif len(sample.token_ids) >= self.request.max_new_tokens:
            sample.finish_reason = "length"
        elif find_stop is not None:
            sample.stop_reason = find_stop(each.ids())
            if sample.stop_reason is not None:
                sample.finish_reason = "stop"

    def ending(self, reason: Reason, how: str = "was cancelled") -> Callable[[], None]:
        """Return a function that decodes texts and closes the channel, for another thread."""
        self.channel.output.finished_time = time.monotonic()
        return partial(self._close, reason, how)

    def _close(self, reason: Reason, how: str) -> None:
        output = self.channel.output
        if self.tokenizer is not None:
            try:
                for sample in output.samples:
                    sample.text = decode(self.tokenizer, sample.token_ids)
            except BaseException as error:  # a tokenizer of the caller may raise anything
                self.error = self.error or error
        self.channel.close(self._error(reason, how))

    def _error(self, reason: Reason, how: str) -> KVPagerError | None:
        """Return why the request has no result, or None. `self.error` takes precedence."""
        request_id = self.channel.output.request_id
        if self.error is not None:
            error = RequestFailed(f"request {request_id!r} failed: {self.error!r}")
            error.__cause__ = self.error
            return error
        if reason is Reason.CANCELLED:
            return RequestCancelled(f"request {request_id!r} {how}")
        if reason is Reason.EXPIRED:
            return RequestExpired(f"request {request_id!r} was not finished by its deadline")
        return None
