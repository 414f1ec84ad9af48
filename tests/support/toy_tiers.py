"""Toy engines over stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvpager.storage.keys import KeyContext
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, ToyRunner

BLOCK_BYTES = 8 * BLOCK_SIZE
PROMPT = list(range(40))


class ToyStaging:
    """The buffer between the blocks of a toy runner and stores."""

    def __init__(self, runner: ToyRunner, num_slots: int, block_bytes: int = BLOCK_BYTES) -> None:
        """Make slots of `block_bytes`. What a block of the runner lacks stays 0."""
        self._blocks = runner._device
        self._memory = np.zeros((num_slots, block_bytes // 8), np.int64)
        self._free = list(range(num_slots))
        self._num_holders = [0] * num_slots
        self._lock = threading.Lock()
        self.num_slots, self.block_bytes, self.store = num_slots, block_bytes, None
        self.copied: list[int] = []  # blocks of each copy

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self.share(slots)
        return slots

    def share(self, slots: Any) -> None:
        with self._lock:
            for slot in slots:
                self._num_holders[slot] += 1

    def give(self, slots: Any) -> None:
        with self._lock:
            for slot in slots:
                self._num_holders[slot] -= 1
                assert self._num_holders[slot] >= 0
                if not self._num_holders[slot]:
                    self._free.append(slot)

    def slot(self, number: int) -> memoryview:
        return self._memory[number].data.cast("B")

    def read(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        self.copied.append(len(slots))
        self._memory[list(slots), :BLOCK_SIZE] = self._blocks[list(blocks)]

    def write(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self.copied.append(len(slots))
        self._blocks[list(blocks)] = self._memory[list(slots), :BLOCK_SIZE]
        self.give(slots)


class TieredEngine(ToyEngine):
    """A toy engine over stores."""

    def __init__(
        self, stores: Sequence[DictStore], num_blocks: int = 64, *, slots: int = 64,
        block_bytes: int = BLOCK_BYTES, core: Mapping[str, Any] | None = None, num_events: int = 0,
        **tiering: Any,
    ) -> None:  # fmt: skip
        self.stores, self.slots, self.settings = stores, slots, tiering
        self.slot_bytes = block_bytes
        super().__init__(num_blocks, core=core, num_events=num_events)

    def _make_tiering(self, scheduler: Any, runner: ToyRunner) -> Tiering:
        self.staging = ToyStaging(runner, self.slots, self.slot_bytes)
        return Tiering(
            scheduler.manager, self.staging, self.stores,
            lambda namespace, lora: KeyContext(
                "toy", "toy", (namespace or "").encode().ljust(16 if namespace else 0), lora
            ),
            **self.settings,
        )  # fmt: skip

    def saved(self) -> None:
        """Wait until every idle block is saved."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with self._lock:
                fetching = self._fetching
                assert fetching is not None
                if not fetching._may_be_dirty and self.staging.num_free == self.slots:
                    return
        raise AssertionError("blocks stay dirty")


def store() -> DictStore:
    return DictStore(BLOCK_BYTES)


def store_with_the_prompt() -> DictStore:
    """A store in which another engine saved the prompt."""
    filled = store()
    with TieredEngine([filled]) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
    filled.is_closed = False
    return filled


class Watch:
    """A model watch that says what it is told."""

    def __init__(self) -> None:
        self.version = 0
        self.doubt = None

    def look(self) -> Watch:
        seen = Watch()
        seen.version = self.version
        return seen

    glance = look
