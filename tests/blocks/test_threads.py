"""Threads that share managers: the final state is that of some serial order."""

from __future__ import annotations

import random
import sys
import threading

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import SequenceSwapped, StaleSequence
from tests.support.manager_state import handles_of

NUM_THREADS = 64
NUM_OPERATIONS = 120  # of each thread; 10,000 for a night
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


def test_threads_share_a_manager_without_losing_a_block() -> None:
    manager = BlockManager(num_blocks=64, block_size=4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            random = np.random.default_rng(seed)
            for _ in range(200):
                sequence = manager.allocate(random.integers(0, 2, 9))
                child = manager.fork(sequence)
                manager.append([sequence, child], 3)
                manager.commit(child)
                manager.free([child, sequence])
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    manager.check()
    stats = manager.stats()
    assert stats.num_free + stats.num_cached == 64


def test_foreign_handles_do_not_deadlock_two_managers() -> None:
    managers = [BlockManager(8, 4), BlockManager(8, 4)]
    handles = [manager.allocate(3) for manager in managers]

    def work(mine: int) -> None:
        for _ in range(300):
            with pytest.raises(StaleSequence):
                managers[mine].append(handles[1 - mine], 1)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
