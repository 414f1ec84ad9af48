"""What goes wrong on the way: memory runs out, arrays are corrupt, threads meet."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError, OutOfBlocks
from kvpager.blocks.policies import POLICIES, Priority
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import SequenceSwapped, StaleSequence
from kvpager.plans import Plan, Step
from tests.support.manager_state import differences, handles_of, state_of

NUM_THREADS = 64
NUM_OPERATIONS = 120  # of each thread; 10,000 for a night
NUM_CORRUPTIONS = 500

Arrays = dict[str, np.ndarray]


# -------------------------------------------------------------------- faults

Operation = Callable[[], object]


def manager_with_rows(**options: Any) -> BlockManager:
    """A small manager in which idle rows wait for the next sequences."""
    manager = BlockManager(12, 4, 12, **options)
    manager.free(manager.allocate(1))
    return manager


def committed(manager: BlockManager, ids, namespace: str | None = None) -> SequenceHandle:
    sequence = manager.allocate(ids, namespace=namespace)
    manager.commit(sequence)
    return sequence


def full_of_cached(**options: Any) -> BlockManager:
    manager = manager_with_rows(**options)
    for first in (0, 100, 200):
        manager.free(committed(manager, range(first, first + 16)))
    return manager


def family(manager: BlockManager) -> list[SequenceHandle]:
    parent = manager.allocate(range(6))
    members = [parent, *manager.fork(parent, 2)]
    manager.append(members, [[6], [7], [8]])
    return members


def allocate_cold() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    return manager, lambda: manager.allocate(range(9))


def allocate_hit() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    committed(manager, range(8))
    return manager, lambda: manager.allocate(range(12))


def allocate_revived() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.allocate([*range(16), *range(50, 60)])


def allocate_evicting() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.allocate(40)


def append_growing() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(8))
    return manager, lambda: manager.append(sequence, [8, 9])


def append_in_place() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.append(sequence, [8])


def append_evicting() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    pair = [manager.allocate(range(300, 304)), manager.allocate(4)]
    return manager, lambda: manager.append(pair, 20)


def append_batch_under_quotas() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=2, ceiling=5)
    manager.quotas.set("b", floor=1)
    for first, namespace in ((0, "a"), (100, "b"), (200, None)):
        manager.free(committed(manager, range(first, first + 8), namespace))
    names: list[str | None] = ["a", "b", None]
    batch = manager.batch([manager.allocate(4, namespace=name) for name in names])
    return manager, lambda: manager.append(batch, 5)


def append_speculative() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.append(sequence, 7, speculative=True)


def accept_speculative() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    manager.append(sequence, 7, speculative=True)
    return manager, lambda: manager.accept(sequence, 3, [6, 7, 8])


def fork_many() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.fork(sequence, 4)


def swap_out() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.commit(members[0])
    return manager, lambda: manager.swap(members, "host")


def swap_out_in_part() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(fences=True)
    sequence = committed(manager, range(20))
    return manager, lambda: manager.swap(sequence, "host", at_most=2)


def swap_in() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.swap(members, "host")
    return manager, lambda: manager.swap(members, "device")


def swap_in_evicting() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(300, 312))
    manager.swap(sequence, "host")
    for first in (0, 100, 200):
        manager.free(committed(manager, range(first, first + 16)))
    return manager, lambda: manager.swap(sequence, "device")


def swap_in_under_quotas() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=2, ceiling=4)
    sequence = manager.allocate(range(12), namespace="a")
    manager.swap(sequence, "host")
    manager.free(committed(manager, range(50, 66), "a"))
    return manager, lambda: manager.swap(sequence, "device")


def shrink() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    pair = [manager.allocate(7), manager.allocate(range(100, 110))]
    manager.free(pair[0])
    return manager, lambda: manager.shrink(6)


def name_all() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    family(manager)
    return manager, lambda: (handles_of(manager), manager.batch(handles_of(manager).values()))


def find_victims() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    return manager, lambda: manager.victims(members, 3)


SCENARIOS = [
    allocate_cold, allocate_hit, allocate_revived, allocate_evicting,
    append_growing, append_in_place, append_evicting, append_batch_under_quotas, append_speculative,
    accept_speculative, fork_many, swap_out, swap_out_in_part, swap_in, swap_in_evicting,
    swap_in_under_quotas, shrink, name_all, find_victims,
]  # fmt: skip


class Fault:
    """Raises `MemoryError` at the `number`th call of what it is put around, before doing it."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.was_hit = False

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.was_hit = True
                raise MemoryError("injected")
            return real(*args, **named)

        return call


