"""A wire believes no reply: whatever a peer sends, a read ends and stays in its buffers."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpager.integrations.valkey.pool import WirePool
from kvpager.integrations.valkey.sockets import PlainSocket
from kvpager.integrations.valkey.wire import ProtocolError, ServerError, Value, Wire

KEYS = [b"a", b"b"]
WHOLE = b"*2\r\n$4\r\nfour\r\n$-1\r\n"


class Connection:
    """What a wire takes from redis-py: a socket, and a way to close it."""

    def __init__(self, connected: socket.socket) -> None:
        self._sock = connected

    def disconnect(self) -> None:
        self._sock.close()


class Peer:
    """The other end of a wire."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.connection = Connection(ours)
        self.wire = Wire(self.connection)

    def says(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()
        self.connection.disconnect()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def soon() -> float:
    return time.monotonic() + 60


def read(wire: Wire, deadline: float | None = None) -> list[tuple[Value, bytes]]:
    """Read two values of four bytes, each in two buffers."""
    room = [bytearray(b"......") for _ in KEYS]
    into = [(memoryview(each)[1:2], memoryview(each)[2:5]) for each in room]
    found = []
    for value, each in zip(
        wire.mget(KEYS, into, soon() if deadline is None else deadline), room, strict=True
    ):
        assert (each[0], each[-1]) == (b"."[0], b"."[0]), "a read left its buffers"
        found.append((value, bytes(each[1:-1]) if value is Value.WHOLE else b""))
    return found


def test_values_land_in_their_buffers(peer: Peer) -> None:
    peer.says(WHOLE)
    assert read(peer.wire) == [(Value.WHOLE, b"four"), (Value.ABSENT, b"")]
    assert peer.wire.in_step
    assert peer.socket.recv(100) == b"*3\r\n$4\r\nMGET\r\n$1\r\na\r\n$1\r\nb\r\n"


def test_replies_may_come_in_any_pieces(peer: Peer) -> None:
    for cut in range(1, len(WHOLE)):
        start = threading.Event()

        def trickle(cut: int = cut, start: threading.Event = start) -> None:
            peer.says(WHOLE[:cut])
            start.wait()
            peer.says(WHOLE[cut:])

        sender = threading.Thread(target=trickle)
        sender.start()
        start.set()
        assert read(peer.wire) == [(Value.WHOLE, b"four"), (Value.ABSENT, b"")]
        sender.join()


def test_the_last_buffer_is_shown_in_pieces(peer: Peer) -> None:
    value = bytes(range(256)) * 4096
    shown: list[bytes] = []
    into = [(memoryview(bytearray(5)), memoryview(bytearray(len(value) - 5))), (), ()]
    sender = threading.Thread(
        target=lambda: peer.says(b"*3\r\n$%d\r\n%b\r\n$-1\r\n$0\r\n\r\n" % (len(value), value))
    )
    sender.start()
    show = [lambda piece: shown.append(bytes(piece))] * 3
    found = list(peer.wire.mget([*KEYS, b"c"], into, soon(), show))
    sender.join()
    assert found == [Value.WHOLE, Value.ABSENT, Value.WHOLE]
    assert b"".join(shown) == into[0][1] == value[5:]
    assert len(shown) > 1


def test_a_shorter_value_is_skipped(peer: Peer) -> None:
    peer.says(b"*2\r\n$3\r\nshe\r\n$4\r\nfour\r\n")
    assert read(peer.wire) == [(Value.OTHER, b""), (Value.WHOLE, b"four")]
    assert peer.wire.in_step


def test_a_longer_value_ends_the_connection_unread(peer: Peer) -> None:
    peer.says(b"*2\r\n$999999999999999\r\nlonger")
    values = peer.wire.mget(KEYS, [(memoryview(bytearray(4)),)] * 2, soon())
    assert next(values) is Value.OTHER
    with pytest.raises(ProtocolError, match="a value of 999999999999999 bytes, where 4"):
        next(values)
    assert not peer.wire.in_step


@pytest.mark.parametrize(
    "reply",
    [
        b"*3\r\n$-1\r\n$-1\r\n$-1\r\n",
        b"$4\r\nfour\r\n",
        b"*2\r\n:4\r\n",
        b"*2\r\n$4x\r\nfour\r\n",
        b"*2\r\n$-4\r\nfour\r\n",
        b"*2\r\n$" + b"9" * 16 + b"\r\n",
        b"*2\r\n$\r\n",
        b"*2\r\n$4\r\nfourX\r\n$-1\r\n",
        b"*2\r\n$3\r\nfour\r\n$-1\r\n",
        b"x" * 5000,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46\r\n",
    ],
)
def test_a_reply_that_is_none_ends_the_connection(peer: Peer, reply: bytes) -> None:
    peer.says(reply)
    with pytest.raises(ProtocolError):
        read(peer.wire)


@pytest.mark.parametrize("reply", [b"", b"*2", b"*2\r\n$4\r\nfo", b"*2\r\n$4\r\nfour"])
def test_a_peer_that_leaves_is_noticed(peer: Peer, reply: bytes) -> None:
    peer.says(reply)
    peer.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        read(peer.wire)
    assert not peer.wire.in_step


@pytest.mark.parametrize("reply", [b"", b"*2", b"*2\r\n$4\r\nfo", b"*2\r\n$4\r\nfour"])
def test_a_peer_that_falls_silent_costs_one_deadline(peer: Peer, reply: bytes) -> None:
    peer.says(reply)
    with pytest.raises(TimeoutError):
        read(peer.wire, time.monotonic() + 0.01)
    assert not peer.wire.in_step


def test_a_peer_that_does_not_read_costs_one_deadline(peer: Peer) -> None:
    value = memoryview(bytes(50_000_000))
    with pytest.raises(TimeoutError):
        peer.wire.set_absent(b"a", [value], None, time.monotonic() + 0.05)
    assert not peer.wire.in_step


def test_nothing_is_sent_after_a_deadline(peer: Peer) -> None:
    with pytest.raises(TimeoutError):
        peer.wire.exists(KEYS, time.monotonic() - 1)
    peer.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.socket.recv(1)


def test_an_endless_deadline_is_one(peer: Peer) -> None:
    peer.says(b":1\r\n:0\r\n")
    assert peer.wire.exists(KEYS, float("inf")) == [True, False]


def test_an_error_reply_is_raised_and_leaves_the_wire_in_step(peer: Peer) -> None:
    for _ in range(2):
        peer.wire.set_absent(b"a", [b"value"], 7, soon())
    peer.says(b"-OOM no room\r\n+OK\r\n")
    with pytest.raises(ServerError, match="OOM no room"):
        peer.wire.was_set(soon())
    assert peer.wire.was_set(soon())
    assert peer.wire.in_step
    sent = b"*6\r\n$3\r\nSET\r\n$1\r\na\r\n$5\r\nvalue\r\n$2\r\nNX\r\n$2\r\nEX\r\n$1\r\n7\r\n"
    assert peer.socket.recv(1000) == sent * 2


def test_bytes_nobody_asked_for_put_a_wire_out_of_step(peer: Peer) -> None:
    assert peer.wire.in_step
    peer.says(b"+OK\r\n")
    assert not peer.wire.in_step


LINES = st.sampled_from([b"*2", b"$4", b"$-1", b"$3", b"$5", b":1", b"-ERR", b"+OK", b"four", b"_"])


@given(st.lists(st.one_of(LINES, st.binary(max_size=8)), max_size=8), st.booleans())
def test_any_reply_ends_and_stays_in_its_buffers(lines: list[bytes], framed: bool) -> None:
    peer = Peer()
    try:
        peer.says(b"".join(line + b"\r\n" for line in ([b"*2"] if framed else []) + lines))
        peer.socket.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError, ServerError):
            for value, content in read(peer.wire):
                assert value is not Value.WHOLE or content in b"\r\n".join(lines) + b"\r\n"
    finally:
        peer.close()


