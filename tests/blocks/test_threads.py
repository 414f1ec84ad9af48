"""Threads that share managers."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.errors import StaleSequence


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
