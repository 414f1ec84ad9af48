"""An engine saves idle blocks in stores, and none that a changed model computed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.dict_store import DictStore
from tests.support.toy_runner import expected
from tests.support.toy_tiers import (
    BLOCK_BYTES,
    PROMPT,
    TieredEngine,
    Watch,
    store,
    store_with_the_prompt,
)


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


def test_a_store_that_fails_to_close_leaves_none_open() -> None:
    class Stubborn(DictStore):
        def close(self) -> None:
            raise OSError("it does not close")

    other = store()
    with TieredEngine([Stubborn(BLOCK_BYTES), other]) as engine:
        engine.ask(PROMPT).result(60)
    assert other.is_closed
    assert not engine._dispatcher._thread.is_alive()
