"""A store in this process's memory: the tier right below a device."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpager.storage.tiers.checks import blocks_in, check_blocks
from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.keyed import KNOWN, NO_ROOM, KeyedTier, SlotPolicy
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats


class HostStore:
    """Blocks in one buffer that is allocated at once. A hit costs one copy of the block.

    The bytes never leave the process, so they need no frame: a slot that is read is not reused.

    Attributes:
        losses: the keys that were evicted or dropped.
    """

    name = "host"
    is_private = True

    def __init__(
        self,
        capacity: int | str,
        *,
        layout: BlockLayout,
        policy: Callable[[int], SlotPolicy] | None = None,
    ) -> None:
        """Allocate room for the blocks that fit into `capacity` bytes, such as "32GiB".

        The system gives the memory when blocks are first written. `policy` makes an eviction policy
        for a number of blocks, least recently used unless given. Raises: `ValueError` for room for
        no block; `MemoryError` if the system refuses.
        """
        self.block_bytes = layout.block_bytes
        num_blocks = blocks_in(capacity, self.block_bytes)
        self._tier = KeyedTier(num_blocks, None if policy is None else policy(num_blocks))
        self._blocks = _allocated(num_blocks, self.block_bytes, capacity)
        self._counters = StoreCounters(self.block_bytes)
        self.losses = Losses()

    def find(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys the store has. O(keys)."""
        return self._tier.find(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        """Copy the blocks of `keys` into buffers. O(bytes). Raises: `ValueError`."""
        check_blocks("into", keys, into, self.block_bytes)
        begun = time.monotonic()
        outcomes: Outcomes = np.full(len(keys), Loaded.MISS, np.uint8)
        memory = self._blocks  # before the slots: `close` takes it after them
        slots = self._tier.pin(keys)
        try:
            for index in np.flatnonzero(slots >= 0).tolist():
                if time.monotonic() > deadline:
                    outcomes[index] = Loaded.LATE
                    continue
                np.copyto(np.frombuffer(into[index], np.uint8), memory[slots[index]])
                outcomes[index] = Loaded.HIT
        finally:
            self._tier.unpin(slots)
        self._counters.loaded(outcomes, time.monotonic() - begun)
        return outcomes

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        """Copy blocks into the store. O(bytes). Raises: `ValueError`."""
        check_blocks("blocks", keys, blocks, self.block_bytes)
        begun = time.monotonic()
        if begun > deadline:
            outcomes: Outcomes = np.full(len(keys), Saved.LATE, np.uint8)
        else:
            outcomes = self._save(keys, blocks, deadline)
        self._counters.saved(outcomes, time.monotonic() - begun)
        return outcomes

    def _save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        memory = self._blocks
        slots, evicted = self._tier.reserve(keys, partly=True)
        self._counters.evicted(len(evicted))
        self.losses.add(key for key, _ in evicted)
        outcomes: Outcomes = np.full(len(keys), Saved.LATE, np.uint8)
        outcomes[slots == KNOWN] = Saved.KNOWN
        outcomes[slots == NO_ROOM] = Saved.REFUSED
        try:
            for index in np.flatnonzero(slots >= 0).tolist():
                if time.monotonic() > deadline:
                    break
                np.copyto(memory[slots[index]], np.frombuffer(blocks[index], np.uint8))
                outcomes[index] = Saved.SAVED
        finally:
            written = outcomes == Saved.SAVED
            self._tier.publish(slots[written])
            self._tier.abandon(slots[~written])
        return outcomes

    def drop(self, keys: Sequence[bytes]) -> bool:
        """Forget the blocks of `keys`. Returns True. O(keys)."""
        slots = self._tier.pin(keys)
        self.losses.add(key for key, _ in self._tier.discard(slots))
        self._tier.unpin(slots)
        return True

    def stats(self) -> StoreStats:
        """Return what the store holds, and counts since it was made. O(1)."""
        return self._counters.stats(self._tier.num_ready, self._tier.num_slots)

    def close(self) -> None:
        """Give the memory back when no call uses it any more. O(1)."""
        self._tier.close()
        self._blocks = np.empty((0, self.block_bytes), np.uint8)


def _allocated(num_blocks: int, block_bytes: int, capacity: int | str) -> NDArray[np.uint8]:
    # Mapped, so that blocks of whole pages are aligned to pages for direct I/O.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, num_blocks * block_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(
            f"capacity={capacity!r}: the system refused the memory ({error.strerror}). Lower it."
        ) from None
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
