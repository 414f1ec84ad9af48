"""The eviction policy `lifetime`: what it keeps, what it remembers, and that it loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.blocks.policies.lifetime import LIFETIMES, Contest, Ghosts, Lifetime
from kvpager.simulate.generate import generate_trace
from kvpager.simulate.policies import BASELINES
from kvpager.simulate.replay import replay
from tests.support.manager_state import state_of

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


@pytest.mark.slow
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
    cached = [manager.match_prefix(prompt(which)) // BLOCK_SIZE for which in range(6)]
    assert cached[:2] == [0, 0]
    assert cached[4:] == [8, 8]


def test_ghost_tells_an_old_prefix_from_a_new_one() -> None:
    manager = BlockManager(32, BLOCK_SIZE, eviction="lifetime")
    use(manager, prompt(0))
    for which in range(1, 10):
        use(manager, prompt(which))
    assert manager.match_prefix(prompt(0)) == 0
    policy, num_known = policy_of(manager), {}
    for which in (0, 100):
        sequence = manager.allocate(prompt(which))
        manager.commit(sequence)
        uses = policy.records[manager.block_tables(sequence)[0][:8]] & 0x3F
        num_known[which] = np.count_nonzero(uses == 2)
        manager.free(sequence)
    assert num_known[0] >= 6  # another ghost may have taken its slot
    assert num_known[100] == 0


def test_a_lost_ghost_does_not_make_a_prompt_new() -> None:
    policy = Lifetime(32)
    blocks, depths = np.arange(8, dtype=np.int32), np.arange(8)
    prints = np.arange(1, 9, dtype=np.uint64) << np.uint64(3)
    for _ in range(3):
        policy.admit(blocks, prints, depths)
        policy.release(blocks)
        policy.forget(blocks)
        policy.ghosts.take(prints[3:5])
    policy.admit(blocks, prints, depths)
    policy.release(blocks)
    assert (policy.records[:8] & 0x3F).tolist() == [4, 4, 4, 1, 1, 4, 4, 4]
    assert not (policy.records[:8] >> 10 & 1).any()  # nothing was added behind a shared prefix


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    ("kind", "capacity"),
    [
        ("mixed", 1000),
        ("chat", 1000),
        ("agents", 250),
        ("evaluation", 1000),
        ("one-shot", 500),
        ("shifting", 250),
    ],
)
def test_is_never_far_behind_the_best_baseline(kind: str, capacity: int) -> None:
    trace = generate_trace(1200, seed=3, kind=kind)
    baselines = ("lru", *BASELINES)
    best = max(replay(trace, capacity, name).hit_ratio for name in baselines)
    assert replay(trace, capacity, "lifetime").hit_ratio > best - 0.003


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
    assert sorted(policy.depths[policy.records > 0].tolist())[-6:] == [5] * 6
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
    assert manager.match_prefix(prompt(0)) + manager.match_prefix(prompt(1)) > 0
    mixed(manager, 700, 100)
    manager.check()


def test_resize_moves_records_with_their_blocks() -> None:
    policy = Lifetime(8)
    blocks = np.array([6, 7], np.int32)
    policy.admit(blocks, np.array([5, 9], np.uint64), np.array([0, 1]))
    policy.release(blocks)
    ranks = policy.rank(blocks)
    places = np.array([0, 1, 2, 3, 4, 5, 1, 0], np.int32)
    policy.resize(6, places)
    assert policy.rank(np.array([1, 0], np.int32)).tolist() == ranks.tolist()
    assert policy.prints[[1, 0]].tolist() == [5, 9]


@pytest.mark.mostly_slow(quick=1)
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


def record(time: int, uses: int) -> int:
    return time << 11 | uses


def contest_after(reused: list[int], cached: list[int]) -> Contest:
    """A contest over a pool of two blocks, out of the records in `cached`, at time 1,000."""
    contest = Contest(num_blocks=2, scale=2)
    contest.count(np.array(cached), num_held=2, now=999)
    contest.see(np.array(reused), now=1000)
    contest.count(np.array(cached), num_held=2, now=1000)
    return contest


def test_strategy_that_would_have_hit_takes_charge() -> None:
    often, once = [record(980, 60)], [record(time, 1) for time in (990, 991, 992)]
    contest = contest_after(reused=often, cached=often + once)
    assert contest.hits[0] == 0  # LRU holds the two that were released last
    assert contest.chosen > 0
    assert LIFETIMES[contest.chosen, 60] > LIFETIMES[contest.chosen, 1]


def test_strategy_in_charge_stays_where_another_hits_as_often() -> None:
    cached = [record(time, 1) for time in (990, 991, 992)]
    assert contest_after(reused=cached[1:], cached=cached).chosen == 0


def test_pool_that_holds_everything_hits_everything() -> None:
    cached = [record(10, 1), record(20, 2)]
    assert contest_after(reused=cached, cached=cached).hits.tolist() == [2.0] * len(LIFETIMES)


def test_ranks_change_when_another_strategy_takes_charge() -> None:
    policy = Lifetime(8)
    blocks = np.array([0, 1], np.int32)
    policy.admit(blocks, np.array([5, 9], np.uint64), np.array([0, 1]))
    policy.touch(blocks[:1])
    policy.release(blocks)
    before = policy.rank(blocks)
    policy.contest.chosen, policy.is_outdated = 5, True
    assert policy.rank(blocks).tolist() == before.tolist()
    assert set(policy.reranked(1).tolist()) >= {0, 1}
    assert policy.rank(blocks).tolist() == [before[0] + 8 * 8, before[1]]
    assert not len(policy.reranked(1))
