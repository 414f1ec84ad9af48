"""Engines over stores in traffic at random: right tokens, and nothing is left behind.

make storm        100,000 requests, not 20,000
"""

from __future__ import annotations

import contextlib
import os
import random

import pytest

from kvpager.engine.core import EngineCore
from kvpager.engine.stream import Stream
from kvpager.errors import RequestCancelled
from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, TieredEngine, store

NUM_REQUESTS = int(os.environ.get("KVPAGER_STORM", "20000"))


@pytest.mark.parametrize("seed", range(4))
def test_traffic_at_random_gives_the_same_tokens(seed: int) -> None:
    chance = random.Random(seed)
    shared = store()
    engines = [TieredEngine([shared], 24, slots=chance.randrange(2, 20)) for _ in range(2)]
    fronts = [[chance.randrange(1000) for _ in range(24)] for _ in range(4)]
    try:
        for _ in range(4):
            asked: list[tuple[list[int], Stream]] = []
            for _ in range(15):
                prompt = [*chance.choice(fronts)[: chance.randrange(1, 25)], chance.randrange(9)]
                stream = chance.choice(engines).ask(
                    prompt, 4, namespace=chance.choice([None, "a"]), n=chance.choice([1, 1, 2])
                )
                if chance.random() < 0.15:
                    stream.cancel()
                else:
                    asked.append((prompt, stream))
            for prompt, stream in asked:
                for number, sample in enumerate(stream.result(60).samples):
                    assert sample.token_ids == expected(prompt, 4, number)
            for engine in engines:
                engine.saved()
                engine.check_idle()
            shared.drop(chance.sample(sorted(shared.blocks), len(shared.blocks) // 4))
    finally:
        for engine in engines:
            EngineCore.close(engine)
    assert shared.num_loads > 0


@pytest.mark.parametrize("num_requests", [300, pytest.param(NUM_REQUESTS, marks=pytest.mark.slow)])
def test_requests_that_end_at_any_moment_leave_nothing_behind(num_requests: int) -> None:
    chance = random.Random(num_requests)
    stores = [DictStore(BLOCK_BYTES), DictStore(BLOCK_BYTES)]
    stores[0].capacity, stores[1].capacity = 40, 120
    fronts = [[chance.randrange(1000) for _ in range(24)] for _ in range(30)]
    open_streams: list[Stream] = []
    with TieredEngine(stores, 24, slots=12, step_bytes_max=4 * BLOCK_BYTES) as engine:
        for _ in range(num_requests):
            front = chance.choice(fronts)[: chance.randrange(1, 25)]
            open_streams.append(engine.ask([*front, chance.randrange(9)], chance.randrange(1, 4)))
            chance.choice(stores).answer = chance.choice([Saved.SAVED] * 4 + [Saved.REFUSED])
            chance.choice(stores).fails = chance.random() < 0.002
            while len(open_streams) > chance.randrange(20):
                stream = open_streams.pop(chance.randrange(len(open_streams)))
                if chance.random() < 0.5:
                    stream.cancel()
                with contextlib.suppress(RequestCancelled):
                    stream.result(60)
        for stream in open_streams:
            stream.cancel()
        engine.saved()
        engine.check_idle()
        engine.saved()
        assert engine.staging.num_free == engine.slots
        tiers = engine.stats().tiers
        assert tiers is not None
        assert tiers.num_fetching == 0
        assert engine._fetching is not None
        assert not engine._fetching._held
        assert not engine._fetching._tokens_by_store
        manager = engine.scheduler.manager
        manager.check()
        assert manager.stats().num_kept == 0  # no ticket is open
        if num_requests >= 300:
            assert min(store.num_loads for store in stores) > 0
            assert stores[0].num_saves > 0
