"""A circuit breaker: a store that fails again and again is bypassed for a while."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_FAILURES, _WITHIN_S = 3, 10.0
_WAIT_MIN_S, _WAIT_MAX_S = 1.0, 60.0


class CircuitBreaker:
    """Bypasses a store after 3 failures within 10 s. Any thread may call any method.

    A bypassed store gets one call, the probe, after 1 s. If the probe fails, the next one follows
    after 2, 4, .. and at most 60 s. If it succeeds, the store is used again. (Nygard, "Release
    It!", 2007)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Use the store until it fails. `clock` returns seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._wait_s = 0.0  # 0 while the store is in use
        self._probe_at = 0.0
        self._prober: int | None = None  # the thread whose call is the probe

    @property
    def open(self) -> bool:
        """True while the store is bypassed."""
        return self._wait_s > 0

    def allows(self) -> bool:
        """Return whether a call may use the store. O(1).

        The thread of the call then reports its end, unless that says nothing about the store.
        """
        with self._lock:
            if not self._wait_s:
                return True
            now = self._clock()
            if now < self._probe_at:
                return False
            # This call is the probe. The others wait for its end, or for as long again.
            self._prober, self._probe_at = threading.get_ident(), now + self._wait_s
            return True

    def succeeded(self) -> None:
        """Report a call that the store answered in time. O(1)."""
        with self._lock:
            if self._is_probe():
                self._wait_s, self._prober = 0.0, None
                self._failures.clear()

    def failed(self) -> None:
        """Report a call that failed or came late. O(1)."""
        with self._lock:
            now = self._clock()
            if not self._wait_s:
                self._failures.append(now)
                if len(self._failures) < _FAILURES or now - self._failures[0] > _WITHIN_S:
                    return
                self._wait_s = _WAIT_MIN_S
            elif self._is_probe():
                self._wait_s = min(2 * self._wait_s, _WAIT_MAX_S)
            else:
                return  # the call began before the store was bypassed
            self._prober, self._probe_at = None, now + self._wait_s

    def _is_probe(self) -> bool:
        """Return True unless the call of this thread began before the store was bypassed."""
        return self._prober == threading.get_ident()
