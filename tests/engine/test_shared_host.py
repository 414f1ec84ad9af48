"""Engines whose host blocks hold cached blocks and swapped requests, in traffic at random."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.engine.stream import Stream
from kvpager.errors import RequestCancelled
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.protocol import Saved
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.toy_runner import ToyEngine, ToyRunner, expected
from tests.support.toy_tiers import BLOCK_BYTES

NAMES = [None, "a", "b"]


class ToyStorage:
    """The blocks of a toy runner, as a storage has them."""

    block_bytes = BLOCK_BYTES

    def __init__(self, runner: ToyRunner) -> None:
        self._tiers = {
            "device": torch.from_numpy(runner._device),
            "host": torch.from_numpy(runner._host),
        }

    def tier(self, which: str = "device") -> torch.Tensor:
        return self._tiers[which]


class SharingEngine(ToyEngine):
    """A toy engine whose host blocks are its first store."""

    def __init__(
        self, below: Sequence[DictStore], num_blocks: int, num_host: int, step_blocks: int,
        **options: Any,
    ) -> None:  # fmt: skip
        self.below, self.step_bytes = below, step_blocks * BLOCK_BYTES
        super().__init__(num_blocks, num_host, **options)

    def _make_tiering(self, scheduler: Any, runner: ToyRunner) -> Tiering:
        storage: Any = ToyStorage(runner)
        self.staging = Staging.of_host(storage)
        assert self.staging.store is not None
        self.host_store = self.staging.store
        scheduler.manager.host.lend_to(self.staging)
        self.tiering = Tiering(
            scheduler.manager, self.staging, [self.host_store, *self.below],
            lambda namespace, lora: KeyContext(
                "toy", "toy", (namespace or "").encode().ljust(16 if namespace else 0), lora
            ),
            step_bytes_max=self.step_bytes, admit="always",
        )  # fmt: skip
        return self.tiering

    def settled(self) -> None:
        """Wait until nothing is dirty or on its way."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.tiering._saver._thread.submit(lambda: None).result(60)
            with self._lock:
                fetching, host = self._fetching, self.scheduler.manager.host
                assert fetching is not None
                is_busy = fetching._may_be_dirty or self.tiering._live
                if not is_busy and self.host_store.capacity == host.num_lent:
                    return
        raise AssertionError("blocks stay dirty or on their way")

    def check_nothing_is_left(self) -> None:
        self.check_idle()
        self.settled()
        with self._lock:
            manager = self.scheduler.manager
            manager.host.lend()
            manager.check()
            self.host_store._tier.check()
            num_host = manager.num_host_blocks
            assert self.host_store.capacity == manager.host.num_lent == num_host
            assert manager.stats().num_kept == 0
            assert self._fetching is not None
            assert self._fetching._is_on


def change_something(chance: random.Random, engine: SharingEngine) -> None:
    """Let stores fail and recover; forget and limit namespaces."""
    name = chance.choice(["a", "b"])
    if chance.random() < 0.03:
        engine.tiers.forget(name)
    if chance.random() < 0.03:
        capacity = chance.choice([1, 5 * BLOCK_BYTES, 30 * BLOCK_BYTES])
        engine.tiers.limit(name, capacity=capacity, ttl_s=chance.choice([None, 0.001]))
    for store in engine.below:
        if chance.random() < 0.05:
            store.answer = chance.choice([Saved.SAVED] * 3 + [Saved.REFUSED, Saved.LATE])
            store.fails = chance.random() < 0.1
            store.lost = set(list(store.blocks)[::3]) if chance.random() < 0.2 else set()


def check_tokens(prompt: list[int], stream: Stream) -> None:
    with contextlib.suppress(RequestCancelled):
        for number, sample in enumerate(stream.result(60).samples):
            assert sample.token_ids == expected(prompt, len(sample.token_ids), number)


def storm(seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Run an engine; return how many requests were swapped, and how many blocks were hits."""
    chance = random.Random(seed)
    below = [DictStore(BLOCK_BYTES) for _ in range(chance.randrange(3))]
    for store in below:
        store.capacity = chance.choice([None, 20, 100])
    fronts = [[chance.randrange(1000) for _ in range(60)] for _ in range(6)]
    costs = PreemptionCosts(seconds_per_token=chance.choice([1e-9, 1.0]))
    live: list[tuple[list[int], Stream]] = []
    num_blocks, num_host = chance.randrange(28, 40), chance.randrange(4, 40)
    with SharingEngine(below, num_blocks, num_host, chance.choice([1, 4, 100]), costs=costs) as e:
        for _ in range(300):
            prompt = [*chance.choice(fronts)[: chance.randrange(1, 41)], chance.randrange(9)]
            how = {"n": chance.choice([1, 1, 2]), "namespace": chance.choice(NAMES)}
            live.append((prompt, e.ask(prompt, chance.randrange(1, 12), **how)))
            change_something(chance, e)
            while len(live) > chance.randrange(20):
                prompt, stream = live.pop(chance.randrange(len(live)))
                if chance.random() < 0.25:
                    stream.cancel()
                check_tokens(prompt, stream)
        for prompt, stream in live:
            check_tokens(prompt, stream)
        e.check_nothing_is_left()
        stats = e.stats()
        assert stats.tiers is not None
        hits = sum(tier.store.hits for tier in stats.tiers.tiers)
        return np.array([stats.scheduler.total_preempted_by_swap, hits])


@pytest.mark.slow
def test_swaps_and_cached_blocks_share_host_memory_in_any_traffic() -> None:
    num_swaps, num_hits = sum(storm(seed) for seed in range(10))
    assert num_swaps > 0
    assert num_hits > 0
