"""Lookups of tenants in a store that holds the blocks of another one."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved
from kvpager.storage.tiers.seals import namespace_secret

MASTER = b"a deployment's 32 random bytes.."
LAYOUT = BlockLayout("blocks of one token", 64)
BLOCK = memoryview(bytes(LAYOUT.block_bytes))
CALL = 2000  # keys
NUM_KEPT = 4 * CALL  # blocks: the store needs room for them


def keys_of(tenant: str | None, prompt: np.ndarray) -> list[bytes]:
    secret = namespace_secret(MASTER, tenant)
    return content_keys(prompt, 1, KeyContext(LAYOUT.text, "a model", secret))


def loaded(store: BlockStore, keys: list[bytes]) -> Counter[Loaded]:
    """Find and load every key; count the outcomes."""
    buffer, found = memoryview(bytearray(LAYOUT.block_bytes)), Counter[Loaded]()
    for start in range(0, len(keys), CALL):
        some = keys[start : start + CALL]
        outcomes = store.load(some, [buffer] * len(some), time.monotonic() + 60)
        found.update(map(Loaded, outcomes.tolist()))
        assert store.find(some[:1]) == (outcomes[0] == Loaded.HIT)
    return found


def check_tenants(store: BlockStore, lookups: int) -> None:
    """Save blocks of one tenant; assert that `lookups` of others find none of them."""
    prompt = np.random.default_rng(0).integers(0, 1000, lookups // 2, dtype=np.int32)
    kept = keys_of("acme", prompt[:NUM_KEPT])
    for start in range(0, len(kept), CALL):
        some = kept[start : start + CALL]
        outcomes = store.save(some, [BLOCK] * len(some), time.monotonic() + 60)
        assert set(outcomes.tolist()) == {Saved.SAVED}
    assert loaded(store, kept) == {Loaded.HIT: len(kept)}
    for other in ("globex", None):
        assert loaded(store, keys_of(other, prompt)) == {Loaded.MISS: lookups // 2}
