"""Prompts that callers load from tiers ahead of requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from numpy.typing import ArrayLike

from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.tiering import Tiering

GRACE_S = 0.05  # for a store to return from a load after the deadline


@dataclass(eq=False)
class _Warmed:
    fetch: Fetch
    deadline: float
    num_tokens: int  # attached so far
    work: Future[int]  # the caller waits for it


class Warming:
    """Attaches prompts between steps. Call its methods under the engine's lock.

    `wake` makes the engine's thread take another step soon.
    """

    def __init__(self, tiering: Tiering, wake: Callable[[], None]) -> None:
        self._tiering = tiering
        self._wake = wake
        self._waiting: list[_Warmed] = []

    @property
    def is_waiting(self) -> bool:
        """True if a prompt is loaded or attached. O(1)."""
        return len(self._waiting) > 0

    def begin(
        self, prompt: ArrayLike, namespace: str | None, lora: str | None, wait_s: float
    ) -> Future[int]:
        """Load a prompt. Returns the number of tokens that `attach` then added. O(tokens)."""
        work = Future[int]()
        fetch = self._tiering.begin(prompt, namespace=namespace, lora=lora, wait_s=wait_s)
        if fetch is None:
            work.set_result(0)
            return work
        self._waiting.append(_Warmed(fetch, fetch.wait_until, 0, work))
        self._wake()
        return work

    def attach(self, room: int) -> int:
        """Attach up to `room` blocks, cancel late loads, return the rest of `room`. O(bytes)."""
        now = time.monotonic()
        for each in list(self._waiting):
            fetch = each.fetch
            is_done = fetch.is_done
            if not is_done and now < each.deadline + GRACE_S:
                continue
            first = fetch.first
            each.num_tokens += sum(self._tiering.attach(fetch, room, early=True).values())
            room -= min(fetch.first - first, room)
            if fetch.slots and not room:
                self._wake()  # the next step copies more
                continue
            if not is_done:
                self._tiering.cancel(fetch)
            self._end(each)
        return room

    def give_up(self) -> None:
        """Cancel all loads; their callers get what was attached. O(slots)."""
        for each in list(self._waiting):
            self._tiering.cancel(each.fetch)
            self._end(each)

    def _end(self, each: _Warmed) -> None:
        self._waiting.remove(each)
        each.work.set_result(each.num_tokens)
