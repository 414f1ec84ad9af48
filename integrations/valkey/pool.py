"""Connections that threads take in turns. One that is broken or out of step is thrown away."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvpager.integrations.valkey.wire import Wire


class WirePool:
    """Idle connections, the last used first. Any thread may call any method."""

    def __init__(self, connect: Callable[[float], Wire]) -> None:
        """Make connections with `connect(deadline)`, when none is idle."""
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._process = os.getpid()
        self._closed = False

    @contextmanager
    def wire(self, deadline: float) -> Iterator[Wire]:
        """Lend a connection. Raises what `connect` raises."""
        wire = self._take() or self._connect(deadline)
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        self._give_back(wire)

    def close(self) -> None:
        """Close idle connections now, and those lent when they come back."""
        with self._lock:
            self._closed, idle = True, self._idle
            self._idle = []
        for wire in idle:
            wire.close()

    def _take(self) -> Wire | None:
        with self._lock:
            if self._process != os.getpid():
                # After a fork the connections belong to the parent.
                self._process, self._idle = os.getpid(), []
            while self._idle:
                wire = self._idle.pop()
                if wire.in_step:
                    return wire
                wire.close()
        return None

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            if wire.in_step and not self._closed:
                self._idle.append(wire)
                return
        wire.close()
