"""An engine reports the end of a request when its prompt is saved, or after a bounded wait."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from kvpager.errors import EngineClosed, RequestCancelled, RequestExpired
from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.toy_runner import expected
from tests.support.toy_tiers import PROMPT, TieredEngine, Watch, store

NUM_FULL = 9  # of the blocks of the prompt: the last one lacks its last token in the cache


class PrefillEngine(TieredEngine):
    """A toy engine that saves prompts at once."""

    def __init__(
        self, stores: Sequence[Any], num_blocks: int = 64, *, wait_s: float = 60.0,
        core: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(stores, num_blocks, core={"save_wait_s": wait_s} | (core or {}), **options)


def found_by_another_engine(shared: DictStore, prompt: list[int], **labels: Any) -> int:
    """Return how many tokens of a prompt an engine finds now; assert that it answers right."""
    shared.is_closed = False
    with TieredEngine([shared], max_wait_s=60.0) as engine:
        output = engine.ask(prompt, **labels).result(60)
    assert output.token_ids == expected(prompt, 8)
    return output.num_cached_tokens


def test_a_prompt_is_in_the_store_when_its_request_ends() -> None:
    shared = store()
    with PrefillEngine([shared]) as engine:
        for seed in range(20):
            prompt = [seed, *PROMPT]
            output = engine.ask(prompt, 1).result(60)
            assert output.token_ids == expected(prompt, 1)
            assert found_by_another_engine(shared, prompt) == 40


def test_the_first_token_does_not_wait_for_the_store() -> None:
    slow = store()
    slow.gate.clear()
    with PrefillEngine([slow]) as engine:
        stream = engine.ask(PROMPT, 1)
        assert next(iter(stream)).id == expected(PROMPT, 1)[0]
        other = engine.ask([7, *PROMPT], 1)
        assert next(iter(other)).id == expected([7, *PROMPT], 1)[0]
        assert not stream.done
        slow.gate.set()
        assert stream.result(60).finish_reason == "length"
        other.result(60)


def test_a_store_that_does_not_answer_delays_no_end_for_ever() -> None:
    stuck = store()
    stuck.gate.clear()
    with PrefillEngine([stuck], wait_s=0.02) as engine:
        for seed in range(3):
            prompt = [seed, *PROMPT]
            assert engine.ask(prompt, 1).result(60).token_ids == expected(prompt, 1)
        assert not stuck.blocks
        stuck.gate.set()


@pytest.mark.parametrize("fault", ["refuses", "raises", "is bypassed", "is private"])
def test_a_store_that_takes_nothing_delays_no_end(fault: str) -> None:
    bad: Any = store()
    bad.answer = Saved.REFUSED if fault == "refuses" else Saved.SAVED
    bad.fails = fault == "raises"
    bad.bypassed = fault == "is bypassed"
    bad.is_private = fault == "is private"
    with PrefillEngine([bad]) as engine:
        assert engine.ask(PROMPT, 1).result(30).token_ids == expected(PROMPT, 1)
        engine.check_idle()


def test_a_prompt_larger_than_staging_is_saved_whole() -> None:
    shared = store()
    with PrefillEngine([shared], slots=2) as engine:
        engine.ask(PROMPT, 1).result(60)
        assert len(shared.blocks) >= NUM_FULL
    assert found_by_another_engine(shared, PROMPT) == 36


def test_blocks_that_another_request_holds_are_saved() -> None:
    shared = store()
    with PrefillEngine([shared]) as engine:
        engine.ask(PROMPT, 1).result(60)
        shared.drop(list(shared.blocks))
        endless = engine.ask(PROMPT, 150)  # its prompt is the same, and it goes on
        assert next(iter(endless)).id == expected(PROMPT, 1)[0]
        engine.ask(PROMPT, 1).result(60)
        assert len(shared.blocks) >= NUM_FULL
        endless.cancel()


def test_blocks_that_a_store_lost_in_silence_are_saved_again() -> None:
    shared = store()
    with PrefillEngine([shared]) as engine:
        engine.ask(PROMPT, 1).result(60)
        engine.saved()
        shared.blocks.clear()  # like a server that was restarted
        engine.ask(PROMPT, 1).result(60)
        assert len(shared.blocks) >= NUM_FULL
    assert found_by_another_engine(shared, PROMPT) == 36


def test_another_tenant_does_not_find_the_prompt() -> None:
    shared = store()
    with PrefillEngine([shared]) as engine:
        engine.ask(PROMPT, 1, namespace="a").result(60)
        found = {
            name: found_by_another_engine(shared, PROMPT, namespace=name)
            for name in ("b", None, "a")
        }
    assert found == {"b": 0, None: 0, "a": 36}


def test_a_longer_reply_ends_after_its_prompt_is_saved() -> None:
    shared = store()
    with PrefillEngine([shared]) as engine:
        output = engine.ask(PROMPT, 8, n=2).result(60)
        assert [each.token_ids for each in output.samples] == [
            expected(PROMPT, 8), expected(PROMPT, 8, 1)
        ]  # fmt: skip
        assert len(shared.blocks) >= NUM_FULL


def test_requests_that_fail_or_are_cancelled_wait_for_no_store() -> None:
    stuck = store()
    stuck.gate.clear()
    with PrefillEngine([stuck]) as engine:
        stream = engine.ask(PROMPT, 150)
        next(iter(stream))
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result(30)
        with pytest.raises(RequestExpired):
            engine.ask([8, *PROMPT], 1, deadline=0.0).result(30)
        stuck.gate.set()


def test_the_end_of_the_engine_ends_requests_that_wait() -> None:
    slow = store()
    slow.gate.clear()
    engine = PrefillEngine([slow])
    stream = engine.ask(PROMPT, 1)
    while not (engine._fetching and engine._fetching.is_waiting):
        assert engine.is_open
    engine.stop()
    slow.gate.set()
    engine.close()
    assert stream.result(0).token_ids == expected(PROMPT, 1)
    with pytest.raises(EngineClosed):
        engine.ask(PROMPT)


def test_an_id_is_free_while_the_end_of_its_request_waits() -> None:
    slow = store()
    slow.gate.clear()
    with PrefillEngine([slow]) as engine:
        first = engine.ask(PROMPT, 1, request_id="a")
        while "a" in engine._loop.requests:
            assert engine.is_open
        second = engine.ask([7, *PROMPT], 1, request_id="a")
        next(iter(second))
        slow.gate.set()
        assert first.result(60).token_ids == expected(PROMPT, 1)
        assert second.result(60).token_ids == expected([7, *PROMPT], 1)


def test_a_changed_model_saves_nothing_and_ends_its_requests() -> None:
    slow, watch = store(), Watch()
    slow.gate.clear()
    with PrefillEngine([slow], slots=1, core={"watch": watch}) as engine:
        waiting = engine.ask(PROMPT, 1)
        next(iter(waiting))
        watch.version = 1
        changed = engine.ask([7, *PROMPT], 1)
        assert changed.result(30).token_ids == expected([7, *PROMPT], 1)
        assert waiting.result(30).token_ids == expected(PROMPT, 1)
        slow.gate.set()
    assert len(slow.blocks) <= 1


def test_a_defect_while_saving_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("kvpager.storage.tiers.prompt_saving.PromptSaver.save", fail)
    with PrefillEngine([store()]) as engine:
        for seed in range(3):
            prompt = [seed, *PROMPT]
            assert engine.ask(prompt, 1).result(30).token_ids == expected(prompt, 1)
        engine.check_idle()


@pytest.mark.parametrize("seed", range(4))
def test_prefills_at_random_are_continued_with_the_same_tokens(seed: int) -> None:
    chance = random.Random(seed)
    shared = store()
    prefill = PrefillEngine([shared], 24, slots=chance.randrange(2, 20))
    decode = TieredEngine([shared], 24, slots=chance.randrange(2, 20), max_wait_s=60.0)
    fronts = [[chance.randrange(1000) for _ in range(24)] for _ in range(4)]
    with prefill, decode:
        for _ in range(5):
            prompts = [
                [*chance.choice(fronts)[: chance.randrange(1, 25)], chance.randrange(9)]
                for _ in range(10)
            ]
            firsts = [prefill.ask(prompt, 1) for prompt in prompts]
            for prompt, first in zip(prompts, firsts, strict=True):
                if chance.random() < 0.2:
                    first.cancel()
                else:
                    assert first.result(60).token_ids == expected(prompt, 1)
                assert decode.ask(prompt, 5).result(60).token_ids == expected(prompt, 5)
            shared.drop(chance.sample(sorted(shared.blocks), len(shared.blocks) // 4))
        for engine in (prefill, decode):
            engine.saved()
            engine.check_idle()
            assert engine.staging.num_free == engine.slots
        assert prefill._fetching is not None
        assert not prefill._fetching.is_waiting
        assert not prefill._fetching._saves._live  # type: ignore[union-attr]
    assert shared.num_loads > 0
