"""The part of a patch's host memory that its rows do not use: cached prompts use it."""

from __future__ import annotations

import numpy as np

from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.layout import BlockLayout


class HostShare:
    """Slots for cached blocks in the bytes that rows leave. The caller holds the lock of the pools.

    Attributes:
        staging: the slots, and their store.
    """

    def __init__(self, storage: BlockStorage, layout: BlockLayout, capacity: int) -> None:
        """Reserve addresses for the blocks that fit into `capacity` bytes, but use none of them.

        Raises: `ValueError` if not even one block fits; `MemoryError` if the system refuses.
        """
        store = HostStore(capacity, layout=layout)
        self._store = store
        self._unused = store.take(len(store.memory))
        self.staging = Staging.within(storage, store)

    def fit(self, num_bytes: int) -> None:
        """Use at most `num_bytes` from now on. O(slots that change).

        Evicts cached blocks if they use more. Blocks that are being copied stay until a later call.
        """
        num_slots = len(self._store.memory)
        surplus = num_slots - len(self._unused) - num_bytes // self._store.block_bytes
        if surplus > 0:
            slots = self.staging.give_back(min(surplus, self._store.num_available))
            self._store.clear(slots)
            self._unused += slots
        elif surplus < 0:
            slots, self._unused = self._unused[surplus:], self._unused[:surplus]
            self.staging.borrow(np.array(slots, np.int32))
