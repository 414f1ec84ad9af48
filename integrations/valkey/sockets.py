"""Sockets whose calls end at a deadline, a time of `time.monotonic()`.

`some` reads at least one byte, `fill` a whole buffer, `send` writes all parts without joining them.
Each raises `TimeoutError` after its deadline, and `ConnectionError` when the peer has gone.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterable
from typing import Protocol

_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_SECONDS_MIN, _SECONDS_MAX = 1e-6, 1e6  # zero would mean without end
_LIMIT_SLACK = 1.1  # keep a limit up to this multiple of the time left: fewer system calls
# On its way to a server of this machine: more would leave a core's cache, less would need more
# wake-ups. A distant server needs more on its way, as much as the system finds out.
_SEND_BUFFER_BYTES = 256 << 10


def seconds_left(deadline: float) -> float:
    """Return the time until `deadline`. Raises: `TimeoutError` if it has passed. O(1)."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return min(max(left, _SECONDS_MIN), _SECONDS_MAX)


class DeadlineSocket(Protocol):
    """A connected socket."""

    def some(self, into: memoryview, deadline: float) -> int:
        """Read at least one byte. Returns how many."""
        ...

    def fill(self, into: memoryview, deadline: float) -> None:
        """Read until `into` is full. O(bytes)."""
        ...

    def send(self, parts: Iterable[bytes | memoryview], deadline: float) -> None:
        """Write all parts. O(bytes)."""
        ...


class PlainSocket:
    """A TCP or Unix socket. One call into the kernel moves a whole value.

    The kernel keeps the time. Python's own timeouts would take the interpreter lock for each
    piece that arrives, and threads that compute would delay every piece.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket."""
        connected.settimeout(None)
        if _is_local(connected):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket = connected
        self._limits: dict[int, float] = {}  # seconds of a call, by option

    def some(self, into: memoryview, deadline: float) -> int:
        """Read at least one byte. Returns how many."""
        return self._receive(into, deadline, 0)

    def fill(self, into: memoryview, deadline: float) -> None:
        """Read until `into` is full. O(bytes)."""
        while into:
            into = into[self._receive(into, deadline, socket.MSG_WAITALL) :]

    def send(self, parts: Iterable[bytes | memoryview], deadline: float) -> None:
        """Write all parts. O(bytes)."""
        views = [memoryview(part) for part in parts]
        while views:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self._socket.sendmsg(views)
            except BlockingIOError:
                raise TimeoutError("sending took too long") from None
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _receive(self, into: memoryview, deadline: float, flags: int) -> int:
        self._limit(socket.SO_RCVTIMEO, deadline)
        try:
            return _some(self._socket.recv_into(into, 0, flags))
        except BlockingIOError:
            raise TimeoutError("receiving took too long") from None

    def _limit(self, option: int, deadline: float) -> None:
        left = seconds_left(deadline)
        if left <= self._limits.get(option, 0.0) <= left * _LIMIT_SLACK:
            return
        seconds, micros = divmod(max(1, int(left * 1e6)), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, micros))
        self._limits[option] = left


class TlsSocket:
    """A socket under TLS, which moves a record of at most 16 KiB per call."""

    def __init__(self, connected: ssl.SSLSocket) -> None:
        """Take over a connected socket."""
        self._socket = connected

    def some(self, into: memoryview, deadline: float) -> int:
        """Read at least one byte. Returns how many."""
        self._socket.settimeout(seconds_left(deadline))
        return _some(self._socket.recv_into(into))

    def fill(self, into: memoryview, deadline: float) -> None:
        """Read until `into` is full. O(bytes)."""
        while into:
            into = into[self.some(into, deadline) :]

    def send(self, parts: Iterable[bytes | memoryview], deadline: float) -> None:
        """Write all parts. O(bytes)."""
        for part in parts:  # TLS cannot gather
            view = memoryview(part)
            while view:
                self._socket.settimeout(seconds_left(deadline))
                view = view[self._socket.send(view) :]


def _is_local(connected: socket.socket) -> bool:
    """Return True if the peer is on this machine, as far as its address tells."""
    if connected.family == socket.AF_UNIX:
        return True
    try:
        return bool(connected.getsockname()[0] == connected.getpeername()[0])
    except OSError:  # the peer has gone, as the next call says
        return False


def _some(received: int) -> int:
    if not received:
        raise ConnectionError("the server closed the connection")
    return received
