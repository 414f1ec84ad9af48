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
        self._probing = False

    @property
    def open(self) -> bool:
        """True while the store is bypassed."""
        return self._wait_s > 0

    def allows(self) -> bool:
        """Return whether a call may use the store. It must then report its end. O(1)."""
        with self._lock:
            if not self._wait_s:
                return True
            now = self._clock()
            if now < self._probe_at:
                return False
            # This call is the probe. The others wait for its end, or for as long again.
            self._probing, self._probe_at = True, now + self._wait_s
            return True

    def succeeded(self) -> None:
        """Report a call that the store answered in time. O(1)."""
        with self._lock:
            if self._wait_s:
                self._wait_s, self._probing = 0.0, False
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
            elif self._probing:
                self._wait_s = min(2 * self._wait_s, _WAIT_MAX_S)
            else:
                return  # the call began before the store was bypassed
            self._probing, self._probe_at = False, now + self._wait_s
