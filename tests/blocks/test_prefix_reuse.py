"""What a prompt reuses: committed full blocks of its namespace, except its last token."""

from __future__ import annotations

import pytest

from kvpager import BlockManager, OutOfBlocks
from tests.support.prefixes import committed, prompt


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4, num_host_blocks=4)


def test_a_known_prefix_is_shared_except_the_last_token(manager: BlockManager) -> None:
    first = committed(manager, prompt(8))
    second = manager.allocate(prompt(8))
    # The second block is needed for one more token than may be reused: it is copied in part.
    assert second.num_cached_tokens == 7
    assert manager.block_tables(second)[0][0] == manager.block_tables(first)[0][0]
    assert second.copies.tolist() == [
        [manager.block_tables(first)[0][1], manager.block_tables(second)[0][1]]
    ]


def test_a_longer_prompt_shares_all_full_blocks_of_the_shorter(manager: BlockManager) -> None:
    first = committed(manager, prompt(8))
    second = manager.allocate(prompt(10))
    assert second.num_cached_tokens == 8
    assert len(second.copies) == 0
    assert manager.block_tables(second)[0][:2].tolist() == manager.block_tables(first)[0].tolist()
    assert manager.stats().num_shared == 2


def test_a_match_may_end_inside_a_block(manager: BlockManager) -> None:
    committed(manager, prompt(8))
    second = manager.allocate([0, 1, 2, 3, 4, 5, 99, 98])
    assert second.num_cached_tokens == 6
    assert second.copies.shape == (1, 2)


def test_nothing_is_reusable_before_commit(manager: BlockManager) -> None:
    sequence = manager.allocate(prompt(8))
    assert manager.allocate(prompt(8)).num_cached_tokens == 0
    manager.commit(sequence, 4)
    assert manager.allocate(prompt(8)).num_cached_tokens == 4


def test_an_open_block_is_not_reusable(manager: BlockManager) -> None:
    committed(manager, prompt(6))
    assert manager.allocate(prompt(6)).num_cached_tokens == 4


def test_namespaces_never_hit_each_others_blocks(manager: BlockManager) -> None:
    committed(manager, prompt(4), "acme")
    assert manager.allocate(prompt(5), namespace="acme").num_cached_tokens == 4
    assert manager.allocate(prompt(5)).num_cached_tokens == 0
    assert manager.allocate(prompt(5), namespace="acm").num_cached_tokens == 0


def test_appended_ids_extend_what_can_be_reused(manager: BlockManager) -> None:
    sequence = committed(manager, prompt(3))
    manager.append(sequence, [3])
    manager.append([sequence], [[4, 5, 6, 7]])
    manager.commit(sequence)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


def test_tokens_of_unknown_id_end_what_can_be_reused(manager: BlockManager) -> None:
    sequence = committed(manager, prompt(4))
    manager.append(sequence, 4)
    manager.append(sequence, [8, 9, 10, 11])
    manager.commit(sequence)
    assert manager.allocate([*prompt(12), 99]).num_cached_tokens == 4


def test_a_freed_prompt_stays_cached_until_its_room_is_needed(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(16)))
    assert manager.stats().num_cached == 4
    assert manager.allocate(prompt(13)).num_cached_tokens == 12
    manager.check()
    other = manager.allocate(16)
    assert manager.stats().num_cached == 0
    assert manager.stats().total_evicted == 1
    assert len(manager.block_tables(other)[0]) == 4


def test_the_least_recently_used_prefix_is_evicted_from_its_tail(
    manager: BlockManager,
) -> None:
    manager.free(committed(manager, prompt(16)))
    manager.free(committed(manager, prompt(16, first=100)))
    manager.free(manager.allocate(prompt(16)))  # used again
    manager.allocate(8)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8
    manager.check()