def inject(patch: pytest.MonkeyPatch, target: str, fault: Fault) -> None:
    if target == "take":
        for name in ("take", "take_one"):
            patch.setattr(BlockPool, name, fault.around(getattr(BlockPool, name)))
    elif target == "Plan":
        for module in ("blocks.swap", "blocks.resize"):
            patch.setattr(f"kvpager.{module}.Plan", fault.around(Plan))
    else:  # the library asks for instances of these, too
        kind = {"Step": Step, "SequenceHandle": SequenceHandle}[target]
        patch.setattr(kind, "__init__", fault.around(kind.__init__))


@pytest.mark.parametrize("target", ["take", "Plan", "Step", "SequenceHandle"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_memory_that_runs_out_changes_nothing(scenario, target, monkeypatch) -> None:
    for number in range(1, 50):
        manager, operation = scenario()
        before, fault = state_of(manager), Fault(number)
        with monkeypatch.context() as patch:
            inject(patch, target, fault)
            with contextlib.suppress(MemoryError):
                operation()
        if not fault.was_hit:
            break
        assert differences(state_of(manager), before) == []
        manager.check()
        operation()
        manager.check()
    else:
        pytest.fail("the operation never came through")


# -------------------------------------------------------------------- random histories


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class History:
    """Random operations on one manager, chosen by what the manager itself says.

    Two managers that are equal get the same operations from equal random numbers.
    """

    def __init__(self, manager: BlockManager, clock: Clock) -> None:
        self.manager = manager
        self.clock = clock
        self.work: list[Plan] = []
        self.pins: list[int] = []

    def live(self, *, swapped: bool | None = None) -> list[SequenceHandle]:
        handles = list(handles_of(self.manager).values())
        away = self.manager._state.rows.swapped
        return [one for one in handles if swapped is None or bool(away[one._row]) == swapped]

    def begun(self, copies: np.ndarray, ticket: int) -> list[list[int]]:
        if ticket:
            self.work.append(Plan(copies, "device", "device", ticket))
        return copies.tolist()

    def step(self, chance: random.Random) -> object:
        """One operation; what it returned, as plain values, or how it was refused."""
        name = chance.choices(list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()])[0]
        try:
            return name, OPERATIONS[name][1](self, chance)
        except (KVPagerError, ValueError) as refusal:
            return name, type(refusal).__name__, str(refusal)


def tokens(chance: random.Random, most: int) -> list[int]:
    return [chance.randint(0, 1) for _ in range(chance.randint(0, most))]


def do_allocate(history: History, chance: random.Random) -> object:
    if len(history.live()) >= 8:
        return None
    ids = tokens(chance, 20)
    mm_hashes = [(1, len(ids), b"cat")] if len(ids) > 1 and chance.random() < 0.1 else []
    sequence = history.manager.allocate(
        ids if chance.random() < 0.9 else len(ids) or [],
        namespace=chance.choice([None, None, "a", "b"]),
        lora=chance.choice([None, None, None, "x"]),
        mm_hashes=mm_hashes,
    )
    copies = history.begun(sequence.copies, sequence.ticket)
    return sequence.name, sequence.num_cached_tokens, copies


def do_append(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    some = chance.sample(here, min(len(here), chance.randint(0, 3)))
    ids = [tokens(chance, 4) for _ in some]
    step = history.manager.append(some, ids, speculative=chance.random() < 0.15)
    return step.slots.tolist(), history.begun(step.copies, step.ticket)


def do_accept(history: History, chance: random.Random) -> object:
    speculative = history.manager._state.rows.speculative
    here = [one for one in history.live(swapped=False) if speculative[one._row]]
    counts = [chance.randint(0, int(speculative[one._row])) for one in here]
    return history.manager.accept(here, counts)


def do_fork(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if not here or len(history.live()) >= 8:
        return None
    return history.manager.fork(chance.choice(here)).name


def do_commit(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    return history.manager.commit(chance.choice(here)) if here else None


def do_truncate(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if not here:
        return None
    sequence = chance.choice(here)
    return history.manager.truncate(sequence, chance.randint(len(sequence) // 2, len(sequence)))


def do_swap(history: History, chance: random.Random) -> object:
    to = chance.choice(["host", "device", "device"])
    live = history.live(swapped=to == "device")
    some = chance.sample(live, min(len(live), chance.randint(0, 3)))
    plan = history.manager.swap(some, to, at_most=chance.choice([None, None, 1, 3]))
    return history.begun(plan.copies, plan.ticket)


def do_free(history: History, chance: random.Random) -> object:
    live = history.live()
    if not live:
        return None
    return history.manager.free(chance.choice(live), publish=chance.random() < 0.3)


def do_complete(history: History, chance: random.Random) -> object:
    work = history.work
    return history.manager.copies.complete(work.pop(chance.randrange(len(work)))) if work else None


def do_pin(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if here and len(history.pins) < 2:
        history.pins.append(history.manager.pins.pin(chance.choice(here)))
    return list(history.pins)


def do_unpin(history: History, chance: random.Random) -> object:
    return history.manager.pins.unpin(history.pins.pop(0)) if history.pins else None


def do_retain(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    ttl_s = chance.choice([None, 1.0, 5.0])
    pins = history.manager.pins
    return pins.retain(chance.choice(here), chance.randint(0, 100), ttl_s) if here else 0


def do_wait(history: History, chance: random.Random) -> object:
    history.clock.now += 1.0
    return None


OPERATIONS: dict[str, tuple[float, Callable[[History, random.Random], object]]] = {
    "allocate": (5, do_allocate),
    "append": (8, do_append),
    "accept": (2, do_accept),
    "fork": (2, do_fork),
    "commit": (6, do_commit),
    "truncate": (1, do_truncate),
    "swap": (4, do_swap),
    "free": (4, do_free),
    "complete": (4, do_complete),
    "pin": (0.5, do_pin),
    "unpin": (0.5, do_unpin),
    "retain": (1, do_retain),
    "wait": (0.5, do_wait),
}


def policy_of(name: str, num_blocks: int, clock: Clock) -> Any:
    """An empty policy, by a clock that stands still."""
    return Priority(num_blocks, clock) if name == "priority" else POLICIES[name](num_blocks)


# -------------------------------------------------------------------- corruption


# -------------------------------------------------------------------- threads

REFUSALS = (OutOfBlocks, StaleSequence, SequenceSwapped)


class Worker:
    """One thread: a sequence of its own that it knows everything about, and shared ones."""

    def __init__(self, number: int, manager: BlockManager, shared: list[SequenceHandle]) -> None:
        self.number = number
        self.manager = manager
        self.shared = shared
        self.chance = random.Random(number)
        self.own: dict[SequenceHandle, list[int]] = {}
        self.swapped: set[SequenceHandle] = set()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(NUM_OPERATIONS):
                try:
                    self.act_on_own()
                except OutOfBlocks:
                    self.make_room()
                try:
                    self.act_on_shared()
                except REFUSALS:
                    pass
                except ValueError as error:  # the others changed it meanwhile
                    if not any(w in str(error) for w in ("speculative", "have", "token")):
                        raise
        except BaseException as error:
            self.failure = error

    def new_ids(self, count: int) -> list[int]:
        return [self.number * 1000 + self.chance.randint(0, 1) for _ in range(count)]

    def make_room(self) -> None:
        for one in list(self.own):
            self.manager.free(one)
        self.own.clear()
        self.swapped.clear()

    def act_on_own(self) -> None:
        manager, chance = self.manager, self.chance
        here = [one for one in self.own if one not in self.swapped]
        operation = chance.choice(["begin", "append", "append", "fork", "truncate", "swap", "free"])
        if operation == "begin" or not self.own:
            ids = self.new_ids(chance.randint(1, 12))
            self.own[manager.allocate(ids)] = ids
        elif operation == "append" and here:
            ids = [self.new_ids(chance.randint(0, 5)) for _ in here]
            slots = manager.append(here, ids).slots
            assert len(set(slots.tolist())) == len(slots)
            for one, new in zip(here, ids, strict=True):
                self.own[one].extend(new)
        elif operation == "fork" and here:
            self.own[manager.fork(here[0])] = list(self.own[here[0]])
        elif operation == "truncate" and here:
            length = chance.randint(0, len(here[0]))
            manager.truncate(here[0], length)
            del self.own[here[0]][length:]
        elif operation == "swap":
            if self.swapped:
                manager.swap(self.swapped, "device")
                self.swapped.clear()
            elif here:
                manager.swap(here[0], "host")
                self.swapped.add(here[0])
        elif operation == "free" and len(self.own) > 1:
            one = next(iter(self.own))
            del self.own[one]
            self.swapped.discard(one)
            manager.free(one, publish=False)
        self.look()

    def look(self) -> None:
        """Check that sequences of this thread are unaffected by other threads."""
        manager = self.manager
        here = [one for one in self.own if one not in self.swapped]
        assert manager.lengths(self.own).tolist() == [len(ids) for ids in self.own.values()]
        for one in here:
            ids = self.own[one]
            with (
                manager._state.lock
            ):  # or else others evict what is equal to it and idle, in between
                manager.commit(one)
                assert manager.match_prefix(ids) >= len(ids) // 4 * 4
            assert len(manager.block_tables(one)[0]) == -(-len(ids) // 4)

    def act_on_shared(self) -> None:
        manager, chance = self.manager, self.chance
        place = chance.randrange(len(self.shared))
        one, other = self.shared[place], chance.choice(self.shared)
        operation = chance.randrange(8)
        if operation == 0:
            manager.free(one)
            self.shared[place] = manager.allocate(chance.randint(1, 9))
        elif operation == 1:
            manager.append([one, other] if one is not other else one, 1)
        elif operation == 2:
            manager.append(one, 2, speculative=True)
            manager.accept(one, chance.randint(0, 2))
        elif operation == 3:
            manager.truncate(one, 3)
        elif operation == 4:
            manager.swap(one, chance.choice(["host", "device"]), at_most=chance.choice([None, 1]))
        elif operation == 5:
            manager.free(manager.fork(one))
        elif operation == 6:
            manager.commit([one])
            manager.block_tables([one])
        else:
            manager.stats()
            assert manager.num_free_blocks <= manager.num_blocks


@pytest.mark.slow
def test_many_threads_end_in_a_state_that_some_order_explains() -> None:
    manager = BlockManager(1024, 4, 256)
    shared = [manager.allocate(n) for n in range(1, 5)]
    workers = [Worker(number, manager, shared) for number in range(NUM_THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60 + NUM_OPERATIONS)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert [worker.failure for worker in workers if worker.failure] == []
    manager.check()
    manager.free([one for one in shared if manager.queries.owns(one)])
    for worker in sorted(workers, key=lambda worker: len(worker.swapped)):
        worker.look()
        for one in set(worker.own) - worker.swapped:
            manager.free(one)
            del worker.own[one]
        if worker.swapped:
            manager.swap(worker.swapped, "device")
            worker.swapped.clear()
        worker.look()
        worker.make_room()
    manager.check()
    assert handles_of(manager) == {}
    manager.clear_prefix_cache()
    assert (manager.num_free_blocks, manager.stats().num_host_free) == (1024, 256)
