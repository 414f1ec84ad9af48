"""Check the arguments of a store and count its outcomes, alike in all stores."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise `ValueError` for a key of another length than `content_keys` makes. O(keys)."""
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ValueError(f"keys: expected {KEY_BYTES} bytes each, got {len(key)}")


def check_blocks(
    name: str, keys: Sequence[bytes], buffers: Sequence[memoryview], block_bytes: int
) -> None:
    """Check the keys and the buffers of `load` or `save`. O(keys).

    `name` is the argument: the buffers of `into` must be writable. Raises: `ValueError`.
    """
    check_keys(keys)
    if len(buffers) != len(keys):
        raise ValueError(f"{name}: expected a buffer for each of {len(keys)} keys")
    for buffer in buffers:
        if buffer.nbytes != block_bytes or not buffer.c_contiguous:
            raise ValueError(f"{name}: expected contiguous buffers of {block_bytes} bytes")
        if name == "into" and buffer.readonly:
            raise ValueError(f"{name}: expected writable buffers")


class StoreCounts:
    """Counts the outcomes of a store's calls. All methods may be called from any thread."""

    def __init__(self, block_bytes: int) -> None:
        """Count from zero, for blocks of `block_bytes`."""
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._loaded = np.zeros(len(Loaded), np.int64)
        self._saved = np.zeros(len(Saved), np.int64)
        self._load_s = self._save_s = 0.0
        self._evicted = 0

    def loaded(self, outcomes: Outcomes, seconds: float) -> None:
        """Count a call of `load`. O(keys)."""
        counts = np.bincount(outcomes, minlength=len(Loaded))
        with self._lock:
            self._loaded += counts
            self._load_s += seconds

    def saved(self, outcomes: Outcomes, seconds: float) -> None:
        """Count a call of `save`. O(keys)."""
        counts = np.bincount(outcomes, minlength=len(Saved))
        with self._lock:
            self._saved += counts
            self._save_s += seconds

    def evicted(self, count: int) -> None:
        """Count blocks that made room for others. O(1)."""
        with self._lock:
            self._evicted += count

    def stats(self, num_blocks: int, capacity: int | None) -> StoreStats:
        """Return all counts, and what the store holds now. O(1)."""
        with self._lock:
            loaded, saved = self._loaded.tolist(), self._saved.tolist()
            load_s, save_s, evicted = self._load_s, self._save_s, self._evicted
        return StoreStats(
            num_blocks=num_blocks,
            capacity=capacity,
            block_bytes=self._block_bytes,
            hits=loaded[Loaded.HIT],
            misses=loaded[Loaded.MISS],
            bad=loaded[Loaded.BAD],
            late=loaded[Loaded.LATE],
            saved=saved[Saved.SAVED],
            known=saved[Saved.KNOWN],
            refused=saved[Saved.REFUSED],
            late_saves=saved[Saved.LATE],
            evicted=evicted,
            loaded_bytes=loaded[Loaded.HIT] * self._block_bytes,
            saved_bytes=saved[Saved.SAVED] * self._block_bytes,
            load_s=load_s,
            save_s=save_s,
        )