# ------------------------------------------------------------- the pool


class Peers:
    """Connects wires to peers of their own."""

    def __init__(self) -> None:
        self.all: list[Peer] = []

    def connect(self, deadline: float) -> Wire:
        self.all.append(Peer())
        return self.all[-1].wire


@pytest.fixture
def peers() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    for peer in peers.all:
        peer.close()


def closed(peer: Peer) -> bool:
    return peer.connection._sock.fileno() < 0


def test_a_wire_in_step_is_lent_again(peers: Peers) -> None:
    pool = WirePool(peers.connect)
    with pool.wire(soon()), pool.wire(soon()):
        pass
    with pool.wire(soon()):
        pass
    assert len(peers.all) == 2
    pool.close()
    assert all(map(closed, peers.all))


def test_a_wire_out_of_step_is_closed(peers: Peers) -> None:
    pool = WirePool(peers.connect)
    with pool.wire(soon()) as wire:
        wire.set_absent(b"a", [b"value"], None, soon())  # its reply is not read
    assert closed(peers.all[0])
    with pool.wire(soon()):
        pass
    peers.all[1].says(b"+OK\r\n")  # unasked, while the wire is idle
    with pool.wire(soon()):
        pass
    assert closed(peers.all[1])
    peers.all[2].socket.close()
    with pool.wire(soon()):
        pass
    assert len(peers.all) == 4


def test_a_wire_that_failed_is_closed(peers: Peers) -> None:
    pool = WirePool(peers.connect)
    with pytest.raises(KeyboardInterrupt), pool.wire(soon()):
        raise KeyboardInterrupt
    assert closed(peers.all[0])


def test_a_wire_that_comes_back_to_a_closed_pool_is_closed(peers: Peers) -> None:
    pool = WirePool(peers.connect)
    with pool.wire(soon()):
        pool.close()
    assert closed(peers.all[0])


def test_a_forked_process_uses_none_of_its_parents_wires(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = WirePool(peers.connect)
    with pool.wire(soon()):
        pass
    module: Any = "kvpager.integrations.valkey.pool.os.getpid"
    monkeypatch.setattr(module, lambda: -1)
    with pool.wire(soon()):
        pass
    assert len(peers.all) == 2
    assert not closed(peers.all[0]), "the parent goes on using it"


class Connected:
    """A TCP socket between two addresses."""

    family = socket.AF_INET

    def __init__(self, own: str, peer: str) -> None:
        self.addresses, self.options = (own, peer), list[tuple[int, int]]()

    def settimeout(self, seconds: float | None) -> None: ...

    def getsockname(self) -> tuple[str, int]:
        return self.addresses[0], 1

    def getpeername(self) -> tuple[str, int]:
        if not self.addresses[1]:
            raise OSError(errno.ENOTCONN, "gone")
        return self.addresses[1], 2

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.options.append((option, value))


def test_the_send_buffer_is_chosen_for_a_server_of_this_machine_only() -> None:
    ours, other = socket.socketpair()
    with ours, other:
        before = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        PlainSocket(ours)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) != before
    for own, peer, is_local in (
        ("127.0.0.1", "127.0.0.1", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False),  # the system chooses
        ("10.0.0.7", "", False),
    ):
        connected = Connected(own, peer)
        PlainSocket(connected)  # type: ignore[arg-type]
        assert connected.options == [(socket.SO_SNDBUF, 256 << 10)] * is_local
