"""Interrupted calls: a manager stays consistent, or refuses every further call.

python -m pytest tests/blocks/test_interrupts.py     # takes seconds
KVPAGER_INTERRUPTS=20000 python -m pytest ...        # every moment, 20,000 timed
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from kvpager import BlockManager, KVPagerError
from kvpager.blocks.policies import POLICIES
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.sequences import SequenceTable
from kvpager.errors import BrokenInvariant
from tests.support.block_changes import CHANGES, free_several
from tests.support.block_histories import History, policy_of
from tests.support.block_scenarios import Operation, manager_with_rows
from tests.support.clock import Clock
from tests.support.interrupts import Interrupt, Moments, by_force, by_signal, handler
from tests.support.manager_state import differences, state_of

NUM_TIMED = int(os.environ.get("KVPAGER_INTERRUPTS", "2000"))
# Interrupt at every 17th moment of an operation, unless all moments are asked for.
STRIDE = 1 if "KVPAGER_INTERRUPTS" in os.environ else 17

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")


def moments(scenario: Callable[[], tuple[BlockManager, Operation]]) -> Iterator[int]:
    """Yield the moments at which to interrupt an operation, different ones for each."""
    return iter(range(1 + CHANGES.index(scenario) % STRIDE, 10_000, STRIDE))


@pytest.fixture(autouse=True)
def _equal_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two managers with the same history are equal, their tickets included."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: 1)


@pytest.fixture(autouse=True)
def _handlers_are_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}


# -------------------------------------------------------------------- at every moment


@pytest.mark.mostly_slow(quick=16)
@pytest.mark.parametrize("scenario", CHANGES)
def test_an_interrupted_call_is_complete_or_has_changed_nothing(scenario) -> None:
    manager, operation = scenario()
    operation()
    complete = state_of(manager)
    for number in moments(scenario):
        manager, operation = scenario()
        before, moment = state_of(manager), Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt), moment:
            operation()
            assert not moment.was_hit, "the signal was lost"
        if not moment.was_hit:
            break
        manager.check()
        after = state_of(manager)
        assert not differences(after, before) or not differences(after, complete), number
        assert not is_locked(manager)
    else:
        pytest.fail("the operation never came through")


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_among_several_interrupts_as_ctrl_c_does(number: int) -> None:
    raise_it = functools.partial(by_signal, number=number)
    with handler(number, signal.default_int_handler):
        for at in range(1, 10_000):
            manager, operation = free_several()
            moment = Moments(at, raise_it)
            with contextlib.suppress(KeyboardInterrupt), moment:
                operation()
            if not moment.was_hit:
                break
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            manager.check()
            assert not is_locked(manager)
        else:
            pytest.fail("the operation never came through")


@pytest.mark.parametrize("scenario", CHANGES)
def test_a_call_cut_short_leaves_a_valid_or_refusing_manager(scenario) -> None:
    manager, operation = scenario()
    operation()
    complete = state_of(manager)
    for number in moments(scenario):
        manager, operation = scenario()
        before, moment = state_of(manager), Moments(number, by_force)
        with contextlib.suppress(Interrupt), moment:
            operation()
        if not moment.was_hit:
            break
        assert not is_locked(manager)
        refusal = refused(manager)
        if refusal is None:
            after = state_of(manager)
            assert not differences(after, before) or not differences(after, complete), number
        else:
            # None: it came after the last change, and before that was noted.
            assert refusal.__cause__ is None or isinstance(refusal.__cause__, Interrupt)
            with pytest.raises(KVPagerError, match="make a new one"):
                operation()
        # Whatever was cut short, signals do not wait for ever.
        manager_with_rows()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    else:
        pytest.fail("the operation never came through")


def refused(manager: BlockManager) -> KVPagerError | None:
    """Return the error of a broken manager; check the invariants of any other."""
    try:
        manager.check()
    except BrokenInvariant:
        raise
    except KVPagerError as refusal:
        return refusal
    return None


def is_locked(manager: BlockManager) -> bool:
    lock: Any = manager._state.lock
    return hasattr(lock, "_is_owned") and bool(lock._is_owned())


# -------------------------------------------------------------------- timed


class Alarm:
    """Raises `KeyboardInterrupt` a given time after it was set, unless it was stopped before.

    The garbage collector rests meanwhile: Python drops an exception that is raised while the
    collector calls a weak reference's callback, and pytest reports each that was dropped.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.num_rung = 0

    def __enter__(self) -> Alarm:
        gc.disable()
        self._before = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        gc.enable()

    def set(self, seconds: float) -> None:
        self.is_set = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        self.is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            self.num_rung += 1
            self.is_set = False
            raise KeyboardInterrupt


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("policy", POLICIES)
def test_random_interrupts_leave_a_consistent_manager(policy: str) -> None:
    chance, clock, made = random.Random(policy), Clock(), 0
    wanted = NUM_TIMED // len(POLICIES)
    interrupted = Counter[str]()
    with Alarm() as alarm:
        while alarm.num_rung < wanted:
            eviction, fences = policy_of(policy, 24, clock), made % 3 == 0
            manager = BlockManager(24, 4, 12, eviction=eviction, fences=fences, num_events=99)
            if made % 3 == 1:
                manager.quotas.set("a", floor=4, ceiling=12)
                manager.quotas.set("b", ceiling=10)
            made += 1
            history = History(manager, clock)
            for _ in range(200):
                name = "?"
                try:
                    alarm.set(chance.uniform(5e-6, 150e-6))
                    name, *_ = history.step(chance)  # type: ignore[misc]
                    alarm.stop()
                except KeyboardInterrupt:
                    interrupted[name] += 1
                manager.check()
    assert alarm.num_rung >= wanted


