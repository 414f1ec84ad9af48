"""A link between clients and a server that cuts replies off, or passes them slowly."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.support.valkey_servers import Server


class Link:
    """Passes bytes between clients and a server. Requests pass at once.

    Attributes:
        left: the bytes of replies that still pass; all others are held back.
        rate: bytes of replies that pass in a second; None for no limit.
    """

    def __init__(self, server: Server, passing: int = 1 << 40, rate: int | None = None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"valkey://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server, self.left, self.rate = server, passing, rate
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

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def _pass_replies(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16 if self.rate is None else 32):
                data = data[: max(0, self.left)]
                self.left -= len(data)
                if self.rate is not None:
                    self.closing.wait(len(data) / self.rate)
                sink.sendall(data)

    def close(self) -> None:
        self.closing.set()
        for each in [self.listener, *self.sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self.threads:
            thread.join()
