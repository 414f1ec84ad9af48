"""Interrupts of engine calls, at every moment: the next call works, and nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import pytest

from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.tiering import Tiering
from tests.support.interrupts import Moments, by_signal
from tests.support.threads import join_all
from tests.support.toy_runner import ToyEngine, expected
from tests.support.toy_tiers import PROMPT, TieredEngine, store_with_the_prompt

PATIENCE = 60.0
# Number of moments to interrupt, of several hundred.
NUM_MOMENTS = int(os.environ.get("KVPAGER_INTERRUPTS", "0")) or 50
at_some_moments = pytest.mark.parametrize(
    "count", [10, pytest.param(NUM_MOMENTS, marks=pytest.mark.slow)], ids=["few", "many"]
)


def moments(call: Callable[[Moments], object]) -> range:
    """Return the numbers of the moments at which `call` can be interrupted."""
    total = Moments(sys.maxsize, by_signal)
    call(total)
    return range(1, sys.maxsize - total.left)


def test_the_traceback_of_an_interrupted_call_keeps_no_lock() -> None:
    def interrupt(frame: FrameType, event: str, argument: object) -> None:
        entered = contextlib._GeneratorContextManager.__enter__
        if event == "return" and frame.f_code is entered.__code__:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with ToyEngine() as engine:
        kept = None
        sys.setprofile(interrupt)
        try:
            engine.stats()
        except KeyboardInterrupt as error:
            kept = error
        finally:
            sys.setprofile(None)
        with ThreadPoolExecutor(1) as other:
            stats = other.submit(engine.stats)
            with contextlib.suppress(TimeoutError):
                stats.result(PATIENCE)
            is_free = stats.done()
            del kept
            gc.collect()
        assert is_free


@at_some_moments
def test_an_interrupted_construction_leaves_no_thread(count: int) -> None:
    before = set(threading.enumerate())

    def make(moment: Moments) -> ToyEngine:
        with moment:
            return ToyEngine()

    total = Moments(sys.maxsize, by_signal)
    make(total).close()
    found = range(1, sys.maxsize - total.left)
    for number in random.Random(count).sample(found, min(count, len(found))):
        with contextlib.suppress(KeyboardInterrupt):
            make(Moments(number, by_signal)).close()
        gc.collect()
        join_all(lambda thread: thread not in before)


def test_an_interrupt_as_the_thread_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        # The engine's thread starts one, too: its signal might come after this test.
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ToyEngine()
    monkeypatch.undo()
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("is_end", [False, True], ids=["begin", "end"])
def test_an_interrupted_pause_lets_steps_continue(is_end: bool) -> None:
    with ToyEngine() as engine:

        def pause(moment: Moments) -> None:
            pausing = engine.pause()
            with contextlib.nullcontext() if is_end else moment:
                pausing.__enter__()
            with moment if is_end else contextlib.nullcontext():
                pausing.__exit__(None, None, None)

        for number in moments(pause):
            with pytest.raises(KeyboardInterrupt) as interrupt:
                pause(Moments(number, by_signal))
            if (
                is_end and number == 1
            ):  # `__exit__` has not begun, so the pause ends with the traceback
                del interrupt
                gc.collect()
            assert len(engine.ask([5, 6, 7], 1).result(PATIENCE).token_ids) == 1


@at_some_moments
def test_an_interrupted_submission_leaves_nothing_behind(count: int) -> None:
    prompt = list(range(10))
    with ToyEngine(256) as engine:

        def submit(moment: Moments) -> None:
            with moment:
                engine.ask(prompt, 400, n=2, request_id="interrupted").cancel()

        found = moments(submit)
        engine.check_idle()
        for number in random.Random(count).sample(found, min(count, len(found))):
            with contextlib.suppress(KeyboardInterrupt):
                submit(Moments(number, by_signal))
            engine.cancel("interrupted")
            assert engine.ask(prompt, 4).result(PATIENCE).token_ids == expected(prompt, 4)
            engine.check_idle()


@pytest.mark.parametrize("is_warmed", [False, True], ids=["submission", "warm"])
def test_an_interrupt_as_a_fetch_begins_loses_no_fetch(
    is_warmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Tiering.begin

    def interrupted(self: Tiering, *args: Any, **options: Any) -> Fetch | None:
        fetch = begin(self, *args, **options)
        signal.raise_signal(signal.SIGINT)
        return fetch

    with TieredEngine([store_with_the_prompt()]) as engine:
        assert engine.tiers is not None
        call = partial(engine.tiers.warm, [PROMPT]) if is_warmed else partial(engine.ask, PROMPT)
        monkeypatch.setattr(Tiering, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            call()
        monkeypatch.undo()
        del interrupt  # its traceback keeps the stream
        gc.collect()
        ends = time.monotonic() + PATIENCE
        while engine.tiers.stats().num_fetching or engine.scheduler.request_ids:
            assert time.monotonic() < ends
        engine.saved()
        engine.check_idle()
