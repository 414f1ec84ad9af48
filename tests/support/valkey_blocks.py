"""Small blocks, keys and stores for tests of `ValkeyStore`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved

LAYOUT = BlockLayout("a test's blocks", 1000)
FRAME_AT = 112  # where a block's bytes begin in a value


def open_store(url: str, layout: BlockLayout = LAYOUT, **options: Any) -> ValkeyStore:
    """Open a store that waits long enough for a machine under load."""
    return ValkeyStore(url, layout, **{"timeout_s": 60.0} | options)


def soon() -> float:
    """Return a deadline that only a server which never answers misses."""
    return time.monotonic() + 60


def keys(count: int, seed: int = 0) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [random.bytes(32) for _ in range(count)]


def blocks(count: int, num_bytes: int = 1000, seed: int = 0) -> list[memoryview]:
    random = np.random.default_rng(seed)
    return [memoryview(random.bytes(num_bytes)) for _ in range(count)]


def buffers(count: int, num_bytes: int = 1000) -> list[memoryview]:
    return [memoryview(bytearray(num_bytes)) for _ in range(count)]


def save(store: ValkeyStore, names: Sequence[bytes], content: Sequence[memoryview]) -> list[Saved]:
    return [Saved(each) for each in store.save(names, content, soon())]


def load(
    store: ValkeyStore, names: Sequence[bytes], deadline: float | None = None
) -> tuple[list[Loaded], list[memoryview]]:
    """Return the outcomes, and the buffers."""
    into = buffers(len(names), store.block_bytes)
    outcomes = store.load(names, into, soon() if deadline is None else deadline)
    return [Loaded(each) for each in outcomes], into
