"""Estimates of how long a store takes to load blocks, from its own transfers."""

from __future__ import annotations

import time
from collections.abc import Callable

_WEIGHT = 0.2  # of the newest measurement
_RETRY_S = 30.0


class TransferCost:
    """The latency and the bandwidth of one store, as moving averages. Any thread may call.

        load_s(bytes) = latency + bytes / bandwidth

    Latency is that of `find`, bandwidth that of `load`. A store that was not measured yet is
    estimated at no time at all, so that it is tried.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Measure with `clock`, in seconds."""
        self._clock = clock
        self._latency_s: float | None = None
        self._s_per_byte: float | None = None
        self._tried_at = clock()

    @property
    def latency_s(self) -> float:
        """The average seconds of a look-up, 0 if unknown. O(1)."""
        return self._latency_s or 0.0

    @property
    def bytes_per_s(self) -> float:
        """The average bandwidth, 0 if unknown. O(1)."""
        return 1 / self._s_per_byte if self._s_per_byte else 0.0

    def load_s(self, num_bytes: int) -> float:
        """Return the estimated seconds to load `num_bytes`. O(1)."""
        return self.latency_s + num_bytes * (self._s_per_byte or 0.0)

    def is_worth(self, num_bytes: int, other_s: float) -> bool:
        """Return True if loading is faster than `other_s`, or if it is time to try again. O(1)."""
        is_due = self._clock() - self._tried_at >= _RETRY_S
        return is_due or self.load_s(num_bytes) < other_s

    def found(self, seconds: float) -> None:
        """Record how long a look-up took. O(1)."""
        self._latency_s = _average(self._latency_s, seconds)

    def begin_load(self) -> None:
        """Record that a load begins. O(1)."""
        self._tried_at = self._clock()

    def loaded(self, num_bytes: int, seconds: float) -> None:
        """Record how long a load took. O(1)."""
        self._s_per_byte = _average(self._s_per_byte, seconds / num_bytes)


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)
