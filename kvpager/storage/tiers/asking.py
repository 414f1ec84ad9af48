"""Ask a store about itself on the engine's thread, which no exception of a store may reach."""

from __future__ import annotations

import logging

from kvpager.storage.tiers.protocol import BlockStore, StoreStats

logger = logging.getLogger(__name__)


def is_bypassed(store: BlockStore) -> bool:
    """Return True if a store takes nothing now, or if its answer fails. O(1)."""
    try:
        return bool(getattr(store, "bypassed", False))
    except Exception:
        logger.exception("the store %s failed to say whether it is bypassed", store.name)
        return True


def stats_of(store: BlockStore) -> StoreStats:
    """Return what a store holds and counts; zeros without a bound if it fails to say. O(1)."""
    try:
        return store.stats()
    except Exception:
        logger.exception("the store %s failed to say what it holds", store.name)
        return StoreStats(None, None, store.block_bytes)
