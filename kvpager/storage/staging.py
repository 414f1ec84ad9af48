"""Host memory through which blocks pass between a storage and the tiers below it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kvpager import _validate as arguments
from kvpager.storage import streams
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.memory import host_pages


class Staging:
    """Slots of one block each, page-aligned; page-locked if the storage is on a GPU.

    `take` gives a slot to one caller, and `share` to one more: the last one gives it back. A slot
    is reused only when no copy reads it any more. Any thread may call `take`, `share`, `give` and
    `slot`.
    """

    def __init__(self, storage: BlockStorage, num_slots: int) -> None:
        """Allocate `num_slots` slots for blocks of `storage`. O(1), O(bytes) if page-locked."""
        self._storage = storage
        self.num_slots = arguments.count("num_slots", num_slots, at_least=1)
        self.block_bytes = storage.block_bytes
        tier = storage.tier()
        self._memory = host_pages(
            self.num_slots, tier.shape[1], tier.dtype, pinned=tier.device.type == "cuda"
        )
        self._bytes = self._memory.view(torch.uint8).numpy().data.cast("B")
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._num_sharers = Counter[int]()  # besides the first
        self._unfinished: list[tuple[torch.cuda.Event, list[int]]] = []
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Free slots. O(copies under way)."""
        with self._lock:
            self._reclaim()
            return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return up to `count` free slots. O(slots)."""
        with self._lock:
            self._reclaim()
            return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def share(self, slots: Iterable[int]) -> None:
        """Keep slots from being reused until one more `give`. O(slots)."""
        with self._lock:
            self._num_sharers.update(slots)

    def give(self, slots: Iterable[int]) -> None:
        """Give slots back. O(slots)."""
        with self._lock:
            self._give(slots)

    def _give(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if slot not in self._num_sharers:
                self._free.append(slot)
            elif self._num_sharers[slot] == 1:
                del self._num_sharers[slot]
            else:
                self._num_sharers[slot] -= 1

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
        while self._unfinished and self._unfinished[0][0].query():
            self._give(self._unfinished.pop(0)[1])
