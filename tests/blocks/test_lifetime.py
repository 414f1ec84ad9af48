"""The eviction policy `lifetime`: what it keeps, what it remembers, and that it loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.blocks.policies.lifetime import HELD, Ghosts, Lifetime, Lifetimes
from kvpager.simulate.generate import generate_trace
from kvpager.simulate.replay import replay
from kvpager.testing.state import state_of

BLOCK_SIZE = 4


def use(manager: BlockManager, ids: Any) -> int:
    """One request from beginning to end; how many of its tokens were cached."""
    sequence = manager.allocate(np.asarray(ids, np.int32))
    num_cached = sequence.num_cached_tokens
    manager.commit(sequence)
    manager.free(sequence)
    return num_cached


def prompt(which: int, num_blocks: int = 8) -> np.ndarray:
    """One token more than whole blocks, so that all of them can be found again."""
    return np.arange(num_blocks * BLOCK_SIZE + 1, dtype=np.int32) + 1000 * which


def mixed(manager: BlockManager, first: int, count: int) -> list[int]:
    """Traffic in which every third prompt is one of two hot ones and the others come once."""
    return [
        use(manager, prompt(which % 2 if which % 3 == 0 else 10 + which))
        for which in range(first, first + count)
    ]


def policy_of(manager: BlockManager) -> Lifetime:
    policy = manager._state.evictor.policy
    assert isinstance(policy, Lifetime)
    return policy


# --- what it keeps --------------------------------------------------------------------------------


def test_reused_blocks_survive_traffic_that_comes_once() -> None:
    found = {}
    for eviction in ("lru", "lifetime"):
        manager, which, found[eviction] = BlockManager(600, BLOCK_SIZE, eviction=eviction), 0, 0
        for round_ in range(40):
            num_cached = use(manager, prompt(0))
            found[eviction] += round_ >= 20 and num_cached == 8 * BLOCK_SIZE
            for _ in range(100):  # 800 blocks: more than the pool holds
                which += 1
                use(manager, prompt(which))
    assert found["lru"] == 0
    assert found["lifetime"] >= 18  # of 20


def test_before_anything_is_learned_the_least_recent_leaves() -> None:
    manager = BlockManager(32, BLOCK_SIZE, eviction="lifetime")
    for which in range(6):  # 9 blocks each, one of them only while it is held
        use(manager, prompt(which))
    cached = [manager.cached_tokens(prompt(which)) // BLOCK_SIZE for which in range(6)]
    assert cached[:2] == [0, 0]
    assert cached[4:] == [8, 8]


def test_ghost_tells_an_old_prefix_from_a_new_one() -> None:
    manager = BlockManager(32, BLOCK_SIZE, eviction="lifetime")
    use(manager, prompt(0))
    for which in range(1, 10):
        use(manager, prompt(which))
    assert manager.cached_tokens(prompt(0)) == 0
    policy, num_known = policy_of(manager), {}
    for which in (0, 100):
        sequence = manager.allocate(prompt(which))
        manager.commit(sequence)
        uses = policy.records[manager.block_tables(sequence)[0][:8]] & 0xFF
        num_known[which] = np.count_nonzero(uses == 2)
        manager.free(sequence)
    assert num_known[0] >= 6  # another ghost may have taken its slot
    assert num_known[100] == 0


def test_lost_ghost_in_the_middle_does_not_make_a_prompt_new() -> None:
    policy = Lifetime(32)
    blocks, depths = np.arange(8, dtype=np.int32), np.arange(8)
    prints = np.arange(1, 9, dtype=np.uint64) << np.uint64(3)
    policy.admit(blocks, prints, depths)
    policy.retire(blocks)
    policy.forget(blocks)
    policy.ghosts.take(prints[3:5])
    policy.admit(blocks, prints, depths)
    policy.retire(blocks)
    kinds = (policy.records[:8] >> 8 & 0xFF).tolist()
    assert kinds == [5, 5, 5, 0, 0, 5, 5, 5]  # twice, by a prompt that added nothing


def test_beats_lru_on_a_made_up_trace() -> None:
    trace = generate_trace(2000, seed=3)
    lru, lifetime = (replay(trace, 1000, name).hit_ratio for name in ("lru", "lifetime"))
    assert lifetime > lru + 0.015


def test_same_calls_same_choices() -> None:
    one, two = (BlockManager(100, BLOCK_SIZE, eviction="lifetime") for _ in range(2))
    assert mixed(one, 0, 600) == mixed(two, 0, 600)
    states = [state_of(manager) for manager in (one, two)]
    names = states[0].keys() - {"meta"}  # which holds tickets, different by design
    assert all(np.array_equal(states[0][name], states[1][name]) for name in names)


def test_blocks_of_many_rows_come_one_at_a_time() -> None:
    manager = BlockManager(64, BLOCK_SIZE, eviction="lifetime")
    rows = [manager.allocate(prompt(row, 1)) for row in range(6)]
    for token in range(20):
        manager.append(rows, np.arange(6) * 1000 + 500 + token)
        manager.commit(rows)
    manager.free(rows)
    manager.check()
    policy = policy_of(manager)
    assert sorted(policy.depths[policy.records >> 8 & 0xFF < HELD].tolist())[-6:] == [5] * 6
    for which in range(20):
        use(manager, prompt(which))
    manager.check()


# --- resize ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [90, 300])
def test_resize_keeps_what_is_remembered_of_blocks_and_ghosts(num_blocks: int) -> None:
    manager = BlockManager(100, BLOCK_SIZE, eviction="lifetime")
    mixed(manager, 0, 700)
    policy = policy_of(manager)
    num_ghosts = np.count_nonzero(policy.ghosts.prints)
    if num_blocks < 100:
        manager.shrink(num_blocks)
    else:
        manager.grow(num_blocks)
    manager.check()
    assert len(policy.records) == num_blocks
    assert np.count_nonzero(policy.ghosts.prints) > num_ghosts / 2
    assert manager.cached_tokens(prompt(0)) + manager.cached_tokens(prompt(1)) > 0
    mixed(manager, 700, 100)
    manager.check()


def test_resize_moves_records_with_their_blocks() -> None:
    policy = Lifetime(8)
    blocks = np.array([6, 7], np.int32)
    policy.admit(blocks, np.array([5, 9], np.uint64), np.array([0, 1]))
    policy.retire(blocks)
    ranks = policy.rank(blocks)
    places = np.array([0, 1, 2, 3, 4, 5, 1, 0], np.int32)
    policy.resize(6, places)
    assert policy.rank(np.array([1, 0], np.int32)).tolist() == ranks.tolist()
    assert policy.prints[[1, 0]].tolist() == [5, 9]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 17])
def test_tiny_pools(num_blocks: int) -> None:
    manager = BlockManager(num_blocks, 1, eviction="lifetime")
    random = np.random.default_rng(num_blocks)
    for _ in range(3000):
        use(manager, random.integers(0, 3, random.integers(1, num_blocks + 1)))
    manager.check()


# --- its parts ------------------------------------------------------------------------------------


def test_ghosts_are_taken_once() -> None:
    ghosts = Ghosts(16)
    ghosts.put(np.array([3, 4], np.uint64), np.array([30, 40]))
    known, records = ghosts.take(np.array([1, 4], np.uint64))
    assert (known.tolist(), records.tolist()) == ([1], [40])
    assert not len(ghosts.take(np.array([4], np.uint64))[0])


def test_newer_ghost_takes_the_slot_of_an_older_one() -> None:
    ghosts = Ghosts(16)
    ghosts.put(np.array([3], np.uint64), np.array([30]))
    ghosts.put(np.array([3 + 16], np.uint64), np.array([50]))
    known, records = ghosts.take(np.array([3, 3 + 16], np.uint64))
    assert (known.tolist(), records.tolist()) == ([1], [50])


def test_kind_that_comes_back_lives_longer_than_one_that_does_not() -> None:
    lifetimes = Lifetimes(4096)
    now = 0
    for _ in range(200):
        now += 2048
        lifetimes.release(1, 1024)
        lifetimes.release(6, 1024)
        ages = np.full(512, 3000)
        lifetimes.reuse((now - ages) << 16 | 6 << 8, now)
        lifetimes.learn(2048)
    assert lifetimes.values[6] > 3000 * 0.8
    assert lifetimes.values[1] < lifetimes.values[6] / 4
