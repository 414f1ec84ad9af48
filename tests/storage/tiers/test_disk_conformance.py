"""The public suite of stores on `DiskStore`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.testing.stores import StoreConformance


class TestDiskStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder, self.num_made = tmp_path, 0

    def make_store(self, layout: BlockLayout, num_blocks: int) -> DiskStore:
        self.num_made += 1
        capacity = num_blocks * (2 * 4096 + 64)
        folder = self.folder / str(self.num_made)
        return DiskStore(folder, capacity, layout=layout, admit="always")

    def reopen(self, store: BlockStore, layout: BlockLayout) -> DiskStore:
        store.close()
        self.num_made -= 1
        return self.make_store(layout, self.num_blocks)

    def damage(self, store: BlockStore, key: bytes) -> None:
        path = self.folder / str(self.num_made) / "segment-00000"
        data = bytearray(path.read_bytes())
        data[data.index(key) - 32 + 4096 + 100] ^= 4
        path.write_bytes(data)
