"""Prometheus reads the counts of tiers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.metrics import TierMetrics
from kvpager.storage.tiers.protocol import StoreStats
from kvpager.storage.tiers.tiering_stats import TieringStats, TierStats
from tests.support.scrapes import scrape


class Tiers:
    """Tiers that say what they are told."""

    def __init__(self, *tiers: TierStats) -> None:
        self.tiers = tiers

    def stats(self) -> TieringStats:
        return TieringStats(
            self.tiers, num_fetching=2, num_free_slots=3, total_declined=4, total_dropped_dirty=5
        )


def counted() -> StoreStats:
    counters = StoreCounters(block_bytes=100)
    counters.loaded(np.repeat(np.arange(4, dtype=np.uint8), [7, 1, 2, 3]), 0.5)
    counters.saved(np.repeat(np.arange(4, dtype=np.uint8), [6, 1, 2, 3]), 0.25)
    counters.evicted(8)
    return counters.stats(num_blocks=9, capacity=10)


def read(*tiers: TierStats) -> Callable[..., float | None]:
    return scrape(TierMetrics(Tiers(*tiers)))


def test_prometheus_reads_the_outcomes_of_each_tier() -> None:
    value = read(TierStats("disk", counted(), 0.0, 0.0, bypassed=False))
    loads = {o: value("kvpager_tier_loads_total", tier="disk", outcome=o) for o in
             ("hit", "miss", "bad", "late")}  # fmt: skip
    saves = {o: value("kvpager_tier_saves_total", tier="disk", outcome=o) for o in
             ("saved", "known", "refused", "late")}  # fmt: skip
    assert loads == {"hit": 7, "miss": 1, "bad": 2, "late": 3}
    assert saves == {"saved": 6, "known": 1, "refused": 2, "late": 3}


def test_prometheus_reads_bytes_and_seconds_each_way() -> None:
    value = read(TierStats("disk", counted(), 0.0, 0.0, bypassed=False))
    assert value("kvpager_tier_loaded_bytes_total", tier="disk") == 700
    assert value("kvpager_tier_saved_bytes_total", tier="disk") == 600
    assert value("kvpager_tier_load_seconds_total", tier="disk") == 0.5
    assert value("kvpager_tier_save_seconds_total", tier="disk") == 0.25


def test_prometheus_reads_what_a_tier_holds_and_its_breaker() -> None:
    unknown = StoreStats(None, None, 100)
    value = read(
        TierStats("disk", counted(), 0.0, 0.0, bypassed=False),
        TierStats("valkey", unknown, 0.0, 0.0, bypassed=True),
    )
    assert value("kvpager_tier_blocks", tier="disk") == 9
    assert value("kvpager_tier_capacity_blocks", tier="disk") == 10
    assert value("kvpager_tier_evicted_blocks_total", tier="disk") == 8
    assert value("kvpager_tier_bypassed", tier="disk") == 0
    assert value("kvpager_tier_bypassed", tier="valkey") == 1
    assert value("kvpager_tier_blocks", tier="valkey") is None
    assert value("kvpager_tier_capacity_blocks", tier="valkey") is None


def test_prometheus_reads_what_all_tiers_share() -> None:
    value = read()
    assert value("kvpager_tiers_fetches") == 2
    assert value("kvpager_tiers_staging_free_blocks") == 3
    assert value("kvpager_tiers_declined_fetches_total") == 4
    assert value("kvpager_tiers_dropped_dirty_blocks_total") == 5


def test_tiers_of_one_name_have_metrics_of_their_own() -> None:
    tiers = [TierStats("disk", StoreStats(n, None, 1), 0.0, 0.0, bypassed=False) for n in (1, 2)]
    value = read(*tiers)
    assert value("kvpager_tier_blocks", tier="disk") == 1
    assert value("kvpager_tier_blocks", tier="disk-2") == 2


def test_a_prefix_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix='a-b'"):
        TierMetrics(Tiers(), prefix="a-b")
