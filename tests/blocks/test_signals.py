"""Signals that arrive within a change: their handlers run after it."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from kvpager import BlockManager
from kvpager._atomic import Change, Condition
from tests.support.interrupts import Moments, by_signal, handler

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def _handlers_are_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}


class Notes:
    """A handler that remembers what it was called with, and whether the change was complete."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[int] = []
        self.error = error

    def __call__(self, number: int, frame: FrameType | None) -> None:
        assert isinstance(frame, FrameType)
        self.calls.append(number)
        if self.error is not None:
            raise self.error


class Owner:
    """Something with a lock and a change of its own."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._change = Change(self)


def change(owner: Owner, *steps: Callable[[], object]) -> None:
    with owner._lock, owner._change:
        owner._change.begin()
        for step in steps:
            step()


def raising(number: int) -> Callable[[], object]:
    return lambda: signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGUSR1, signal.SIGPROF])
def test_a_signal_in_a_change_is_handled_after_it(number: int) -> None:
    owner, notes, seen = Owner(), Notes(ZeroDivisionError("mine")), []
    with handler(number, notes):
        with pytest.raises(ZeroDivisionError, match="mine"):
            change(owner, raising(number), lambda: seen.append(list(notes.calls)))
        assert seen == [[]]
        assert notes.calls == [number]
        assert signal.getsignal(number) is notes
    change(owner)  # it is sound


def test_all_signals_are_handled_in_order_despite_errors() -> None:
    order: list[object] = []

    def first(number: int, frame: FrameType | None) -> None:
        order.append(number)
        raise ZeroDivisionError

    numbers = [signal.SIGUSR1, signal.SIGALRM]
    with (
        handler(signal.SIGUSR1, first),
        handler(signal.SIGALRM, lambda n, f: order.append(n)),
        pytest.raises(ZeroDivisionError),
    ):
        change(Owner(), *map(raising, numbers), lambda: order.append("complete"))
    assert order == ["complete", *numbers]


def use(condition: Condition) -> None:
    with condition:
        condition.notify_all()


def test_an_interrupt_never_leaves_a_condition_locked() -> None:
    for number in range(1, 200):
        condition, moment = Condition(), Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt), moment:
            use(condition)
        if not moment.was_hit:
            break
        lock: Any = condition._lock  # type: ignore[attr-defined]
        assert not lock._is_owned()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    else:
        pytest.fail("the operation never came through")


def test_an_interrupt_ends_the_wait_for_a_condition() -> None:
    condition = Condition()
    # A real one: what `interrupt_main` sets is looked at when the wait is over.
    timer = threading.Timer(0.01, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt), condition:
        pytest.fail(f"no interrupt ended the wait: {condition.wait(60)}")
    timer.join()


def test_changes_within_changes_let_signals_wait_for_the_outermost() -> None:
    outer, inner, notes = Owner(), Owner(), Notes()
    with handler(signal.SIGINT, notes):
        with outer._lock, outer._change:
            with inner._lock, inner._change:
                signal.raise_signal(signal.SIGINT)
            assert notes.calls == []
        assert notes.calls == [signal.SIGINT]


def by_another_thread() -> None:
    thread = threading.Thread(target=signal.raise_signal, args=[signal.SIGINT])
    thread.start()
    thread.join()


@pytest.mark.parametrize("interrupt", [_thread.interrupt_main, by_another_thread])
def test_an_interrupt_waits_whoever_sends_it(interrupt: Callable[[], object]) -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        change(Owner(), interrupt, lambda: done.append(1))
    assert done == [1]


def test_signals_with_rare_handlers_wait_as_well() -> None:
    number, owner, notes = signal.SIGRTMIN + 3, Owner(), Notes(ZeroDivisionError())
    seen: list[list[int]] = []
    with handler(number, notes):
        for _ in range(100):  # rare ones are looked for now and then
            change(owner)
        with pytest.raises(ZeroDivisionError):
            change(owner, raising(number), lambda: seen.append(list(notes.calls)))
    assert seen == [[]]
    change(owner)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_handler_set_in_the_middle_of_a_change_stays() -> None:
    owner, notes = Owner(), Notes()
    with handler(signal.SIGINT, signal.default_int_handler):
        change(owner, lambda: signal.signal(signal.SIGINT, notes))
        assert signal.getsignal(signal.SIGINT) is notes


def test_asyncio_keeps_its_own_handling_of_interrupts() -> None:
    manager = BlockManager(8, 4)

    async def serve() -> None:
        ours = signal.getsignal(signal.SIGINT)
        assert ours is not signal.default_int_handler
        manager.free(manager.allocate(5))
        assert signal.getsignal(signal.SIGINT) is ours
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        change(Owner(), raising(signal.SIGUSR1))
        await called.wait()
        loop.remove_signal_handler(signal.SIGUSR1)

    asyncio.run(serve())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_leave_handlers_alone() -> None:
    seen: list[object] = []
    look = lambda: seen.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    thread = threading.Thread(target=change, args=[Owner(), look])
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forking_thread_is_its_childs_main_thread() -> None:
    statuses: list[int] = []

    def fork() -> None:
        child = os.fork()
        if not child:
            done: list[int] = []
            try:
                change(Owner(), raising(signal.SIGINT), lambda: done.append(1))
            except KeyboardInterrupt:
                os._exit(10 + len(done))
            os._exit(1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert statuses == [11]
