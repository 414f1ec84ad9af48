"""Interrupted calls: a manager stays consistent, or refuses every further call.

python -m pytest tests/blocks/test_interrupts.py     # takes seconds
KVPAGER_INTERRUPTS=20000 python -m pytest ...        # every moment, 20,000 timed
"""

from __future__ import annotations

import _thread
import asyncio
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
from kvpager._atomic import Change, Condition
from kvpager.blocks.policies import POLICIES
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.sequences import SequenceTable
from kvpager.errors import BrokenInvariant
from tests.blocks.test_faults import (
    SCENARIOS,
    Clock,
    History,
    Operation,
    committed,
    family,
    find_victims,
    full_of_cached,
    manager_with_rows,
    name_all,
    policy_of,
)
from tests.support.interrupts import Interrupt, Moments, by_force, by_signal
from tests.support.manager_state import differences, state_of

NUM_TIMED = int(os.environ.get("KVPAGER_INTERRUPTS", "2000"))
# Every so many of the moments of an operation, unless all are asked for.
STRIDE = 1 if "KVPAGER_INTERRUPTS" in os.environ else 17

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")


# -------------------------------------------------------------------- further operations


def free_several() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.commit(members)
    return manager, lambda: manager.free(members)


def free_published() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    return manager, lambda: manager.free(members[:2], publish=True)


def free_swapped() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.swap(members, "host")
    return manager, lambda: manager.free(members)


def commit_batch() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(num_events=100)
    members = [manager.allocate(range(9)), manager.allocate([*range(4), 50, 51, 52, 53])]
    return manager, lambda: manager.commit(manager.batch(members))


def commit_into_a_run() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    committed(manager, range(12))
    sequence = manager.allocate([*range(4), 50, 51, 52, 53, 54])
    return manager, lambda: manager.commit(sequence)


def commit_pictures() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(16), mm_hashes=[(5, 7, b"cat"), (9, 14, b"dog")])
    return manager, lambda: manager.commit(sequence)


def truncate_far() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(20))
    return manager, lambda: manager.truncate(sequence, 5)


def drop_far() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    pair = [committed(manager, range(12)), manager.allocate(12)]
    return manager, lambda: manager.drop_before(pair, 9)


def complete_copies() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(fences=True)
    sequence = committed(manager, range(12))
    plan = manager.swap(sequence, "host")
    return manager, lambda: manager.copies.complete(plan)


def pin_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(12))
    return manager, lambda: manager.pins.pin(sequence)


def unpin_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(12))
    ticket = manager.pins.pin(sequence)
    manager.free(sequence)
    return manager, lambda: manager.pins.unpin(ticket)


def retain_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(eviction=policy_of("priority", 12, Clock()))
    manager.free(committed(manager, range(12)))
    sequence = manager.allocate(range(8))
    return manager, lambda: manager.pins.retain(sequence, 80, 5.0)


def set_a_quota() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.free(committed(manager, range(12), "a"))
    return manager, lambda: manager.quotas.set("a", ceiling=1)


def drop_a_quota() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=1)
    manager.free(committed(manager, range(12), "a"))
    return manager, lambda: manager.quotas.drop("a")


def clear_prefix_cache() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, manager.clear_prefix_cache


def grow() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.grow(20)


def fetch_events() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(num_events=100)
    committed(manager, range(8))
    return manager, manager.events.fetch


CHANGES = [
    *(scenario for scenario in SCENARIOS if scenario not in (name_all, find_victims)),
    free_several, free_published, free_swapped, commit_batch, commit_into_a_run, commit_pictures,
    truncate_far, drop_far, complete_copies, pin_a_prefix, unpin_a_prefix, retain_a_prefix,
    set_a_quota, drop_a_quota, clear_prefix_cache, grow, fetch_events,
]  # fmt: skip


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


# -------------------------------------------------------------------- handlers


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


@contextlib.contextmanager
def handler(number: int, function: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)


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
