"""Counts of tiers as Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from kvpager.blocks.metric_families import Families, Labelled
from kvpager.storage.tiers.protocol import StoreStats
from kvpager.storage.tiers.tiering_stats import TieringStats, TierStats


class HasTieringStats(Protocol):
    """The member of a `Tiering` that `TierMetrics` needs."""

    def stats(self) -> TieringStats:
        """Return counts since the tiering began. O(stores)."""


class TierMetrics:
    """The stats of tiers for `prometheus_client`: `REGISTRY.register(TierMetrics(patch.tiers))`.

    Takes a `Tiering`, the tiers of a patch, or those of an engine, which `EngineMetrics` includes.
    Needs the extra `kvpager[metrics]`. Several in a process need different prefixes.
    """

    def __init__(self, tiers: HasTieringStats, prefix: str = "kvpager") -> None:
        """Report `tiers`. Raises: `ValueError` if `prefix` can begin no metric name."""
        self._tiers = tiers
        self._families = Families(prefix)

    def collect(self) -> Iterator[Any]:
        """Yield the metric families. O(stores)."""
        return tier_families(self._families, self._tiers.stats())


def tier_families(make: Families, stats: TieringStats) -> Iterator[Any]:
    """Yield the metric families of tiers, with the label `tier`. O(stores)."""
    tiers = _named(stats.tiers)
    bypassed = {(name,): float(tier.bypassed) for name, tier in tiers.items()}
    yield make.gauge("tier_bypassed", "1 while a failing store is bypassed.", bypassed, "tier")
    yield from _store_families(make, {name: tier.store for name, tier in tiers.items()})
    yield make.gauge("tiers_fetches", "Prompts on their way from stores.", stats.num_fetching)
    yield make.gauge("tiers_staging_free_blocks", "Free room of staging.", stats.num_free_slots)
    text = "Prompts that are computed sooner than any store loads them."
    yield make.counter("tiers_declined_fetches", text, stats.total_declined)
    text = "Cached blocks that left the device before a store had them."
    yield make.counter("tiers_dropped_dirty_blocks", text, stats.total_dropped_dirty)


def _store_families(make: Families, stores: Mapping[str, StoreStats]) -> Iterator[Any]:
    def each(count: Callable[[StoreStats], float | None]) -> Labelled:
        """Return a count of each store that has it."""
        counts = ((name, count(store)) for name, store in stores.items())
        return {(name,): value for name, value in counts if value is not None}

    for name, text, values in (
        ("tier_blocks", "Blocks that a store offers.", each(lambda s: s.num_blocks)),
        ("tier_capacity_blocks", "Blocks that fit in a store.", each(lambda s: s.capacity)),
    ):
        yield make.gauge(name, text, values, "tier")
    for name, text, values in (
        ("tier_loaded_bytes", "Bytes loaded from a store.", each(lambda s: s.loaded_bytes)),
        ("tier_saved_bytes", "Bytes saved in a store.", each(lambda s: s.saved_bytes)),
        ("tier_load_seconds", "Seconds in loads of a store.", each(lambda s: s.load_s)),
        ("tier_save_seconds", "Seconds in saves of a store.", each(lambda s: s.save_s)),
        ("tier_evicted_blocks", "Blocks that made room for others.", each(lambda s: s.evicted)),
    ):
        yield make.counter(name, text, values, "tier")
    for name, text, outcomes in (
        ("tier_loads", "Blocks asked of a store, by outcome.", _loads),
        ("tier_saves", "Blocks offered to a store, by outcome.", _saves),
    ):
        values = {
            (tier, outcome): count
            for tier, store in stores.items()
            for outcome, count in outcomes(store).items()
        }
        yield make.counter(name, text, values, "tier", "outcome")


def _loads(store: StoreStats) -> dict[str, int]:
    return {"hit": store.hits, "miss": store.misses, "bad": store.bad, "late": store.late}


def _saves(store: StoreStats) -> dict[str, int]:
    return {
        "saved": store.saved,
        "known": store.known,
        "refused": store.refused,
        "late": store.late_saves,
    }


def _named(tiers: tuple[TierStats, ...]) -> dict[str, TierStats]:
    """Return the tiers by name; the second one named disk is disk-2."""
    seen, named = Counter[str](), dict[str, TierStats]()
    for tier in tiers:
        seen[tier.name] += 1
        number = seen[tier.name]
        named[tier.name if number == 1 else f"{tier.name}-{number}"] = tier
    return named