# -------------------------------------------------------------------- what cannot wait


def test_memory_that_runs_out_in_the_middle_breaks_the_manager(monkeypatch) -> None:
    manager = manager_with_rows()
    sequence = manager.allocate(6)

    def fails(*_: object) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(SequenceTable, "drop", fails)
        with pytest.raises(MemoryError):
            manager.free(sequence)
    calls: list[Operation] = [
        lambda: manager.free(sequence), lambda: manager.allocate(3), manager.check, manager.stats,
        lambda: state_of(manager), lambda: len(sequence),
        lambda: manager.num_free_blocks,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(KVPagerError, match="BlockManager: an error interrupted a") as caught:
            call()
        assert isinstance(caught.value.__cause__, MemoryError)


def test_a_finaliser_in_the_middle_of_a_change_is_refused(monkeypatch) -> None:
    manager = manager_with_rows()
    sequence, other = manager.allocate(6), manager.allocate(6)
    refusals: list[str] = []
    real = BlockPool.release

    def release(*arguments: Any) -> Any:
        try:
            manager.free(other)
        except KVPagerError as refusal:
            refusals.append(str(refusal))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "release", release)
        manager.free(sequence)
    assert len(refusals) == 1
    manager.free(other)
    manager.check()


def test_an_asynchronous_exception_leaves_a_valid_or_refusing_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = threading.excepthook

    def hook(arguments: Any) -> None:
        if arguments.exc_type is not Interrupt:  # one that came when the thread was about to end
            genuine(arguments)

    monkeypatch.setattr(threading, "excepthook", hook)
    for seed in range(50 if STRIDE > 1 else 2000):
        manager, chance = BlockManager(24, 4, 12), random.Random(seed)
        thread = threading.Thread(target=play_on, args=[History(manager, Clock()), chance])
        thread.start()
        assert thread.ident is not None
        ident, error = ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt)
        for _ in range(random.Random(-seed).randrange(10_000)):
            pass
        while thread.is_alive():  # again where a finaliser swallowed it
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
            thread.join(1)
        refused(manager)


def play_on(history: History, chance: random.Random) -> None:
    with contextlib.suppress(Interrupt):
        while True:
            history.step(chance)
