"""A tenant's lookups never find another tenant's blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved
from kvpager.storage.tiers.seals import namespace_secret
from tests.support.valkey_blocks import open_store, soon
from tests.support.valkey_servers import Server

MASTER = b"a deployment's 32 random bytes.."
LAYOUT = BlockLayout("blocks of one token", 64)
BLOCK = memoryview(bytes(LAYOUT.block_bytes))
CALL = 2000  # keys


def keys_of(tenant: str | None, prompt: np.ndarray) -> list[bytes]:
    secret = namespace_secret(MASTER, tenant)
    return content_keys(prompt, 1, KeyContext(LAYOUT.text, "a model", secret))


def loaded(url: str, keys: list[bytes]) -> dict[Loaded, int]:
    """Load every key; count the outcomes."""
    store, buffer = open_store(url, LAYOUT), memoryview(bytearray(LAYOUT.block_bytes))
    for start in range(0, len(keys), CALL):
        some = keys[start : start + CALL]
        store.load(some, [buffer] * len(some), soon())
        assert store.find(some[:1]) == bool(store.stats().hits)
    stats = store.stats()
    return {Loaded.HIT: stats.hits, Loaded.MISS: stats.misses, Loaded.BAD: stats.bad}


@pytest.mark.parametrize(
    "lookups", [2 * CALL, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_no_lookup_of_another_tenant_hits(server: Server, lookups: int) -> None:
    prompt = np.random.default_rng(0).integers(0, 1000, lookups // 2, dtype=np.int32)
    store, ours = open_store(server.unix_url, LAYOUT), keys_of("acme", prompt)
    kept = ours[: 4 * CALL]
    for start in range(0, len(kept), CALL):
        some = kept[start : start + CALL]
        assert set(store.save(some, [BLOCK] * len(some), soon()).tolist()) == {Saved.SAVED}
    assert loaded(server.unix_url, kept)[Loaded.HIT] == len(kept)
    for other in ("globex", None):
        found = loaded(server.unix_url, keys_of(other, prompt))
        assert found == {Loaded.HIT: 0, Loaded.MISS: lookups // 2, Loaded.BAD: 0}
