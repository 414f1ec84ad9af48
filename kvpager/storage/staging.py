"""Host memory through which blocks pass between a storage and the tiers below it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvpager import _validate as arguments
from kvpager.plans import Int32
from kvpager.storage import streams
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.memory import host_pages, populate
from kvpager.storage.tiers.host import HostStore

_READY_BYTES = 64 << 20  # provided by the system before the first transfer


class Staging:
    """Slots of one block each, page-aligned; page-locked if the storage is on a GPU.

    `take` gives a slot to a caller, and `share` to a further one: the last `give` frees it. A slot
    is reused only when no copy reads it any more. Any thread may call `take`, `share`, `give` and
    `slot`.

    Attributes:
        store: the store that owns the slots: it keeps a staged block without a copy. None if the
            slots are only a buffer.
    """

    store: HostStore | None

    def __init__(self, storage: BlockStorage, num_slots: int) -> None:
        """Allocate `num_slots` slots for blocks of `storage`. O(bytes) if page-locked.

        Otherwise the system provides 64 MiB now, and more when it is written.
        """
        num_slots = arguments.count("num_slots", num_slots, at_least=1)
        tier = storage.tier()
        memory = host_pages(num_slots, tier.shape[1], tier.dtype, pinned=tier.is_cuda)
        if not tier.is_cuda:
            populate(memory, _READY_BYTES)
        self._begin(storage, memory, HostStore.over(_bytes(memory)))
        self.store, self._num_usable = None, num_slots

    @classmethod
    def of_host(cls, storage: BlockStorage) -> Staging:
        """Return slots, and their store, in the host blocks of `storage`. O(slots).

        `manager.host.lend_to(staging)` lends it the blocks that no swapped sequence needs.
        """
        return cls.within(storage, HostStore.over(_bytes(storage.tier("host")), is_free=False))

    @classmethod
    def within(cls, storage: BlockStorage, store: HostStore) -> Staging:
        """Return the slots of `store`, all of which are taken. O(1).

        `borrow` says which ones to use. `take` hands out at most half of these; hits that the store
        pins do not count.
        """
        staging = cls.__new__(cls)
        memory = torch.from_numpy(store.memory).view(storage.tier().dtype)
        staging._begin(storage, memory, store)
        staging.store, staging._num_usable = store, 0
        return staging

    def _begin(self, storage: BlockStorage, memory: Tensor, slots: HostStore) -> None:
        self.block_bytes, self.num_slots = storage.block_bytes, len(memory)
        self._storage, self._memory, self._slots = storage, memory, slots
        self._bytes = slots.memory.data.cast("B")
        self._unfinished: list[tuple[torch.cuda.Event, list[int]]] = []
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Slots that `take` would return. O(copies under way)."""
        self._reclaim()
        if self.store is None:
            return self._slots.num_available
        under_way = self._num_usable - self.store.capacity
        most = max(self._num_usable // 2, 1)
        return max(min(most - under_way, self._slots.num_available), 0)

    def take(self, count: int) -> list[int]:
        """Return up to `count` free slots. Evicts blocks of `store` if needed. O(slots)."""
        return self._slots.take(min(count, self.num_free), partly=True)

    def share(self, slots: Iterable[int]) -> None:
        """Keep slots from being reused until one more `give`. O(slots)."""
        self._slots.share(slots)

    def give(self, slots: Iterable[int]) -> None:
        """Give slots back. O(slots)."""
        self._slots.give(slots)

    def slot(self, number: int) -> memoryview:
        """Return the bytes of a slot. O(1)."""
        return self._bytes[number * self.block_bytes : (number + 1) * self.block_bytes]

    def read(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy blocks of the storage to slots, and wait for the copies. O(bytes)."""
        copies = np.array([blocks, slots], np.int32).T
        streams.copy_across(self._storage.tier(), self._memory, copies)

    def write(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy slots to blocks of the storage, and give the slots back. O(bytes)."""
        copies = np.array([slots, blocks], np.int32).T
        event = streams.copy_across(self._memory, self._storage.tier(), copies)
        if event is None:
            self.give(slots)
        else:
            with self._lock:
                self._unfinished.append((event, list(slots)))

    def _reclaim(self) -> None:
        with self._lock:
            while self._unfinished and self._unfinished[0][0].query():
                self.give(self._unfinished.pop(0)[1])

    # ---------------------------------------------------------------- host blocks

    def borrow(self, blocks: Int32) -> None:
        """Use host blocks that no sequence needs, until `give_back`. O(blocks).

        Waits until copies out of host memory have ended.
        """
        self._storage.tier("host")
        self._num_usable += len(blocks)
        self._slots.give(blocks)

    def give_back(self, count: int) -> list[int]:
        """Return `count` borrowed blocks; none if too few can leave. O(count log blocks).

        Evicts cached blocks for that, least recently used first.
        """
        self._reclaim()
        blocks = self._slots.take(count)
        self._num_usable -= len(blocks)
        return blocks


def _bytes(memory: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return memory.view(torch.uint8).numpy()
