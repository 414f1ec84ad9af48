"""An engine finds prompts in stores again, and no store makes a step wait."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from kvpager.engine.core import EngineCore
from kvpager.engine.stream import Stream
from kvpager.errors import RequestCancelled
from kvpager.storage.tiers.protocol import Saved
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.toy_runner import ToyEngine, expected
from tests.support.toy_tiers import BLOCK_BYTES, TieredEngine

PROMPT = list(range(40))


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


def test_a_late_store_costs_one_deadline() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=0.0) as engine:
        slow.gate.clear()
        output = engine.ask(PROMPT).result(60)
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


@pytest.mark.parametrize("slots", [64, 2])
def test_the_end_of_an_engine_saves_the_idle_blocks(slots: int) -> None:
    shared = store()
    with TieredEngine([shared], slots=slots) as engine:
        for seed in range(3):
            engine.ask([seed, *PROMPT]).result(60)
    assert len(shared.blocks) == 3 * 12  # 41 tokens and 7 of the reply are computed


def test_an_engine_that_ends_after_a_change_saves_nothing() -> None:
    shared, watch = store(), Watch()
    shared.gate.clear()  # nothing is saved before the change
    with TieredEngine([shared], core={"watch": watch}, max_wait_s=60, slots=1) as engine:
        engine.ask(PROMPT).result(60)
        watch.version = 1
        shared.gate.set()
    assert len(shared.blocks) <= 1


def test_a_store_that_raises_changes_no_token() -> None:
    broken = store()
    with TieredEngine([broken]) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        broken.fails = True
        for seed in range(4):
            prompt = [seed, *PROMPT]
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)


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


def test_a_step_copies_no_more_than_its_bytes() -> None:
    filled = store_with_the_prompt()
    with TieredEngine([filled], step_bytes_max=2 * BLOCK_BYTES) as engine:
        copied, steps = engine.staging.copied, list[int]()
        assert engine._fetching is not None
        with engine._lock:  # the engine's thread waits
            between_steps = engine._fetching.between_steps

            def counted() -> None:
                before = sum(copied)
                between_steps()
                steps.append(sum(copied) - before)

            engine.between_steps[-1] = counted
        streams = [engine.ask(PROMPT), engine.ask([7, *PROMPT])]
        outputs = [stream.result(60) for stream in streams]
        assert [output.token_ids for output in outputs] == [
            expected(PROMPT, 8), expected([7, *PROMPT], 8)
        ]  # fmt: skip
        assert outputs[0].cached_tokens_by_tier == {"dict": 36}
        engine.saved()
        assert max(steps) == 2
        assert sum(steps) >= 9 + 12  # loaded and saved


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


@pytest.mark.parametrize("num_requests", [300, pytest.param(100_000, marks=pytest.mark.slow)])
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


# ------------------------------------------------------------------- when tiers are given up


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


def test_a_changed_model_saves_and_fetches_nothing_more() -> None:
    shared, watch = store(), Watch()
    with TieredEngine([shared], core={"watch": watch}) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        saved = len(shared.blocks)
        watch.version = 1
        assert engine.ask(PROMPT).result(60).num_cached_tokens == 0
        engine.ask([8, *PROMPT]).result(60)
        engine.check_idle()
    assert (len(shared.blocks), shared.num_loads) == (saved, 0)


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


def test_a_model_that_changes_during_a_reply_saves_no_block_of_it() -> None:
    shared, watch, steps = store(), Watch(), list[Any]()

    def on_step(step: Any) -> None:
        steps.append(step)
        watch.version = int(len(steps) > 30)

    with TieredEngine([shared], core={"watch": watch, "on_step": on_step}) as engine:
        engine.ask(PROMPT, 60).result(60)
        engine.check_idle()
        assert not shared.blocks


def test_floors_that_need_the_blocks_save_nothing_and_end_nothing() -> None:
    with TieredEngine([store()], 20) as engine:
        engine.scheduler.manager.quotas.set("a", floor=14)
        for seed in range(3):
            prompt = [seed, *PROMPT[:10]]
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
        assert engine.is_open


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


def test_a_store_that_fails_to_close_leaves_none_open() -> None:
    class Stubborn(DictStore):
        def close(self) -> None:
            raise OSError("it does not close")

    other = store()
    with TieredEngine([Stubborn(BLOCK_BYTES), other]) as engine:
        engine.ask(PROMPT).result(60)
    assert other.is_closed
    assert not engine._dispatcher._thread.is_alive()
