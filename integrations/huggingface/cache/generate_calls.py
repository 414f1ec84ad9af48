"""Concurrent calls of `generate` in several threads, which share the memory of one patch.

    begins ──▶ waits until running calls leave room for all its tokens ──▶ runs ──▶ ends
                                                                          │  ▲
                                                    no room: waits for other calls to free blocks

A new call claims memory for its rows at full length before it takes a block. It waits until that
fits beside the claims of other calls; a single call runs at once. A running call that finds no room
waits, too, with priority over new calls. Calls never deadlock: if all calls that hold blocks wait,
one of them raises `OutOfBlocks` and the others continue.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvpager._atomic import Deferral, Uninterrupted
from kvpager.blocks.windows import blocks_for
from kvpager.plans import Int64

_T = TypeVar("_T")

# A call waits at most this long, all its waits together, in which no call computes a step or ends.
WAIT_SECONDS_MAX = 60.0
# Finalisers free blocks without a notification, so a waiting call polls.
_LOOK_SECONDS, _LOOK_SECONDS_MAX = 0.01, 0.25


@dataclass(eq=False)
class GenerateCall:
    """A call of `generate` that has not ended."""

    depth: int = 1  # an assistant's `generate` runs within the model's
    frame: int = 0  # id of the frame of the outermost `generate`
    num_rows: int = 0  # rows of the batch, and their most columns; 0 if unknown
    num_columns: int = 0
    prompts: Prompts | None = None  # None if every row is computed and stored whole
    ticket: float = math.inf  # calls take turns in this order; infinite before `await_turn`
    claimed_bytes: int | None = None  # None before its turn
    waiting: int | None = None  # the number of ended calls at its last attempt; None if it runs
    moves: int = -1  # the number of steps and ended calls when it last waited
    waited_seconds: float = 0.0  # since `moves` last changed
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # made in this call

    def num_blocks(self, size: int, window: int | None = None) -> int:
        """Return the most blocks of `size` tokens that all rows take at full length. O(prompts).

        Rows of one prompt share its full blocks, as long as no window leaves them behind.
        """
        columns = self.num_columns
        # A row holds up to two blocks beyond its window.
        most = blocks_for(columns, size, (window,), max_chunk=size + 1)
        if self.prompts is None:
            return self.num_rows * most
        padding, prompt_columns, repeats = self.prompts
        shared = (prompt_columns - padding) // size if repeats > 1 else np.zeros_like(padding)
        own = -(-(max(columns, prompt_columns) - padding) // size) - shared
        return int(np.minimum(shared + repeats * own, repeats * most).sum())


class Prompts(NamedTuple):
    """The distinct prompts of a call, left-padded to `columns`; each begins `repeats` rows."""

    padding: Int64  # [prompts]
    columns: int
    repeats: int


class GenerateCalls:
    """The calls of `generate` that run now, at most one for each thread."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock, self._uninterrupted = lock, Uninterrupted(lock)
        self._changed = threading.Condition(lock)
        # By thread. Weak, so that no call waits for one that an interrupt kept from ending.
        self._calls: weakref.WeakValueDictionary[int, GenerateCall] = weakref.WeakValueDictionary()
        self._steps = self._ends = 0
        self._tickets = itertools.count()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Register a call of this thread inside the `with` block. Reset its caches if it raises."""
        thread = threading.get_ident()
        frame = id(sys._getframe(2))  # of the `with` statement; a frame of contextlib is between
        call: GenerateCall | None = None
        try:
            with self._lock, self._uninterrupted:
                call = self._calls.get(thread)
                # After an interrupt before the `try`, a call stays registered with its traceback.
                if call is None or not _is_running(call.frame):
                    call = self._calls[thread] = GenerateCall(depth=0, frame=frame)
                call.depth += 1
            yield
        except BaseException:
            # The traceback may keep the call's caches alive for ever.
            if call is not None and call.frame == frame:
                for cache in list(call.caches):
                    cache.reset()
            raise
        finally:
            with self._lock, self._uninterrupted:
                if call is not None:
                    call.depth -= 1
                    if call.frame == frame and self._calls.get(thread) is call:
                        del self._calls[thread]
                        self._ends += 1
                        self._changed.notify_all()

    def leave_behind(self) -> None:
        """Forget the calls of other threads, which do not exist in a forked process. O(calls)."""
        for thread in set(self._calls) - {threading.get_ident()}:
            del self._calls[thread]

    def current(self) -> GenerateCall | None:
        """Return this thread's call, or None outside of `generate`. O(1)."""
        return self._calls.get(threading.get_ident())

    def note_cache(self, cache: Any) -> None:
        """Record a cache that this thread's call has made. O(1)."""
        call = self.current()
        if call is not None:
            call.caches.add(cache)

    def note_size(self, num_rows: int, num_columns: int) -> None:
        """Record the rows of this thread's call, and their most columns. O(1)."""
        call = self.current()
        if call is not None and call.depth == 1:
            call.num_rows, call.num_columns = num_rows, num_columns

    def note_prompts(self, prompts: Prompts | None) -> None:
        """Record what rows of this thread's call share, and the padding they omit. O(1)."""
        call = self.current()
        if call is not None and call.depth == 1:
            call.prompts = prompts

    def note_step(self) -> None:
        """Record that a call has computed a step. O(1)."""
        self._steps += 1

    def await_turn(self, call: GenerateCall, num_bytes: int, bound: int) -> None:
        """Wait until `num_bytes` fit in `bound` beside the claims of other calls. O(calls)."""
        with self._lock:
            call.ticket = next(self._tickets)
            self.wait_for(lambda: self._fits(call, num_bytes, bound) or None)
            call.claimed_bytes = num_bytes

    def _fits(self, call: GenerateCall, num_bytes: int, bound: int) -> bool:
        others = self._others(call)
        begun = [each for each in others if each.claimed_bytes is not None]
        if any(each.waiting is not None for each in begun):
            return False
        # First come, first served: small calls must not starve a large call.
        if any(each.ticket < call.ticket for each in others if each.claimed_bytes is None):
            return False
        return not begun or sum(each.claimed_bytes or 0 for each in begun) + num_bytes <= bound

    def wait_for(self, attempt: Callable[[], _T | None]) -> _T | None:
        """Call `attempt` until it returns a result, while other calls may free memory.

        Returns None if no other call runs, or if none computes a step or ends for
        `WAIT_SECONDS_MAX`. The caller holds the lock; waiting releases it.
        """
        call = self.current() or GenerateCall()
        pause = _LOOK_SECONDS
        while (found := attempt()) is None:
            moves = self._steps + self._ends
            if moves != call.moves:
                call.moves, call.waited_seconds = moves, 0.0
            # A call that has made no attempt since the last call ended may find room.
            runs = any(each.waiting != self._ends for each in self._others(call))
            if not runs or call.waited_seconds > WAIT_SECONDS_MAX:
                return None
            call.waiting, began = self._ends, time.monotonic()
            try:
                with Deferral():
                    self._changed.wait(pause)
            finally:
                call.waiting = None
                call.waited_seconds += time.monotonic() - began
            pause = min(2 * pause, _LOOK_SECONDS_MAX)
        return found

    def _others(self, call: GenerateCall) -> list[GenerateCall]:
        return [each for each in self._calls.values() if each is not call]


def _is_running(frame: int) -> bool:
    """Return True if the frame with this id is on this thread's stack. O(frames)."""
    each = sys._getframe()
    while each is not None and id(each) != frame:
        each = each.f_back  # type: ignore[assignment]
    return each is not None
