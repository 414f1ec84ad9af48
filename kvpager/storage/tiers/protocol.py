"""The contract of a tier: `BlockStore`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Outcomes = NDArray[np.uint8]


class Loaded(IntEnum):
    """What became of a key in `BlockStore.load`."""

    HIT = 0  # the buffer holds the block's bytes, verified
    MISS = 1  # the store does not have the key
    BAD = 2  # the store had other bytes, or could not read them; it has dropped the key
    LATE = 3  # the deadline passed first


class Saved(IntEnum):
    """What became of a key in `BlockStore.save`."""

    SAVED = 0  # the store has the block now
    KNOWN = 1  # the store had it before, or is getting it, and keeps the first bytes
    REFUSED = 2  # no room, not admitted, or the write failed
    LATE = 3  # the deadline passed first; the store does not offer the key


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since a store was opened, and what it holds now. Times are in seconds.

    Attributes:
        num_blocks: blocks that the store offers; None if it does not know.
        capacity: blocks that fit; None if the store has no bound or does not know it.
        block_bytes: bytes of a block, without its frame.
        hits, misses, bad, late: keys by outcome of `load`.
        saved, known, refused, late_saves: keys by outcome of `save`.
        evicted: blocks that made room for others.
        loaded_bytes, saved_bytes: bytes of blocks that were served and kept.
        load_s, save_s: time spent in `load` and `save`.
    """

    num_blocks: int | None
    capacity: int | None
    block_bytes: int
    hits: int = 0
    misses: int = 0
    bad: int = 0
    late: int = 0
    saved: int = 0
    known: int = 0
    refused: int = 0
    late_saves: int = 0
    evicted: int = 0
    loaded_bytes: int = 0
    saved_bytes: int = 0
    load_s: float = 0.0
    save_s: float = 0.0


class BlockStore(Protocol):
    """A tier of cached blocks, keyed by content.

    Keys are the 32 bytes of `content_keys`. Buffers are contiguous memoryviews of `block_bytes`
    bytes, writable in `load`. A deadline is a time of `time.monotonic()`. All methods may be
    called from any thread. None raises for a block that is missing, damaged or late, nor for a
    store that fails: each key has an outcome instead. A call returns soon after its deadline, and
    touches no buffer afterwards. A store that does not return gets no other call until then. After
    `close`, `find` returns 0, `load` misses and `save` refuses. `kvpager.testing.stores` tests
    these properties.

    A store that knows which keys it loses reports them in an attribute `losses`, a
    `kvpager.storage.tiers.losses.Losses`. Without `losses`, a fetch asks the store whether it still
    has the cached block before the missing ones. A store that chooses blocks itself has an
    attribute `admit`. One that is slow to ask has `find_each(keys)`, which returns a bool for each.
    One with an attribute `bypassed` is offered nothing while that is True. One whose attribute
    `is_private` is True serves this process only, and ends with it.
    """

    @property
    def name(self) -> str:
        """The store's name in statistics, such as "disk"."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        ...

    def find(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys the store seems to have. Reserves nothing. O(keys)."""
        ...

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        """Read the blocks of `keys`, in order, into buffers. O(bytes).

        Returns a `Loaded` for each key. Only buffers of hits hold valid bytes. Raises: `ValueError`
        for keys or buffers of another length, and for buffers that cannot be written.
        """
        ...

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        """Keep the blocks of `keys`. Returns a `Saved` for each key. O(bytes).

        Raises: `ValueError` for keys or buffers of another length.
        """
        ...

    def drop(self, keys: Sequence[bytes]) -> bool:
        """Forget the blocks of `keys`, if the store has them. O(keys).

        Returns False if it may still have some, as when a server does not answer.
        """
        ...

    def stats(self) -> StoreStats:
        """Return what the store holds, and counts since it was opened. O(1)."""
        ...

    def close(self) -> None:
        """Release files, connections and memory. Twice is the same as once."""
        ...
