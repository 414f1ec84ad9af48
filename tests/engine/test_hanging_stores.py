"""A store that never returns from a call: engines leave it alone, use the others, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpager.engine.stream import Stream
from kvpager.errors import RequestCancelled
from tests.support.clock import Clock
from tests.support.dict_store import DictStore
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, PROMPT, TieredEngine, store, store_with_the_prompt

OTHER = [7, *PROMPT]


class HangingStore(DictStore):
    """A store whose method `hanging` does not return before `end` is set."""

    def __init__(self) -> None:
        super().__init__(BLOCK_BYTES)
        self.hanging = ""
        self.num_waiting, self.end = 0, threading.Event()

    def _call(self, name: str) -> None:
        if name == self.hanging:
            self.num_waiting += 1
            assert self.end.wait(120)

    def find(self, keys: Any) -> int:
        self._call("find")
        return super().find(keys)

    def load(self, keys: Any, into: Any, deadline: float) -> Any:
        self._call("load")
        return super().load(keys, into, deadline)

    def save(self, keys: Any, blocks: Any, deadline: float) -> Any:
        self._call("save")
        return super().save(keys, blocks, deadline)

    def drop(self, keys: Any) -> bool:
        self._call("drop")
        return super().drop(keys)


@pytest.fixture
def hanging() -> Iterator[HangingStore]:
    hanging = HangingStore()
    yield hanging
    hanging.end.set()


def with_clock(engine: TieredEngine) -> Clock:
    """Let the calls of stores pass their time as the test says."""
    assert engine._fetching is not None
    clock = engine._fetching._tiering._calls._clock = Clock(time.monotonic())
    return clock


def becomes(condition: Callable[..., bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def cancel(stream: Stream) -> None:
    stream.cancel()
    with pytest.raises(RequestCancelled):
        stream.result(60)


@pytest.mark.parametrize("method", ["find", "load"])
def test_the_next_store_serves_while_one_hangs(hanging: HangingStore, method: str) -> None:
    good = store_with_the_prompt()
    hanging.blocks, hanging.hanging = dict(good.blocks), method
    engine = TieredEngine([hanging, good], 24, max_wait_s=60)
    try:
        clock = with_clock(engine)
        for number in range(1 if method == "load" else 2):  # two threads load
            stream = engine.ask(PROMPT, namespace="a" if number else None)
            becomes(lambda number=number: hanging.num_waiting > number)
            cancel(stream)
        clock.now += 1000.0
        output = engine.ask(PROMPT).result(60)
        assert output.token_ids == expected(PROMPT, 8)
        assert output.num_cached_tokens == 36
        assert good.num_loads == 9
        tiers = engine.stats().tiers
        assert tiers is not None
        assert [tier.bypassed for tier in tiers.tiers] == [True, False]
    finally:
        engine.close()  # while it hangs
    hanging.end.set()
    becomes(lambda: engine.staging.num_free == engine.slots)
    becomes(lambda: hanging.is_closed)


def test_a_prompt_is_computed_at_once_if_all_stores_hang(hanging: HangingStore) -> None:
    hanging.hanging = "find"
    with TieredEngine([hanging], 24, max_wait_s=60) as engine:
        clock = with_clock(engine)
        stream = engine.ask(PROMPT)
        becomes(lambda: hanging.num_waiting == 1)
        cancel(stream)
        clock.now += 1000.0
        assert engine.ask(OTHER).result(60).token_ids == expected(OTHER, 8)
        tiers = engine.stats().tiers
        assert tiers is not None
        assert tiers.total_declined > 0
        hanging.end.set()
        becomes(lambda: not engine._fetching._tiering._calls.hangs(0))  # type: ignore[union-attr]
        engine.ask([8, *PROMPT]).result(60)
        engine.saved()
        assert len(hanging.blocks) > 0  # it is in use again


def test_others_are_saved_to_while_one_hangs(hanging: HangingStore) -> None:
    good = store()
    hanging.hanging = "save"
    engine = TieredEngine([hanging, good], 64, slots=64)
    try:
        clock = with_clock(engine)
        engine.ask(PROMPT).result(60)
        becomes(lambda: hanging.num_waiting == 1)
        assert not good.blocks  # one thread saves
        clock.now += 1000.0
        engine.ask(OTHER).result(60)
        becomes(lambda: len(good.blocks) >= len(OTHER) // 4)
    finally:
        engine.close()
    hanging.end.set()
    becomes(lambda: engine.staging.num_free == engine.slots)
    assert len(hanging.blocks) > 0


def test_a_save_that_hangs_keeps_only_the_slots_of_its_call(hanging: HangingStore) -> None:
    good = store()
    hanging.hanging, slots = "save", 64
    engine = TieredEngine([hanging, good], 64, slots=slots)
    try:
        clock = with_clock(engine)
        engine.ask(list(range(160))).result(60)  # 40 blocks
        becomes(lambda: hanging.num_waiting == 1)
        held = slots - engine.staging.num_free
        clock.now += 1000.0
        engine.ask(OTHER).result(60)
        becomes(lambda: engine.staging.num_free >= slots - 16)
        assert held > 32
        assert len(good.blocks) > 16
    finally:
        engine.close()
    hanging.end.set()
    becomes(lambda: engine.staging.num_free == slots)


def test_a_namespace_is_forgotten_where_no_store_hangs(hanging: HangingStore) -> None:
    good = store()
    engine = TieredEngine([hanging, good], 64)
    try:
        clock = with_clock(engine)
        engine.ask(PROMPT, namespace="a").result(60)
        engine.saved()
        num_blocks, hanging.hanging = len(good.blocks), "drop"
        assert engine.tiers is not None
        calls: list[int] = []
        forget = threading.Thread(target=lambda: calls.append(engine.tiers.forget("a")))  # type: ignore[union-attr]
        forget.start()
        becomes(lambda: hanging.num_waiting == 1)
        clock.now += 1000.0
        assert engine.tiers.forget("a") == num_blocks
        assert not good.blocks
    finally:
        engine.close()
        hanging.end.set()
        forget.join(60)
    assert calls == [num_blocks]
