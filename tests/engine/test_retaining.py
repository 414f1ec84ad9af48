"""Callers keep cached prompts on the device."""

from __future__ import annotations

import time

import pytest

from kvpager.errors import EngineClosed
from kvpager.storage.tiers.controls import TierControls
from tests.support.gates import Gate
from tests.support.toy_runner import expected
from tests.support.toy_tiers import PROMPT, TieredEngine, store, store_with_the_prompt

OTHER = list(range(100, 140))  # as long as PROMPT: 10 blocks, and 12 with 8 new tokens


def tiers_of(engine: TieredEngine) -> TierControls:
    assert engine.tiers is not None
    return engine.tiers


def num_kept(engine: TieredEngine) -> int:
    return engine.stats().pool.num_kept


def test_a_retained_prompt_outlives_others() -> None:
    with TieredEngine([store()], 32, max_wait_s=0.0) as engine:
        engine.ask(PROMPT).result(60)
        with tiers_of(engine).retain(PROMPT) as retained:
            assert retained.num_tokens == 40
            for first in range(100, 1000, 100):
                engine.ask([first, *range(40)]).result(60)
            assert engine.ask(PROMPT).result(60).num_cached_tokens == 39
        assert (retained.num_tokens, num_kept(engine)) == (0, 0)
        retained.release()
        engine.check_idle()


def test_a_request_without_room_beside_retained_prompts_is_refused() -> None:
    with TieredEngine([store()], 20) as engine:
        engine.ask(PROMPT).result(60)
        retained = tiers_of(engine).retain(PROMPT)
        with pytest.raises(ValueError, match=r"may need 12 blocks, .* 20, 10 of them retained"):
            engine.ask(OTHER)
        assert engine.ask(PROMPT).result(60).token_ids == expected(PROMPT, 8)
        assert engine.ask(OTHER[:32]).result(60).token_ids == expected(OTHER[:32], 8)
        retained.release()
        assert engine.ask(OTHER).result(60).token_ids == expected(OTHER, 8)
        engine.check_idle()


def test_a_prompt_is_not_retained_if_a_live_request_needs_the_room() -> None:
    with TieredEngine([store()], 20) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        with Gate(engine.runner) as gate:
            stream = engine.ask(OTHER)
            gate.entered.acquire()
            with pytest.raises(ValueError, match=r"may need 12 blocks, .* retained"):
                tiers_of(engine).retain(PROMPT)
            assert num_kept(engine) == 0
        assert stream.result(60).token_ids == expected(OTHER, 8)
        engine.check_idle()


def test_a_quota_counts_the_retained_prompts_of_its_namespace() -> None:
    with TieredEngine([store()], 64) as engine:
        engine.ask(PROMPT, namespace="acme").result(60)
        with tiers_of(engine).retain(PROMPT, namespace="acme"):
            with pytest.raises(ValueError, match="its requests and retained prompts hold more"):
                engine.quotas["acme"] = 9
            engine.quotas["acme"] = 20
            with pytest.raises(ValueError, match=r"quota .* 20, 10 of them retained"):
                engine.ask(OTHER, namespace="acme")
        assert engine.ask(OTHER, namespace="acme").result(60).token_ids == expected(OTHER, 8)


def test_forgetting_a_namespace_releases_its_prompts() -> None:
    with TieredEngine([store()]) as engine:
        for namespace in ("acme", "other"):
            engine.ask(PROMPT, namespace=namespace).result(60)
        tiers = tiers_of(engine)
        acme = tiers.retain(PROMPT, namespace="acme")
        other = tiers.retain(PROMPT, namespace="other")
        tiers.forget("acme")
        assert (acme.num_tokens, other.num_tokens, num_kept(engine)) == (0, 40, 10)
        found = engine.scheduler.manager.match_prefix
        assert (found(PROMPT, namespace="acme"), found(PROMPT, namespace="other")) == (0, 40)
        other.release()
        engine.check_idle()


def test_clearing_the_prefix_cache_releases_retained_prompts() -> None:
    with TieredEngine([store()], 20) as engine:
        engine.ask(PROMPT).result(60)
        retained = tiers_of(engine).retain(PROMPT)
        engine.clear_prefix_cache()
        assert engine.ask(OTHER).result(60).token_ids == expected(OTHER, 8)  # it has room again
        assert retained.num_tokens == 0
        assert tiers_of(engine).retain(OTHER).num_tokens == 0  # tiers are off
        engine.check_idle()


def test_released_blocks_that_a_store_lost_are_saved_again() -> None:
    kept = store()
    with TieredEngine([kept]) as engine:
        engine.ask(PROMPT).result(60)
        engine.saved()
        with tiers_of(engine).retain(PROMPT):
            kept.drop(list(kept.blocks))
            engine.ask(OTHER).result(60)
            engine.saved()
            num_saved = len(kept.blocks)
        deadline = time.monotonic() + 60
        while len(kept.blocks) < num_saved + 10:
            assert time.monotonic() < deadline


def test_the_end_of_an_engine_saves_retained_prompts() -> None:
    kept = store()
    with TieredEngine([kept]) as engine:
        stream = engine.ask(PROMPT)
        stream.result(60)
        retained = tiers_of(engine).retain(PROMPT)
    assert retained.num_tokens == 0
    retained.release()
    kept.is_closed = False
    with TieredEngine([kept]) as engine:
        assert tiers_of(engine).warm([PROMPT]) == 36
    with pytest.raises(EngineClosed):
        tiers_of(engine).retain(PROMPT)


def test_nothing_is_retained_of_a_prompt_that_is_not_cached() -> None:
    with TieredEngine([store_with_the_prompt()]) as engine:
        tiers = tiers_of(engine)
        assert tiers.retain(PROMPT).num_tokens == 0
        tiers.warm([PROMPT])
        with tiers.retain(PROMPT) as retained:
            assert retained.num_tokens == 36
        with pytest.raises(TypeError, match="namespace=5"):
            tiers.retain(PROMPT, namespace=5)  # type: ignore[arg-type]
        engine.check_idle()
