"""An engine finds prompts in stores again, and no store makes a step wait."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvpager.errors import RequestCancelled
from kvpager.storage.tiers.protocol import Outcomes
from kvpager.storage.tiers.tiering import Tiering
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, expected
from tests.support.toy_tiers import (
    BLOCK_BYTES,
    PROMPT,
    TieredEngine,
    store,
    store_with_the_prompt,
)


def test_another_engine_finds_a_prompt_and_says_so() -> None:
    shared = store()
    with TieredEngine([shared]) as one:
        output = one.ask(PROMPT).result(60)
        assert (output.num_cached_tokens, output.cached_tokens_by_tier) == (0, {})
        one.saved()
    shared.is_closed = False
    with TieredEngine([shared]) as other:
        output = other.ask(PROMPT).result(60)
        assert output.token_ids == expected(PROMPT, 8)
        assert output.num_cached_tokens == 36
        assert output.cached_tokens_by_tier == {"dict": 36}
        again = other.ask(PROMPT).result(60)
        assert again.num_cached_tokens == 39  # the last block, but for the last token
        assert again.cached_tokens_by_tier == {}
        other.saved()
        assert other.staging.num_free == other.slots
    assert shared.is_closed


def test_statistics_name_each_tier() -> None:
    with TieredEngine([store_with_the_prompt()]) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        tiers = engine.stats().tiers
        assert tiers is not None
        (tier,) = tiers.tiers
        assert (tier.name, tier.store.num_blocks) == ("dict", 11)
        assert (tiers.num_fetching, tiers.num_free_slots) == (0, engine.slots)
        assert (tiers.total_declined, tiers.total_dropped_dirty) == (0, 0)
    with ToyEngine() as plain:
        assert plain.stats().tiers is None


def test_an_evicted_prompt_is_found_again() -> None:
    with TieredEngine([store()], 14) as engine:
        prompts = [[seed, *PROMPT[:30]] for seed in range(5)]
        for prompt in prompts:
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
            engine.saved()
        output = engine.ask(prompts[0]).result(60)
        assert output.token_ids == expected(prompts[0], 8)
        assert output.cached_tokens_by_tier == {"dict": 28}


def test_tenants_do_not_find_each_others_prompts() -> None:
    shared = store()
    with TieredEngine([shared]) as engine:
        engine.ask(PROMPT, namespace="a").result(60)
        engine.saved()
    with TieredEngine([shared]) as engine:
        outputs = [engine.ask(PROMPT, namespace=name).result(60) for name in ("b", None, "a")]
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 36]


def test_others_run_while_a_prompt_is_fetched() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=60) as engine:
        slow.gate.clear()
        held = engine.ask(PROMPT)
        other = [7] * 10
        assert engine.ask(other).result(60).token_ids == expected(other, 8)
        assert not held.done
        slow.gate.set()
        assert held.result(60).cached_tokens_by_tier == {"dict": 36}


def test_loaded_blocks_are_attached_while_others_load(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(40 * BLOCK_SIZE))
    filled = store()
    with TieredEngine([filled]) as engine:
        engine.ask(prompt).result(60)
        engine.saved()
    load, rest = filled.load, threading.Event()

    def load_the_rest_late(keys: Any, into: Any, deadline: float) -> Outcomes:
        assert filled.num_loads < 32 or rest.wait(60)
        return load(keys, into, deadline)

    monkeypatch.setattr(filled, "load", load_the_rest_late)
    filled.is_closed = False
    with TieredEngine([filled], max_wait_s=60) as engine:
        stream = engine.ask(prompt)
        while engine.scheduler.manager.match_prefix(prompt) < 32 * BLOCK_SIZE:
            pass
        assert not stream.done
        rest.set()
        assert stream.result(60).cached_tokens_by_tier == {"dict": 39 * BLOCK_SIZE}
        assert filled.num_loads == 39
        engine.saved()
        assert engine.staging.num_free == engine.slots


@pytest.mark.parametrize("step_bytes_max", [64 * BLOCK_BYTES, 5 * BLOCK_BYTES])
@pytest.mark.parametrize("is_warmed", [False, True], ids=["request", "warmed"])
def test_what_arrived_before_a_store_hangs_is_used(
    is_warmed: bool, step_bytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(25 * BLOCK_SIZE))
    filled = store()
    with TieredEngine([filled]) as engine:
        engine.ask(prompt).result(60)
        engine.saved()
    load, rest, late_s = filled.load, threading.Event(), [0.0]

    def load_once(keys: Any, into: Any, deadline: float) -> Outcomes:
        if filled.num_loads:
            late_s[0] = 1000.0
            assert rest.wait(60)
        return load(keys, into, deadline)

    monkeypatch.setattr(filled, "load", load_once)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s[0])
    monkeypatch.setattr("kvpager.engine.fetching.time", clock)
    monkeypatch.setattr("kvpager.engine.warming.time", clock)
    filled.is_closed = False
    with TieredEngine([filled], max_wait_s=60, step_bytes_max=step_bytes_max) as engine:
        if is_warmed:
            assert engine.tiers is not None
            assert engine.tiers.warm([prompt]) == 16 * BLOCK_SIZE
        output = engine.ask(prompt).result(60)
        assert output.token_ids == expected(prompt, 8)
        assert output.num_cached_tokens == 16 * BLOCK_SIZE
        rest.set()
        engine.saved()
        assert engine.staging.num_free == engine.slots


def test_a_late_store_costs_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, late_s = store_with_the_prompt(), [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s[0])
    monkeypatch.setattr("kvpager.engine.fetching.time", clock)
    with TieredEngine([slow], max_wait_s=60) as engine:
        slow.gate.clear()
        stream = engine.ask(PROMPT)
        late_s[0] = 1000.0
        output = stream.result(60)
        assert output.token_ids == expected(PROMPT, 8)
        assert output.num_cached_tokens == 0
        slow.gate.set()


def test_a_cancelled_request_gives_its_fetch_up() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=60) as engine:
        slow.gate.clear()
        streams = [engine.ask(PROMPT) for _ in range(3)]
        for stream in streams[:2]:
            stream.cancel()
            with pytest.raises(RequestCancelled):
                stream.result(60)
        slow.gate.set()
        assert streams[2].result(60).token_ids == expected(PROMPT, 8)
        engine.saved()
        engine.check_idle()


def test_an_engine_may_close_during_a_fetch() -> None:
    slow = store_with_the_prompt()
    engine = TieredEngine([slow], max_wait_s=60)
    slow.gate.clear()
    stream = engine.ask(PROMPT)
    engine.stop()
    slow.gate.set()
    engine.close()
    with pytest.raises(RequestCancelled):
        stream.result(60)
    assert engine.staging.num_free == engine.slots
    assert slow.is_closed


def test_a_store_that_raises_changes_no_token() -> None:
    broken = store()
    with TieredEngine([broken]) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        broken.fails = True
        for seed in range(4):
            prompt = [seed, *PROMPT]
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)


def test_a_useless_fetch_leaves_the_next_one_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = store()
    prompts = [[seed, *PROMPT] for seed in range(2)]
    with TieredEngine([filled]) as engine:
        for prompt in prompts:
            engine.ask(prompt).result(60)
        engine.saved()
    filled.is_closed = False
    attach, calls = Tiering._attach, list[int]()

    def attach_but_the_first(self: Tiering, fetch: Any, count: int) -> dict[str, int] | None:
        calls.append(count)
        return None if len(calls) == 1 else attach(self, fetch, count)

    monkeypatch.setattr(Tiering, "_attach", attach_but_the_first)
    with TieredEngine([filled], max_wait_s=60, step_bytes_max=2 * BLOCK_BYTES) as engine:
        fetching = engine._fetching
        assert fetching is not None
        with engine._lock:  # no step sees one of them alone
            streams = [engine.ask(prompt) for prompt in prompts]
            while not all(held.fetch.is_done for held in fetching._held):
                pass
        outputs = [stream.result(60) for stream in streams]
        assert [output.token_ids for output in outputs] == [expected(each, 8) for each in prompts]
        assert [output.cached_tokens_by_tier for output in outputs] == [{}, {"dict": 40}]
        assert set(calls) <= {1, 2}
        engine.saved()


def test_requests_with_one_cold_prompt_fetch_each_block_once() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=60, step_bytes_max=BLOCK_BYTES) as engine:
        slow.gate.clear()
        streams = [engine.ask(PROMPT) for _ in range(48)]
        slow.gate.set()
        streams += [engine.ask(PROMPT) for _ in range(16)]  # while blocks are attached
        outputs = [stream.result(60) for stream in streams]
        assert all(output.token_ids == expected(PROMPT, 8) for output in outputs)
        assert slow.num_loads == 9
        engine.saved()
        engine.check_idle()


@pytest.mark.parametrize("method", ["has_dirty", "clean", "attach"])
def test_a_defect_of_the_tiering_ends_no_request(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    filled = store_with_the_prompt()
    monkeypatch.setattr(Tiering, method, fail)
    with TieredEngine([filled]) as engine:
        for seed in (0, 1, 1):
            prompt = [seed, *PROMPT] if seed else PROMPT
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
        engine.check_idle()


def test_a_cleared_prefix_cache_is_not_filled_from_stores() -> None:
    shared = store_with_the_prompt()
    with TieredEngine([shared]) as engine:
        engine.clear_prefix_cache()
        output = engine.ask(PROMPT).result(60)
        assert (output.token_ids, output.num_cached_tokens) == (expected(PROMPT, 8), 0)
    assert shared.num_loads == 0


def test_an_id_that_is_used_again_waits_for_its_own_fetch() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=60) as engine:
        slow.gate.clear()
        engine.ask(PROMPT, request_id="a").cancel()
        while "a" in engine.scheduler.request_ids:
            engine.ask([5], 1).result(60)
        stream = engine.ask([*PROMPT, 1], request_id="a")
        slow.gate.set()
        assert stream.result(60).cached_tokens_by_tier == {"dict": 40}
        engine.saved()
