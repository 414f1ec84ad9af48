"""What the engine remembers of a request, and of each of its samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpager.engine.stream import Channel, Sample, Stop, Token
from kvpager.engine.text import decode
from kvpager.errors import KVPagerError, RequestCancelled, RequestExpired, RequestFailed
from kvpager.integrations.huggingface.runner.sampling import Choice, Draw
from kvpager.plans import Reason


@dataclass(slots=True, eq=False)
class Live:
    """A sample that goes on."""

    tracked: Tracked
    number: int  # among the request's samples
    sample: Sample

    def ids(self) -> Tensor:
        """All its tokens so far, [1, tokens]."""
        return torch.tensor([self.tracked.begins + self.sample.tokens])


@dataclass(slots=True, eq=False)
class Tracked:
    """A request between its submission and its end."""

    channel: Channel
    choice: Choice
    num_samples: int
    begins: list[int]  # the tokens that generated ones follow
    generator: torch.Generator | None
    with_logprobs: bool
    tokenizer: Any = None
    error: BaseException | None = None

    def begin_ids(self) -> Tensor:
        """The tokens that generated ones follow, [1, tokens]."""
        return torch.tensor([self.begins])

    def extend(
        self, live: Live | None, draw: Draw, now: float
    ) -> tuple[list[Token], list[tuple[Live, int]]]:
        """Note the tokens drawn for a row: those to hand out, and who goes on with which."""
        arrived: list[Token] = []
        going_on: list[tuple[Live, int]] = []
        if draw.error is not None:
            self.error = draw.error
            return arrived, going_on
        output = self.channel.output
        if live is None:
            output.first_token = now
            rows = [Live(self, number, self._new_sample()) for number in range(len(draw.tokens))]
            output.samples.extend(each.sample for each in rows)
        else:
            rows = [live]
        for number, (each, token) in enumerate(zip(rows, draw.tokens, strict=True)):
            logprob = draw.logprobs[number] if draw.logprobs and self.with_logprobs else None
            each.sample.tokens.append(token)
            if each.sample.logprobs is not None and logprob is not None:
                each.sample.logprobs.append(logprob)
            arrived.append(Token(token, each.number, logprob))
            try:
                each.sample.reason = self._stop(each, token)
            except BaseException as error:  # of a criterion of the caller's, SystemExit as well
                self.error = error
                break
            if each.sample.reason is None:
                going_on.append((each, token))
        return arrived, going_on

    def _new_sample(self) -> Sample:
        return Sample(logprobs=[] if self.with_logprobs else None)

    def _stop(self, live: Live, token: int) -> Stop | None:
        if token in self.choice.eos:
            return "eos"
        if len(live.sample.tokens) >= self.choice.max_new_tokens:
            return "length"
        if self.choice.criteria and bool(self.choice.criteria(live.ids(), None).all()):
            return "stopped"
        return None

    def ending(self, reason: Reason, how: str = "was cancelled") -> Callable[[], None]:
        """Return a function that closes the channel. Another thread calls it: it makes texts."""
        self.channel.output.finished = time.monotonic()
        return partial(self._close, reason, how)

    def _close(self, reason: Reason, how: str) -> None:
        output = self.channel.output
        if self.tokenizer is not None:
            try:
                for sample in output.samples:
                    sample.text = decode(self.tokenizer, sample.tokens)
            except BaseException as error:  # of a tokenizer of the caller's
                self.error = self.error or error
        self.channel.close(self._error(reason, how))

    def _error(self, reason: Reason, how: str) -> KVPagerError | None:
        """Return why the request has no result. An error that was met comes first."""
        name = self.channel.output.name
        if self.error is not None:
            error = RequestFailed(f"request {name!r} failed: {self.error!r}")
            error.__cause__ = self.error
            return error
        if reason is Reason.CANCELLED:
            return RequestCancelled(f"request {name!r} {how}")
        if reason is Reason.EXPIRED:
            return RequestExpired(f"request {name!r} was not done by its deadline")
        return None
