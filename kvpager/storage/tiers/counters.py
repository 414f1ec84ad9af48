"""Counts of a store's outcomes, for `BlockStore.stats`."""

from __future__ import annotations

import threading

import numpy as np

from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats


class StoreCounters:
    """Adds up the outcomes of a store. Any thread may call any method."""

    def __init__(self, block_bytes: int) -> None:
        """Count blocks of `block_bytes` bytes."""
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._loaded = np.zeros(len(Loaded), np.int64)
        self._saved = np.zeros(len(Saved), np.int64)
        self._evicted = 0
        self._load_s = self._save_s = 0.0

    def loaded(self, outcomes: Outcomes, seconds: float) -> None:
        """Count one call of `load`. O(keys)."""
        with self._lock:
            self._loaded += np.bincount(outcomes, minlength=len(Loaded))
            self._load_s += seconds

    def saved(self, outcomes: Outcomes, seconds: float) -> None:
        """Count one call of `save`. O(keys)."""
        with self._lock:
            self._saved += np.bincount(outcomes, minlength=len(Saved))
            self._save_s += seconds

    def evicted(self, num_blocks: int) -> None:
        """Count blocks that made room for others. O(1)."""
        with self._lock:
            self._evicted += num_blocks

    def stats(self, num_blocks: int | None, capacity: int | None) -> StoreStats:
        """Return the counts, and what the store holds now. O(1)."""
        with self._lock:
            hits, misses, bad, late = self._loaded.tolist()
            saved, known, refused, late_saves = self._saved.tolist()
            return StoreStats(
                num_blocks=num_blocks,
                capacity=capacity,
                block_bytes=self._block_bytes,
                hits=hits,
                misses=misses,
                bad=bad,
                late=late,
                saved=saved,
                known=known,
                refused=refused,
                late_saves=late_saves,
                evicted=self._evicted,
                loaded_bytes=hits * self._block_bytes,
                saved_bytes=saved * self._block_bytes,
                load_s=self._load_s,
                save_s=self._save_s,
            )
