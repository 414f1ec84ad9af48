"""Calls of a store with blocks that belong to their keys, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b, shake_128

from kvpager.storage.tiers.protocol import BlockStore, Outcomes

NEVER = float("inf")


def key_of(number: int) -> bytes:
    """Return a key, the same for the same number. O(1)."""
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def block_of(key: bytes, num_bytes: int, version: int = 0) -> memoryview:
    """Return the bytes that belong to a key, and others for each version. O(bytes)."""
    return memoryview(shake_128(key + bytes([version])).digest(num_bytes))


def load(
    store: BlockStore, keys: Sequence[bytes], deadline: float = NEVER
) -> tuple[list[int], list[bytes]]:
    """Load keys; return their outcomes, and what the buffers hold then. O(bytes)."""
    buffers = [bytearray(store.block_bytes) for _ in keys]
    outcomes = store.load(keys, [memoryview(buffer) for buffer in buffers], deadline)
    return read(outcomes, len(keys)), [bytes(buffer) for buffer in buffers]


def save(store: BlockStore, keys: Sequence[bytes], deadline: float = NEVER) -> list[int]:
    """Save the blocks that belong to keys; return the outcomes. O(bytes)."""
    blocks = [block_of(key, store.block_bytes) for key in keys]
    return read(store.save(keys, blocks, deadline), len(keys))


def read(outcomes: Outcomes, count: int) -> list[int]:
    """Return the outcomes of a call with `count` keys, and check their form. O(count)."""
    assert outcomes.dtype == "uint8"
    assert outcomes.shape == (count,)
    values: list[int] = outcomes.tolist()
    return values
