"""Which cached blocks leave first, and which never leave."""

from __future__ import annotations

from itertools import count

import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.policies import POLICIES
from tests.support.prefixes import A, B, C, D, cache, committed, evict


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=64, block_size=4)


def order_of_leaving(manager: BlockManager, prompts: list[list[int]]) -> list[list[int]]:
    """Return the order in which these prompts of one block are evicted."""
    held = manager.allocate(manager.num_free_blocks * manager.block_size)
    order = list[list[int]]()
    for _ in prompts:
        manager.append(held, manager.block_size)
        manager.check()
        gone = [p for p in prompts if p not in order and not manager.match_prefix(p)]
        assert len(gone) == 1
        order += gone
    return order


def used_again(manager: BlockManager, ids: list[int]) -> None:
    """Another sequence shares the whole of a cached prompt."""
    sequence = manager.allocate([*ids, 0])
    assert sequence.num_cached_tokens == len(ids)
    manager.free(sequence)


def test_lru_lets_go_first_what_was_used_longest_ago() -> None:
    manager = BlockManager(6, 4, eviction="lru")
    for prompt in (A, B, C):
        cache(manager, prompt)
    used_again(manager, A)
    assert order_of_leaving(manager, [A, B, C]) == [B, C, A]


def test_lru_counts_from_when_the_last_holder_left() -> None:
    manager = BlockManager(6, 4, eviction="lru")
    long = committed(manager, A)
    cache(manager, B)
    manager.free(long)
    assert order_of_leaving(manager, [A, B]) == [B, A]


def test_lifetime_keeps_reused_blocks_over_blocks_used_once() -> None:
    if "lifetime" not in POLICIES:
        pytest.skip("this kvpager has no such policy")
    manager = BlockManager(32, 4, eviction="lifetime")
    fresh = count(100)
    for _ in range(1000):
        cache(manager, [*A, next(fresh), 0, 0, 0])
    assert manager.match_prefix(A) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tail_of_a_prompt_leaves_before_its_front(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    cache(manager, A + B + C)
    for kept in (8, 4, 0):
        evict(manager)
        assert manager.match_prefix(A + B + C) == kept


@pytest.mark.parametrize("policy", POLICIES)
def test_a_branch_leaves_before_the_trunk_it_stands_on(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    for prompt in (A + B, A + C, A + D):
        cache(manager, prompt)
    evict(manager, 3)
    assert manager.match_prefix(A) == 4
    assert manager.stats().num_cached == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_never_takes_a_held_block(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    cache(manager, A + B + C)
    held = manager.allocate(A + B + D)  # holds A and B
    table = manager.block_tables(held)[0].tolist()
    evict(manager)
    assert manager.match_prefix(A + B + C) == 8
    with pytest.raises(OutOfBlocks, match="5 free, 0 evictable"):
        manager.allocate(24)
    assert manager.block_tables(held)[0].tolist() == table
    manager.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_blocks_in_front_of_held_ones_can_be_reclaimed(policy: str) -> None:
    manager = BlockManager(4, 4, eviction=policy)
    sequence = committed(manager, A + B + C + D)
    manager.drop_before(sequence, 8)
    assert manager.stats().num_cached == 2
    table = manager.block_tables(sequence)[0].tolist()
    other = manager.allocate(8)
    assert not set(manager.block_tables(other)[0].tolist()) & set(table[2:])
    assert manager.block_tables(sequence)[0].tolist() == table
    manager.check()
    manager.free([sequence, other])
    manager.clear_prefix_cache()
    manager.check()
    assert manager.num_free_blocks == 4


def test_a_fully_evicted_prompt_can_be_cached_again() -> None:
    manager = BlockManager(4, 4)
    for _ in range(50):
        cache(manager, A + B + C + D)
        assert manager.match_prefix(A + B + C + D) == 16
        manager.clear_prefix_cache()
        manager.check()


def test_tenants_that_come_and_go_leave_nothing_behind(manager: BlockManager) -> None:
    for i in range(300):
        cache(manager, A + B, namespace=f"tenant {i}")
    assert len(manager._state.forest.roots) <= 33
    manager.clear_prefix_cache()
    assert not manager._state.forest.roots
    assert sum(node is not None for node in manager._state.forest.nodes) == 0
    manager.check()
