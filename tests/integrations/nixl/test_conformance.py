"""`NixlStore` keeps the promises of `BlockStore`: with a fake of NIXL, and with NIXL itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpager.integrations.nixl import NixlStore, agent, store
from kvpager.storage.tiers.disk.segments import slot_bytes
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.testing.stores import StoreConformance
from tests.support.fake_nixl import FakeAgent


class NixlConformance(StoreConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path / "blocks"
        yield
        assert not self.path.exists() or not os.listdir(self.path)

    def make_store(self, layout: BlockLayout, num_blocks: int) -> NixlStore:
        capacity = num_blocks * slot_bytes(layout.block_bytes)
        return NixlStore(self.path, capacity, layout=layout)

    def damage(self, store: NixlStore, key: bytes) -> None:
        [slot] = store._tier.pin([key]).tolist()
        store._tier.unpin([slot])
        offset, _, number = store._mover._place.region(slot)
        self.flip(number, offset + 4096 + 7)

    def flip(self, number: int, offset: int) -> None:
        """Flip a bit of the file `number`, without its name and its direct I/O."""
        file = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
        [byte] = os.pread(file, 1, offset)
        os.pwrite(file, bytes([byte ^ 1]), offset)
        os.close(file)


class TestFiles(NixlConformance):
    @pytest.fixture(autouse=True)
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "open_agent", lambda backend, options: FakeAgent())


class TestObjects(NixlConformance):
    @pytest.fixture(autouse=True)
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def open_agent(backend: str, options: dict[str, str]) -> FakeAgent:
            self.agent = FakeAgent("OBJ")
            return self.agent

        monkeypatch.setattr(store, "open_agent", open_agent)

    def flip(self, number: int, offset: int) -> None:
        data = bytearray(self.agent.objects[number])
        data[offset] ^= 1
        self.agent.objects[number] = bytes(data)


class TestPosix(NixlConformance):
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        if not any(map(agent.find_spec, agent.PACKAGES)):
            pytest.skip("NIXL is not installed: pip install 'kvpager[nixl]'")
