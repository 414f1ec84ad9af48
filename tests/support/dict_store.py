"""A store of blocks in a dict, whose faults tests control."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats


class DictStore:
    """A store in a dict. `lost` keys are found and then missing; `gate` holds loads back.

    `answer` is the outcome of each save, which keeps nothing unless that is `SAVED`. More than
    `capacity` blocks push the oldest out.
    """

    name = "dict"

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.blocks: dict[bytes, bytes] = {}
        self.lost: set[bytes] = set()
        self.losses = Losses()
        self.answer = Saved.SAVED
        self.capacity: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.num_loads = self.num_saves = 0
        self.fails = self.drop_fails = False
        self.is_closed = False

    def find(self, keys: Sequence[bytes]) -> int:
        have = [key in self.blocks for key in keys]
        return have.index(False) if False in have else len(have)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        assert self.gate.wait(60)
        if self.fails:
            raise OSError("a broken store")
        outcomes = []
        for key, buffer in zip(keys, into, strict=True):
            self.num_loads += 1
            hit = key in self.blocks and key not in self.lost
            if hit:
                buffer[:] = self.blocks[key]
            outcomes.append(Loaded.HIT if hit else Loaded.MISS)
        return np.array(outcomes, np.uint8)

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        assert self.gate.wait(60)
        if self.fails:
            raise OSError("a broken store")
        for key, block in zip(keys, blocks, strict=True):
            self.num_saves += 1
            if self.answer == Saved.SAVED:
                self.blocks.setdefault(key, bytes(block))
        if self.capacity is not None:
            self.drop(list(self.blocks)[: -self.capacity])
        return np.full(len(keys), self.answer, np.uint8)

    def drop(self, keys: Sequence[bytes]) -> bool:
        if self.drop_fails:
            return False
        for key in keys:
            if self.blocks.pop(key, None) is not None:
                self.losses.add([key])
        return True

    def stats(self) -> StoreStats:
        return StoreStats(len(self.blocks), self.capacity, self.block_bytes)

    def close(self) -> None:
        self.is_closed = True
