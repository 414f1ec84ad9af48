"""Callers load prompts from tiers ahead of requests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpager.errors import EngineClosed
from kvpager.storage.tiers.controls import TierControls
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, PROMPT, TieredEngine, store, store_with_the_prompt


def tiers_of(engine: TieredEngine) -> TierControls:
    assert engine.tiers is not None
    return engine.tiers


@pytest.mark.parametrize("step_bytes_max", [64 * BLOCK_BYTES, 2 * BLOCK_BYTES])
def test_a_warmed_prompt_is_on_the_device(step_bytes_max: int) -> None:
    with TieredEngine([store_with_the_prompt()], step_bytes_max=step_bytes_max) as engine:
        assert tiers_of(engine).warm([PROMPT, PROMPT]) == 36
        output = engine.ask(PROMPT).result(60)
        assert output.token_ids == expected(PROMPT, 8)
        assert (output.num_cached_tokens, output.cached_tokens_by_tier) == (36, {})
        engine.saved()
        engine.check_idle()


def test_a_prompt_is_warmed_even_if_computing_it_is_faster() -> None:
    filled = store_with_the_prompt()
    with TieredEngine([filled], recompute_s=lambda _: 0.0) as engine:
        assert engine.ask(PROMPT[:20]).result(60).num_cached_tokens == 0
        assert tiers_of(engine).warm([PROMPT]) > 0


def test_a_namespace_warms_its_own_prompts() -> None:
    with TieredEngine([store_with_the_prompt()]) as engine:
        assert tiers_of(engine).warm([PROMPT], namespace="a") == 0
        assert tiers_of(engine).warm([PROMPT]) == 36


def test_a_late_prompt_is_given_up() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow]) as engine:
        slow.gate.clear()
        assert tiers_of(engine).warm([PROMPT], wait_s=0.0) == 0
        slow.gate.set()
        engine.saved()
        engine.check_idle()


def test_a_request_does_not_wait_for_the_deadline_of_a_warmed_prompt() -> None:
    slow = store_with_the_prompt()
    with TieredEngine([slow], max_wait_s=0.0) as engine:
        slow.gate.clear()
        tiers = tiers_of(engine)
        with ThreadPoolExecutor(1) as caller:
            warmed = caller.submit(tiers.warm, [PROMPT], wait_s=600.0)
            while not tiers.stats().num_fetching:
                pass
            try:
                prompt = [*PROMPT[:6], 99]  # it lacks the same first block
                assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
                assert not warmed.done()
            finally:
                slow.gate.set()
            assert warmed.result(60) == 32  # the request computed the first block
        engine.saved()
        engine.check_idle()


def test_an_engine_that_ends_ends_the_wait() -> None:
    slow, found = store_with_the_prompt(), list[int]()
    with TieredEngine([slow]) as engine:
        slow.gate.clear()
        tiers, began = tiers_of(engine), threading.Event()

        def warm() -> None:
            prompts = (began.set() or PROMPT for _ in range(1))
            found.append(tiers.warm(prompts))

        caller = threading.Thread(target=warm)
        caller.start()
        assert began.wait(60)
        while not tiers.stats().num_fetching:
            pass
        engine.stop()
        slow.gate.set()
    caller.join(60)
    assert found == [0] or found == [36]  # it may have been attached before
    assert engine.staging.num_free == engine.slots
    with pytest.raises(EngineClosed):
        tiers.warm([PROMPT])


def test_nothing_is_warmed_once_the_prefix_cache_was_cleared() -> None:
    with TieredEngine([store_with_the_prompt()]) as engine:
        engine.clear_prefix_cache()
        assert tiers_of(engine).warm([PROMPT]) == 0


def test_a_store_that_fails_warms_nothing() -> None:
    broken = store_with_the_prompt()
    with TieredEngine([broken]) as engine:
        broken.fails = True
        assert tiers_of(engine).warm([PROMPT]) == 0


def test_bad_arguments_are_refused() -> None:
    with TieredEngine([store()]) as engine:
        with pytest.raises(ValueError, match="wait_s=-1"):
            tiers_of(engine).warm([PROMPT], wait_s=-1)
        with pytest.raises(TypeError, match="namespace=5"):
            tiers_of(engine).warm([PROMPT], namespace=5)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="token ids: expected integers"):
            tiers_of(engine).warm([["a", "b", "c", "d", "e"]])  # type: ignore[list-item]
