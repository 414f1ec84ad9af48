"""`StoreCounters` adds up outcomes."""

from __future__ import annotations

import numpy as np

from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.protocol import Loaded, Saved, StoreStats


def test_outcomes_bytes_and_seconds_are_added_up() -> None:
    counters = StoreCounters(block_bytes=10)
    counters.loaded(np.array([Loaded.HIT, Loaded.HIT, Loaded.MISS], np.uint8), 1.0)
    counters.loaded(np.array([Loaded.BAD, Loaded.LATE, Loaded.HIT], np.uint8), 0.5)
    counters.saved(np.array([Saved.SAVED, Saved.KNOWN], np.uint8), 2.0)
    counters.saved(np.array([Saved.REFUSED, Saved.REFUSED, Saved.LATE], np.uint8), 0.25)
    counters.evicted(7)
    assert counters.stats(4, None) == StoreStats(
        num_blocks=4,
        capacity=None,
        block_bytes=10,
        hits=3,
        misses=1,
        bad=1,
        late=1,
        saved=1,
        known=1,
        refused=2,
        late_saves=1,
        evicted=7,
        loaded_bytes=30,
        saved_bytes=10,
        load_s=1.5,
        save_s=2.25,
    )


def test_a_call_without_keys_counts_its_time_alone() -> None:
    counters = StoreCounters(block_bytes=10)
    counters.loaded(np.array([], np.uint8), 1.0)
    assert counters.stats(0, 5) == StoreStats(0, 5, 10, load_s=1.0)
