"""The calls of stores that are under way, and the stores that do not return from one.

A store must return soon after its deadline. A store on a dead disk or network share may never
return, and Python cannot end the thread of the call. So such a store gets no other call until the
call returns.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from kvpager.storage.tiers.protocol import BlockStore

logger = logging.getLogger(__name__)

GRACE_S = 1.0  # after the deadline: to end a transfer that has begun
_PATIENCE_S = 5.0  # for calls without a deadline, such as `drop`


class _Call(NamedTuple):
    store: int
    thread: int
    until: float


class StoreCalls:
    """Notes the calls of stores. Any thread may call any method."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Measure with `clock`, in seconds."""
        self._clock = clock
        self._calls: dict[object, _Call] = {}

    @contextmanager
    def begin(self, store: int, deadline: float | None = None) -> Iterator[None]:
        """Note a call of store number `store` on this thread until the end of the section. O(1).

        A call without a deadline may take 5 s.
        """
        now = self._clock()
        until = now + _PATIENCE_S if deadline is None else max(deadline, now) + GRACE_S
        mark = object()
        self._calls[mark] = _Call(store, threading.get_ident(), until)
        try:
            yield
        finally:
            del self._calls[mark]

    def hangs(self, store: int) -> bool:
        """Return True if a call of the store is over its time. O(calls)."""
        return any(call.store == store for call in self._over())

    @property
    def hanging(self) -> Iterator[bool]:
        """Yield for store 0, 1, 2 and so on whether it hangs. Endless. O(calls) each."""
        return map(self.hangs, itertools.count())

    def lost_threads(self) -> set[int]:
        """Return the threads whose calls are over their time. O(calls)."""
        return {call.thread for call in self._over()}

    def left_s(self, thread: int | None) -> float:
        """Return the seconds that a thread's call may still take; 0 without a call. O(calls)."""
        until = [call.until for call in list(self._calls.values()) if call.thread == thread]
        return max([0.0, *(each - self._clock() for each in until)])

    def close_all(self, stores: Sequence[BlockStore]) -> None:
        """Close all stores, even if one raises. Does not wait for those that hang."""
        with ExitStack() as closing:
            for number, store in enumerate(stores):
                if self.hangs(number):
                    logger.warning("the store %s hangs: its `close` is not waited for", store.name)
                    threading.Thread(target=store.close, daemon=True).start()
                else:
                    closing.callback(store.close)

    def _over(self) -> list[_Call]:
        if not self._calls:
            return []
        now = self._clock()
        return [call for call in list(self._calls.values()) if call.until < now]
