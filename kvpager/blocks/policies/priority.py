"""Retention by priority and time."""

from __future__ import annotations

import contextlib
import heapq
import logging
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from kvpager.blocks.policies.base import Blocks, Rank
from kvpager.blocks.policies.lru import LRU
from kvpager.plans import NO_BLOCKS, Float64, Int32, Int64, UInt64

logger = logging.getLogger("kvpager")

PRIORITY_MAX = 100
PRIORITY_DEFAULT = 50
# A rank is a float64, exact up to 2**53: high bits are the priority, low bits the time.
_TICKS = 2.0**44
_OUTDATED_MAX = 64


class Priority(LRU):
    """Evicts by priority, 0 to 100, lowest first; then least recently used first.

    A block starts at 50. `retain` sets its priority until a time to live expires, or until it is
    evicted. An expired block is evicted first. The idea is TensorRT-LLM's.
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        **LRU.COLUMNS,
        "priority": np.int32,
        "expires": np.float64,
    }
    priority: Int32
    expires: Float64

    def __init__(self, num_blocks: int, clock: Callable[[], float] = time.time) -> None:
        super().__init__(num_blocks)
        self.expires[:] = np.inf
        self._clock = clock
        self._due: list[tuple[float, int]] = []

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        self.priority[blocks] = PRIORITY_DEFAULT
        self.expires[blocks] = np.inf

    def retain(self, blocks: Blocks, priority: int, ttl_s: float | None) -> bool:  # noqa: D102
        # Read the clock before any change: it may be the caller's, and raise.
        expires = np.inf if ttl_s is None else float(self._clock() + ttl_s)
        self.priority[blocks] = priority
        self.expires[blocks] = expires
        if ttl_s is not None:
            for block in blocks.tolist():
                heapq.heappush(self._due, (expires, block))
        if len(self._due) > 2 * self.num_blocks + _OUTDATED_MAX:
            self._await()
        return True

    def reranked(self, count: int) -> Int32:  # noqa: D102
        if not self._due:
            return NO_BLOCKS
        try:
            now = float(self._clock())
        except BaseException as error:
            # An eviction is under way: continue as if no time had passed.
            with contextlib.suppress(Exception):  # raised by a log handler of the caller
                logger.error("the clock of the eviction policy failed: %r", error)
            return NO_BLOCKS
        over = []
        while self._due and self._due[0][0] <= now:
            expires, block = heapq.heappop(self._due)
            if self.expires[block] == expires:
                self.priority[block] = -1
                self.expires[block] = np.inf
                over.append(block)
        return np.array(over, np.int32)

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        self.expires[blocks] = np.inf

    def rank(self, blocks: Blocks) -> Rank:  # noqa: D102
        return np.asarray(self.priority[blocks] * _TICKS + self.last_used[blocks], np.float64)

    def resize(self, num_blocks: int, places: Int32) -> None:  # noqa: D102
        super().resize(num_blocks, places)
        self.expires[len(places) :] = np.inf
        self._await()

    def _await(self) -> None:
        dated = np.flatnonzero(np.isfinite(self.expires))
        self._due = list(zip(self.expires[dated].tolist(), dated.tolist(), strict=True))
        heapq.heapify(self._due)
