"""Threads that stores may keep: work goes on, and nothing waits for them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from kvpager.storage.tiers.calls import StoreCalls
from kvpager.storage.tiers.workers import Workers
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def calls(clock: Clock) -> StoreCalls:
    return StoreCalls(clock)


def test_work_is_done_in_order(calls: StoreCalls) -> None:
    workers, done = Workers(1, "test", calls), list[int]()
    futures = [workers.submit(done.append, number) for number in range(50)]
    workers.shutdown()
    assert done == list(range(50))
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError):
        workers.submit(done.append, 50)


def test_an_exception_is_the_result(calls: StoreCalls) -> None:
    workers = Workers(1, "test", calls)
    assert isinstance(workers.submit(int, "x").exception(60), ValueError)
    assert workers.submit(int, "3").result(60) == 3
    workers.shutdown()


def test_a_thread_that_hangs_is_replaced_until_it_returns(calls: StoreCalls, clock: Clock) -> None:
    workers, may_end, hung = Workers(1, "test", calls), threading.Event(), threading.Event()

    def hang() -> int:
        with calls.begin(0, deadline=0.0):
            hung.set()
            assert may_end.wait(60)
        return threading.get_ident()

    first = workers.submit(hang)
    assert hung.wait(60)
    waiting = workers.submit(threading.get_ident)
    assert not waiting.done()
    clock.now = 2.0
    assert calls.hangs(0)
    assert not calls.hangs(1)
    other = workers.submit(threading.get_ident).result(60)
    assert waiting.result(60) == other
    may_end.set()
    assert first.result(60) != other
    assert not calls.hangs(0)
    assert {workers.submit(threading.get_ident).result(60) for _ in range(5)} == {other}
    workers.shutdown()


def test_shutting_down_waits_for_no_thread_that_hangs(calls: StoreCalls, clock: Clock) -> None:
    workers, may_end, hung = Workers(1, "test", calls), threading.Event(), threading.Event()

    def hang() -> None:
        with calls.begin(0, deadline=0.0):
            hung.set()
            assert may_end.wait(60)

    work = workers.submit(hang)
    assert hung.wait(60)
    last = workers.submit(int)
    clock.now = 2.0
    workers.shutdown()
    assert last.done()
    assert not work.done()
    may_end.set()
    work.result(60)


def test_a_call_may_end_until_a_second_after_its_deadline(calls: StoreCalls, clock: Clock) -> None:
    with calls.begin(0, deadline=10.0), calls.begin(1):
        assert calls.left_s(threading.get_ident()) == 11.0
        clock.now = 5.5
        assert (calls.hangs(0), calls.hangs(1)) == (False, True)  # without a deadline 5 s
        clock.now = 11.5
        assert calls.hangs(0)
        assert calls.lost_threads() == {threading.get_ident()}
    assert not calls.lost_threads()


def test_workers_that_are_dropped_end_their_threads(calls: StoreCalls) -> None:
    workers = Workers(2, "dropped", calls)
    for _ in range(4):
        workers.submit(int).result(60)
    threads, gone = list(workers._threads), weakref.ref(workers)
    del workers
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_an_interpreter_ends_while_a_store_hangs() -> None:
    code = """
import threading
from kvpager.storage.tiers.calls import StoreCalls
from kvpager.storage.tiers.workers import Workers
calls, hung, done = StoreCalls(), threading.Event(), []
workers = Workers(1, "test", calls)
def hang():
    with calls.begin(0, deadline=0.0):
        hung.set()
        threading.Event().wait()
workers.submit(hang)
workers.submit(print, "the last work")
hung.wait()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout == "the last work\n"