def test_equal_prompts_keep_their_blocks_and_one_is_published(
    manager: BlockManager,
) -> None:
    first, second = manager.allocate(prompt(8)), manager.allocate(prompt(8))
    manager.commit([first, second])
    manager.check()
    assert not set(manager.block_tables(first)[0]) & set(manager.block_tables(second)[0])
    manager.free(first)
    manager.check()
    manager.append(second, prompt(4, first=8))
    manager.commit(second)
    assert manager.allocate(prompt(13)).num_cached_tokens == 12
    manager.check()


def test_a_duplicate_publishes_its_own_blocks_after_eviction(manager: BlockManager) -> None:
    first, second = manager.allocate(prompt(4)), manager.allocate(prompt(4))
    manager.commit([first, second])
    manager.free(first)
    manager.clear_prefix_cache()
    manager.append(second, prompt(4, first=4))
    manager.commit(second)
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


def test_empty_namespaces_leave_nothing_behind(manager: BlockManager) -> None:
    for tenant in range(20):
        manager.free(committed(manager, prompt(4), f"tenant {tenant}"))
    manager.clear_prefix_cache()
    assert manager._state.forest.roots == {}


def test_a_prompt_that_fits_an_idle_pool_is_never_refused() -> None:
    manager = BlockManager(4, 4)
    manager.free(committed(manager, prompt(16)))
    sequence = manager.allocate(prompt(16))  # shares 3 blocks, and needs the fourth one's room
    assert sequence.num_cached_tokens == 15
    manager.check()


def test_a_refused_allocation_does_not_count_as_use() -> None:
    manager = BlockManager(4, 4)
    manager.free(committed(manager, prompt(4)))
    manager.free(committed(manager, prompt(4, first=100)))
    held = manager.allocate(8)
    with pytest.raises(OutOfBlocks):
        manager.allocate([*prompt(4), *prompt(12, first=50)])
    manager.append(held, 1)  # evicts the prompt that was really used longest ago
    assert manager.allocate([*prompt(3, first=100)]).num_cached_tokens == 2
    manager.check()


def test_using_a_prompt_again_and_again_costs_no_memory(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(9)))
    for _ in range(1000):
        manager.free(manager.allocate(prompt(9)))
    assert len(manager._state.evictor._queues[0]._heap) < 100
    manager.check()


def test_a_prefix_is_published_again_after_its_duplicate_was_evicted(manager: BlockManager) -> None:
    first, second = manager.allocate(prompt(8)), manager.allocate(prompt(8))
    manager.commit([first, second])
    manager.free(first)
    manager.clear_prefix_cache()
    manager.commit(second)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8
    manager.check()


def test_ids_after_unknown_tokens_are_not_taken_for_their_neighbours(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, prompt(4))
    manager.append(sequence, 4)
    manager.append(sequence, [8, 9, 10, 11])
    manager.commit(sequence)
    assert manager.allocate([0, 1, 2, 3, 8, 9, 10, 11, 99]).num_cached_tokens == 4


def test_a_published_block_keeps_its_tokens_when_its_sequence_changes(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, prompt(8))
    child = manager.fork(sequence)
    manager.truncate(sequence, 4)
    manager.append(sequence, [90, 91, 92, 93])
    manager.append(child, [8])
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


def test_a_fork_of_a_sequence_without_its_front_is_not_published(manager: BlockManager) -> None:
    sequence = manager.allocate(prompt(8))
    manager.drop_before(sequence, 4)
    child = manager.fork(sequence)
    manager.commit([sequence, child])
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 0


def test_a_prompt_leaves_from_its_end(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(12)))
    held = manager.allocate(24)  # evicts one of the three
    assert len(manager.block_tables(held)[0]) == 6
    manager.truncate(held, 20)
    assert manager.allocate(prompt(13)[:9]).num_cached_tokens == 8


def test_a_sequence_republishes_after_its_namespace_was_emptied() -> None:
    manager = BlockManager(6, 4)
    duplicate = manager.allocate(prompt(8), namespace="acme")
    manager.free(committed(manager, prompt(8), "acme"))
    manager.commit(duplicate, 0)
    manager.clear_prefix_cache()
    manager.commit(duplicate)
    manager.check()
    assert manager.allocate(prompt(9), namespace="acme").num_cached_tokens == 8
