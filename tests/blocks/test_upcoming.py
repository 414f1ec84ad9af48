"""The idle blocks that leave next, against a ranking of all blocks."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.pool import OFFERED, STORES
from tests.blocks.test_cached import SIZE, cached, keying


def test_blocks_that_are_used_again_leave_later() -> None:
    manager = BlockManager(66, SIZE)
    for seed in range(16):
        cached(manager, [seed] * 16)
    first = manager.cached.leaving(64, 6)
    assert len(first) == 4
    assert set(first.tolist()) < set(manager.cached.leaving(64, 18).tolist())
    cached(manager, [*[0] * 16, 1])
    later = manager.cached.leaving(64, 18)
    assert len(later) == 16
    assert not set(first.tolist()) & set(later.tolist())


@pytest.mark.parametrize("eviction", ["lru", "priority", "lifetime"])
@pytest.mark.parametrize("seed", range(6))
def test_holds_hide_no_block_that_leaves_soon(seed: int, eviction: str) -> None:
    chance, maker = random.Random(seed), keying()
    manager = BlockManager(48, SIZE, eviction=eviction)
    ahead = chance.randrange(4, 32)
    fronts = [[chance.randrange(99) for _ in range(50)] for _ in range(5)]
    held, tickets = list[Any](), list[int]()
    for _ in range(400):
        action, blocks = chance.random(), np.flatnonzero(manager._state.pool.cached)
        some = np.array(chance.sample(blocks.tolist(), min(len(blocks), 4)), np.int32)
        if action < 0.4 and len(held) < 3:
            front = chance.choice(fronts)[: chance.randrange(1, 40)]
            with contextlib.suppress(OutOfBlocks):
                held.append(manager.allocate([*front, chance.randrange(9)]))
                manager.commit(held[-1])
        elif action < 0.6 and held:
            manager.free(held.pop(chance.randrange(len(held))))
        elif action < 0.7 and len(tickets) < 4:
            tickets.append(manager.cached.hold(some))
        elif action < 0.78 and tickets:
            manager.cached.release(tickets.pop(), keep_rank=chance.random() < 0.5)
        elif action < 0.82:
            manager.cached.mark_dirty(manager.cached.keys(some, maker), 0)
        else:
            found = manager.cached.leaving(chance.choice([2, 64]), ahead)
            soon = _leaving_soon(manager, ahead)
            assert len(found) == 2 or soon <= set(found.tolist())
            upcoming, pool = manager.cached._upcoming, manager._state.pool
            ranked = upcoming._blocks
            is_idle = pool.cached[ranked] & (pool.refs[ranked] == 0) & (pool.holds[ranked] == 0)
            assert upcoming._num_here == np.count_nonzero(is_idle)
            manager.cached.mark_clean(manager.cached.keys(found, maker), 0)


def test_a_search_looks_only_at_blocks_that_left_or_came(monkeypatch: Any) -> None:
    manager = BlockManager(258, SIZE)
    for seed in range(60):
        cached(manager, [seed] * 16)
    manager.cached.leaving(64, 200)
    upcoming = manager.cached._upcoming
    looked_at, look = list[int](), upcoming._are_idle

    def counted(blocks: Any) -> Any:
        looked_at.append(len(blocks))
        return look(blocks)

    monkeypatch.setattr(upcoming, "_are_idle", counted)
    manager.cached.leaving(64, 200)
    assert looked_at == []
    sequence = manager.allocate([7] * 17)  # it takes up the cached blocks of a prompt
    manager.cached.leaving(64, 200)
    assert sum(looked_at) <= 5
    manager.free(sequence)
    manager.allocate(40 * SIZE)  # evicts the blocks of others
    looked_at.clear()
    manager.cached.leaving(64, 200)
    assert sum(looked_at) <= 64


def _leaving_soon(manager: BlockManager, ahead: int) -> set[int]:
    """Rank all idle blocks, and return those to offer that leave soon."""
    pool = manager._state.pool
    idle = np.flatnonzero(pool.cached & (pool.refs == 0) & (pool.holds == 0))
    count = min(ahead - pool.num_free, len(idle))
    if count <= 0:
        return set()
    ranks = manager._state.evictor.policy.rank(idle)
    near = idle[ranks <= np.sort(ranks)[count - 1]]
    return set(near[pool.marks[near] & (STORES | OFFERED) == 0].tolist())
