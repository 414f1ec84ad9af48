"""A store in this process's memory: the tier right below a device."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpager.plans import Int32
from kvpager.storage.tiers.checks import blocks_in, check_blocks
from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.eviction_order import SlotPolicy
from kvpager.storage.tiers.keyed import KNOWN, NO_ROOM, KeyedTier, Reservation
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats


class HostStore:
    """Blocks in slots of one buffer.

    The bytes never leave the process, so they need no frame: a slot that is read is not reused.

    Other uses of host memory may share the slots: `take` returns slots for them, and evicts cached
    blocks if needed. A caller that fills such a slot can pass it to `adopt`: the store then has the
    block without a copy. `pin` is a hit without a copy. `give` ends `take`, `share` and `pin`.

    Attributes:
        memory: the slots, uint8 [slots, block_bytes].
        losses: the keys that were evicted or dropped.
    """

    name = "host"
    is_private = True
    _pages: mmap.mmap | None

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
        num_blocks = blocks_in(capacity, layout.block_bytes)
        self._pages = _allocated(num_blocks * layout.block_bytes, capacity)
        blocks = np.frombuffer(self._pages, np.uint8).reshape(num_blocks, layout.block_bytes)
        self._begin(blocks, policy)

    @classmethod
    def over(cls, memory: NDArray[np.uint8], *, is_free: bool = True) -> HostStore:
        """Return a store in `memory`, uint8 [slots, block_bytes]. O(slots).

        Without `is_free`, its owner has all slots at first, as after `take`.
        """
        store = cls.__new__(cls)
        store._pages = None
        store._begin(memory, None)
        if not is_free:
            store._tier.take(len(memory))
        return store

    def _begin(self, memory: NDArray[np.uint8], policy: Callable[[int], SlotPolicy] | None) -> None:
        num_blocks, self.block_bytes = memory.shape
        self.memory = memory
        self._tier = KeyedTier(num_blocks, None if policy is None else policy(num_blocks))
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
        memory = self.memory  # before the slots: `close` takes it after them
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
        memory = self.memory
        slots = self._evicting(self._tier.reserve(keys, partly=True))
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
        """Return what the store holds, and counts since it was made. O(1).

        The capacity excludes slots that are taken for another use.
        """
        return self._counters.stats(self._tier.num_ready, self.capacity)

    def close(self) -> None:
        """Give the memory back when no call uses it any more. O(1)."""
        self._tier.close()
        self.memory = np.empty((0, self.block_bytes), np.uint8)
        self._pages = None

    # ---------------------------------------------------------------- slots

    @property
    def capacity(self) -> int:
        """The number of slots that are not taken for another use. O(1)."""
        return self._tier.capacity

    @property
    def num_available(self) -> int:
        """The number of slots that `take` would find. O(1)."""
        return self._tier.num_available

    def take(self, count: int, *, partly: bool = False) -> list[int]:
        """Return `count` slots for another use; none if there are fewer. O(count log slots).

        With `partly`, returns up to `count`. Evicts cached blocks if needed.
        """
        slots: list[int] = self._evicting(self._tier.take(count, partly=partly)).tolist()
        return slots

    def share(self, slots: Iterable[int]) -> None:
        """Add a use to slots that are in use: each needs one more `give`. O(slots)."""
        self._tier.share(slots)

    def give(self, slots: Iterable[int]) -> None:
        """End one use of each slot. A slot without a key is free after its last. O(slots)."""
        self._tier.unpin(slots)

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Return the slots of leading keys, which keep their bytes until `give`. O(keys)."""
        begun = time.monotonic()
        slots = self._tier.pin(keys)
        count = len(slots) if (slots >= 0).all() else int((slots < 0).argmax())
        self._tier.unpin(slots[count:])
        outcomes: Outcomes = np.where(slots >= 0, Loaded.HIT, Loaded.MISS).astype(np.uint8)
        self._counters.loaded(outcomes, time.monotonic() - begun)
        return [int(slot) for slot in slots[:count]]

    def adopt(self, keys: Sequence[bytes], slots: Sequence[int]) -> Outcomes:
        """Keep the blocks that fill taken slots. Returns a `Saved` for each. O(keys log slots).

        The slots stay in use until `give`. Raises: `ValueError` for a slot that is not taken.
        """
        begun = time.monotonic()
        named = self._tier.name(slots, keys)
        outcomes: Outcomes = np.full(len(keys), Saved.SAVED, np.uint8)
        outcomes[named == KNOWN] = Saved.KNOWN
        outcomes[named == NO_ROOM] = Saved.REFUSED
        self._counters.saved(outcomes, time.monotonic() - begun)
        return outcomes

    def clear(self, slots: Iterable[int]) -> None:
        """Give whole pages of taken slots back to the system until they are written. O(slots).

        Without effect on memory that the store did not allocate.
        """
        if (pages := self._pages) is None:
            return
        for slot in slots:
            start = -(-slot * self.block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (slot + 1) * self.block_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                pages.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _evicting(self, reserved: Reservation) -> Int32:
        """Report the keys that left; return the slots."""
        self._counters.evicted(len(reserved.evicted))
        self.losses.add(key for key, _ in reserved.evicted)
        return reserved.slots


def _allocated(num_bytes: int, capacity: int | str) -> mmap.mmap:
    # Mapped, so that blocks of whole pages are aligned to pages for direct I/O.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        return mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(
            f"capacity={capacity!r}: the system refused the memory ({error.strerror}). Lower it."
        ) from None
