"""Counts of a `Tiering`."""

from __future__ import annotations

from typing import NamedTuple

from kvpager.storage.tiers.asking import is_bypassed, stats_of
from kvpager.storage.tiers.costs import TransferCost
from kvpager.storage.tiers.protocol import BlockStore, StoreStats


class TierStats(NamedTuple):
    """Counts of one store, and how fast it is by its own transfers, 0 if unknown.

    `bypassed` is True while its circuit breaker is open: the store then gets only probes. It is
    also True while a call does not return: the store then gets no other.
    """

    name: str
    store: StoreStats
    latency_s: float
    bytes_per_s: float
    bypassed: bool

    @classmethod
    def of(cls, store: BlockStore, cost: TransferCost, hangs: bool) -> TierStats:
        """Return current counts of a store, which may hang. O(1)."""
        bypassed = hangs or is_bypassed(store)
        return cls(store.name, stats_of(store), cost.latency_s, cost.bytes_per_s, bypassed)


class TieringStats(NamedTuple):
    """Counts at one moment."""

    tiers: tuple[TierStats, ...]
    num_fetching: int  # prompts on their way
    num_free_slots: int  # of staging
    total_declined: int  # prompts that the model computes sooner than any store loads them
    total_dropped_dirty: int  # blocks that were evicted before a store had them
