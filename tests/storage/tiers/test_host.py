"""The store in host memory, and the public suite of stores on it."""

from __future__ import annotations

from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.testing.stores import StoreConformance


class TestHostStore(StoreConformance):
    def make_store(self, layout: BlockLayout, num_blocks: int) -> HostStore:
        return HostStore(num_blocks * layout.block_bytes, layout=layout)
