"""One connection to a server, and the commands a store needs, in RESP2.

redis-py connects: addresses, AUTH, ACL users and TLS are its own. It would copy each value several
times, so values go here between the socket and the caller's memory.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

from kvpager.integrations.valkey.sockets import DeadlineSocket, PlainSocket, TlsSocket

_LINE_END = b"\r\n"
_NIL = b"$-1"
_BUFFER_BYTES = 4096  # small: value bytes that land here are copied once more
_DIGITS_MAX = 15
_PIECE_BYTES = 256 << 10  # of a value, shown while they are in a core's cache

_Show = Callable[[memoryview], object]


class ServerError(Exception):
    """An error reply, such as "NOPERM ..."."""


class ProtocolError(ConnectionError):
    """A reply that does not answer the request. The connection is of no further use."""


class Value(Enum):
    """What the server had under a key."""

    WHOLE = "whole"  # of the expected length; the buffers hold it
    ABSENT = "absent"
    OTHER = "other"  # of another length; the buffers hold nothing


class Wire:
    """A connection of redis-py, used for values. One thread at a time."""

    def __init__(self, connection: Any) -> None:
        """Take over a connected `redis.connection.AbstractConnection`."""
        self._connection = connection
        connected = connection._sock
        secure = isinstance(connected, ssl.SSLSocket)
        self._socket: DeadlineSocket = (TlsSocket if secure else PlainSocket)(connected)
        self._arrivals = select.poll()
        self._arrivals.register(connected, select.POLLIN)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0  # bytes of the buffer that wait to be read
        self._owed = 0  # replies that wait to be read

    @property
    def in_step(self) -> bool:
        """True if the next byte to arrive answers the next request."""
        return not (self._owed or self._start < self._stop or self._arrivals.poll(0))

    def exists(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        """Return for each key whether the server has it. O(keys)."""
        self._ask([b"".join(_command(b"EXISTS", key) for key in keys)], len(keys), deadline)
        return [self._integer(deadline) > 0 for _ in keys]

    def mget(
        self,
        keys: Sequence[bytes],
        into: Sequence[Sequence[memoryview]],
        deadline: float,
        show: Sequence[_Show] = (),
    ) -> Iterator[Value]:
        """Read the value of each key into its buffers, one after the other. O(bytes).

        `show` has a function for each key. It is called with each piece of the last buffer as soon
        as the piece is there. Raises: `ProtocolError` after a value that is longer than its
        buffers.
        """
        self._ask([_command(b"MGET", *keys)], 1, deadline)
        if self._reply(deadline) != b"*%d" % len(keys):
            raise ProtocolError("a reply with another number of values")
        self._owed = len(keys)
        for buffers, each in zip(into, show or [_ignore] * len(into), strict=True):
            yield from self._value(buffers, deadline, each)

    def set_absent(
        self, key: bytes, value: Sequence[bytes | memoryview], ttl_s: int | None, deadline: float
    ) -> None:
        """Send a value that the server keeps unless it has the key. O(bytes)."""
        length = sum(len(part) for part in value)
        options = (b"NX",) if ttl_s is None else (b"NX", b"EX", b"%d" % ttl_s)
        head = b"*%d\r\n" % (3 + len(options)) + _bulk(b"SET") + _bulk(key) + b"$%d\r\n" % length
        tail = _LINE_END + b"".join(map(_bulk, options))
        self._ask((head, *value, tail), 1, deadline)

    def was_set(self, deadline: float) -> bool:
        """Return whether the server kept the value of the earliest `set_absent` not asked about.

        Raises: `ServerError` if it refused the value.
        """
        reply = self._reply(deadline)
        if reply not in (b"+OK", _NIL):
            raise ProtocolError("SET was answered by something else")
        return reply == b"+OK"

    def delete(self, keys: Sequence[bytes], deadline: float) -> None:
        """Delete keys. O(keys)."""
        self._ask([_command(b"DEL", *keys)], 1, deadline)
        self._integer(deadline)

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _ask(self, parts: Iterable[bytes | memoryview], replies: int, deadline: float) -> None:
        self._owed += replies
        self._socket.send(parts, deadline)

    def _value(
        self, buffers: Sequence[memoryview], deadline: float, show: _Show
    ) -> Iterator[Value]:
        line = self._reply(deadline)
        if line == _NIL:
            yield Value.ABSENT
            return
        length, expected = _number(line, b"$"), sum(len(buffer) for buffer in buffers)
        if length > expected:
            self._owed += 1  # its bytes stay where they are
            yield Value.OTHER
            raise ProtocolError(f"a value of {length} bytes, where {expected} were expected")
        if length < expected:
            self._read(memoryview(bytearray(length)), deadline)
        else:
            for buffer in buffers[:-1]:
                self._read(buffer, deadline)
            for piece in _pieces(buffers[-1:]):
                self._read(piece, deadline)
                show(piece)
        if self._line(deadline):
            raise ProtocolError("a value without an end")
        yield Value.WHOLE if length == expected else Value.OTHER

    def _integer(self, deadline: float) -> int:
        return _number(self._reply(deadline), b":")

    def _reply(self, deadline: float) -> bytes:
        line = self._line(deadline)
        self._owed -= 1
        if line[:1] == b"-":
            raise ServerError(line[1:].decode("ascii", "replace"))
        return line

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(_LINE_END, self._start, self._stop)) < 0:
            if self._start:
                self._buffer[: self._stop - self._start] = self._view[self._start : self._stop]
                self._start, self._stop = 0, self._stop - self._start
            if self._stop == _BUFFER_BYTES:
                raise ProtocolError("a line without an end")
            self._stop += self._socket.some(self._view[self._stop :], deadline)
        line = bytes(self._view[self._start : end])
        self._start = end + len(_LINE_END)
        return line

    def _read(self, into: memoryview, deadline: float) -> None:
        buffered = min(len(into), self._stop - self._start)
        into[:buffered] = self._view[self._start : self._start + buffered]
        self._start += buffered
        if buffered < len(into):
            self._socket.fill(into[buffered:], deadline)


def _ignore(piece: memoryview) -> None: ...


def _pieces(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    for buffer in buffers:
        for start in range(0, len(buffer), _PIECE_BYTES):
            yield buffer[start : start + _PIECE_BYTES]


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(map(_bulk, words))


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _number(line: bytes, kind: bytes) -> int:
    digits = line[1:]
    if line[:1] != kind or not digits.isdigit() or len(digits) > _DIGITS_MAX:
        raise ProtocolError("a reply of another kind")
    return int(digits)
