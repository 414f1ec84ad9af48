"""A server for all tests of a file, emptied before each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.valkey_servers import Server, valkey


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
def server(_running: Server) -> Server:
    _running.ask(b"FLUSHALL")
    return _running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may stop, kill and replace."""
    server = valkey(tmp_path)
    yield server
    server.stop()
