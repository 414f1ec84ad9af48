"""Call a store where no exception of a store may go on, such as an engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvpager.storage.tiers.checks import check_outcomes
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Outcomes, Saved, StoreStats

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


def found_in(store: BlockStore, keys: Sequence[bytes]) -> int:
    """Return how many leading keys a store has; 0 if it fails. As `BlockStore.find`."""
    try:
        return min(max(int(store.find(keys)), 0), len(keys))
    except Exception:
        logger.exception("the store %s failed to find blocks", store.name)
        return 0


def outcomes_of(
    store: BlockStore,
    verb: Literal["load", "save"],
    keys: Sequence[bytes],
    buffers: Sequence[memoryview],
    deadline: float,
) -> Outcomes:
    """Return the outcomes of `BlockStore.load` or `save`; all misses or refused if it fails."""
    try:
        outcomes = (store.load if verb == "load" else store.save)(keys, buffers, deadline)
        check_outcomes(outcomes, len(keys))
    except Exception:
        logger.exception("the store %s failed to %s blocks", store.name, verb)
        return np.full(len(keys), Loaded.MISS if verb == "load" else Saved.REFUSED, np.uint8)
    return outcomes
