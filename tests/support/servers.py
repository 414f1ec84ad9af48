"""What tests of servers share: a free port, and waiting until a server accepts connections."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[str], log: Path) -> None:
    """Return when the server accepts connections; fail with its log if it ends first."""
    while process.poll() is None:
        with socket.socket() as connection:
            connection.settimeout(1)
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
    pytest.fail(log.read_text())
