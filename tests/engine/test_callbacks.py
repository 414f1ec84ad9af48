"""Listeners, `on_step`, pauses and callbacks between steps."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvpager.engine.metrics import StepRecord
from kvpager.engine.stream import Token
from kvpager.errors import (
    KVPagerError,
    RequestCancelled,
    RequestFailed,
)
from tests.support.toy_runner import ToyEngine, expected

KINDS = pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
NEW = 16


# -------------------------------------------------------------------- listeners and on_step


def test_a_listener_that_raises_delays_no_other_request() -> None:
    def fail(tokens: list[Token], is_done: bool) -> None:
        raise ZeroDivisionError("of the listener")

    with ToyEngine() as engine:
        with engine.pause():
            stream = engine.ask([5, 6], 5)
            with pytest.raises(ZeroDivisionError):  # the first call happens at once, on this thread
                stream.listen(fail)
        assert len(stream.result(timeout=60).token_ids) == 5


@pytest.mark.parametrize("timeout", [True, "9", -1.0, float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with ToyEngine() as engine:
        stream = engine.ask([5], 2)
        with pytest.raises((ValueError, TypeError), match="timeout"):
            stream.result(timeout=timeout)


@KINDS
def test_a_listener_that_raises_loses_no_tokens(kind: type[BaseException]) -> None:
    def fail(tokens: list[Token], is_done: bool) -> None:
        if tokens or is_done:
            raise kind("of the listener")

    with ToyEngine() as engine:
        with engine.pause():
            bad = engine.ask([5, 6], 5)
            good = engine.ask([5, 6, 7], NEW)
            bad.listen(fail)
        assert [token.id for token in good] == expected([5, 6, 7], NEW)
        assert len(bad.result(timeout=60).token_ids) == 5


def test_on_step_gets_every_step() -> None:
    records: list[StepRecord] = []
    with ToyEngine(core={"on_step": records.append}) as engine:
        engine.ask([5, 6, 7], 4).result()
        engine.check_idle()
    computed = [record for record in records if record.rows]
    assert [record.tokens for record in computed] == [3, 1, 1, 1, 1]
    assert computed[3].stats.scheduler.total_tokens == 6


@KINDS
def test_an_on_step_that_raises_ends_no_request(kind: type[BaseException]) -> None:
    def fail(record: StepRecord) -> None:
        raise kind("of on_step")

    with ToyEngine(core={"on_step": fail}) as engine:
        assert len(engine.ask([5, 6], 5).result(timeout=60).token_ids) == 5


# -------------------------------------------------------------------- pauses


def test_a_pause_holds_steps_and_then_drops_cached_prefixes() -> None:
    prompt = list(range(40))
    with ToyEngine() as engine:
        engine.ask(prompt, 2).result()
        with engine.pause(), engine.pause():  # a second pause of a thread does not wait
            assert engine.is_paused_here
            before = engine.stats().scheduler.total_steps
            stream = engine.ask(prompt, 2)
            with pytest.raises(TimeoutError):
                stream.result(timeout=0.01)
            assert engine.stats().scheduler.total_steps == before
        assert not engine.is_paused_here
        assert stream.result().token_ids == expected(prompt, 2)
        assert engine.stats().pool.prefix_hit_tokens == 0


def test_closing_in_a_pause_ends_requests() -> None:
    with ToyEngine() as engine, engine.pause():
        stream = engine.ask([5], 2)
        engine.close()
        with pytest.raises(RequestCancelled):
            stream.result(timeout=60)


def test_pausing_within_a_step_is_refused() -> None:
    raised: list[KVPagerError] = []

    def pausing(record: StepRecord) -> None:
        try:
            with engine.pause():
                pass
        except KVPagerError as error:
            raised.append(error)

    with ToyEngine(core={"on_step": pausing}) as engine:
        engine.ask([5], 2).result(timeout=60)
    assert raised


# -------------------------------------------------------------------- between steps


def test_callbacks_between_steps_keep_cached_prefixes() -> None:
    prompt, calls = list(range(40)), []

    def note() -> None:
        # Another thread can take the engine's lock meanwhile.
        thread = threading.Thread(target=lambda: calls.append(engine.stats().scheduler.total_steps))
        thread.start()
        thread.join()

    with ToyEngine() as engine:
        with engine.pause():  # no step is under way
            engine.between_steps.append(note)
        engine.ask(prompt, 3).result()
        engine.ask(prompt, 3).result()
        assert {0, 1, 2, 3, 4} <= set(calls)
        assert engine.stats().pool.prefix_hit_tokens >= 36


def test_a_callback_between_steps_that_raises_stops_the_engine() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with ToyEngine() as engine:
        with engine.pause():
            engine.between_steps.append(fail)
            stream = engine.ask([5], 3)
        with pytest.raises(RequestFailed, match="a defect"):
            stream.result(timeout=60)
