"""A link between clients and a server that cuts replies off, or passes them slowly."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.support.valkey_servers import Server


class Link:
    """Passes bytes between clients and a server.

    Attributes:
        left: the bytes of replies that still pass; all others are held back.
        rate: bytes of replies that pass in a second; None for no limit.
        request_rate: the same for requests.
    """

    def __init__(self, server: Server, passing: int = 1 << 40, rate: int | None = None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"valkey://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server, self.left, self.rate = server, passing, rate
        self.request_rate: int | None = None
        self.sockets: list[socket.socket] = []
        self.closing = threading.Event()
        self.threads = [threading.Thread(target=self._serve)]
        self.threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.server.port))
            self.sockets += [client, server]
            self.threads += [
                threading.Thread(target=self._pass, args=(client, server)),
                threading.Thread(target=self._pass_replies, args=(server, client)),
            ]
            for thread in self.threads[-2:]:
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_at_once(self.request_rate)):
                self._hold_back(data, self.request_rate)
                sink.sendall(data)

    def _pass_replies(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_at_once(self.rate)):
                data = data[: max(0, self.left)]
                self.left -= len(data)
                self._hold_back(data, self.rate)
                sink.sendall(data)

    def _hold_back(self, data: bytes, rate: int | None) -> None:
        if rate is not None:
            self.closing.wait(len(data) / rate)

    def close(self) -> None:
        self.closing.set()
        for each in [self.listener, *self.sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self.threads:
            thread.join()


def _at_once(rate: int | None) -> int:
    """Return how many bytes to pass at once: what passes in 10 ms, at least 32."""
    return 1 << 16 if rate is None else max(32, rate // 100)
