"""`ValkeyStore` has the properties of a `BlockStore`, over TCP and over a Unix socket."""

from __future__ import annotations

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.testing.stores import StoreConformance
from tests.support.valkey_blocks import FRAME_AT, open_store
from tests.support.valkey_servers import Server


class TestOverTcp(StoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server
        self.url = server.url

    def make_store(self, layout: BlockLayout, num_blocks: int) -> BlockStore:
        self.server.ask(b"FLUSHALL")
        store: ValkeyStore = open_store(self.url, layout)
        return store

    def reopen(self, store: BlockStore, layout: BlockLayout) -> BlockStore:
        store.close()
        return open_store(self.url, layout)

    def damage(self, store: BlockStore, key: bytes) -> None:
        self.server.ask(b"SETRANGE", b"kvp1:" + key, b"%d" % (FRAME_AT + 100), b"damage")


class TestOverUnixSockets(TestOverTcp):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server
        self.url = server.unix_url
