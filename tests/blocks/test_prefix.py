"""The shape of the prefix index: runs that part, grow and shrink, duplicates and forks."""

from __future__ import annotations

import pytest

from kvpager import BlockManager
from tests.support.prefixes import A, B, C, D, E, cache, committed, evict


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=64, block_size=4)


# -------------------------------------------------------------------- the shape of the tree


def test_prompts_that_part_inside_a_run_share_what_comes_before(manager: BlockManager) -> None:
    cache(manager, A + B + C)
    cache(manager, A + B + D)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12
    assert manager.match_prefix(A + B + D) == 12
    assert manager.stats().num_cached == 4


def test_a_run_can_be_split_again_and_again(manager: BlockManager) -> None:
    prompts = [A + B + C + D, A + B + C + E, A + B + E, A + E, E]
    for prompt in prompts:
        cache(manager, prompt)
        manager.check()
    assert [manager.match_prefix(prompt) for prompt in prompts] == [len(p) for p in prompts]
    assert manager.stats().num_cached == 8


def test_a_sequence_goes_on_although_its_run_was_split(manager: BlockManager) -> None:
    sequence = committed(manager, A + B + C)
    cache(manager, A + D)
    manager.append(sequence, E)
    manager.commit(sequence)
    manager.check()
    assert manager.match_prefix(A + B + C + E) == 16


def test_a_sequence_truncated_into_a_split_run_continues_there(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, A + B + C)
    cache(manager, A + B + D)
    manager.truncate(sequence, 4)
    manager.append(sequence, E)
    manager.commit(sequence)
    manager.check()
    for prompt in (A + B + C, A + B + D, A + E):
        assert manager.match_prefix(prompt) == len(prompt)


def test_prompts_that_part_inside_a_block_share_its_first_tokens(manager: BlockManager) -> None:
    cache(manager, A + B)
    other = manager.allocate([*A, B[0], B[1], 99, 98])
    assert other.num_cached_tokens == 6
    manager.commit(other)
    manager.check()
    # Both continuations are published now, and each is found by its own tokens.
    assert manager.match_prefix([*A, B[0], B[1], 99]) == 7
    assert manager.match_prefix(A + B[:3]) == 7


def test_of_several_continuations_the_one_that_agrees_longest_is_copied(
    manager: BlockManager,
) -> None:
    for block in ([1, 2, 3, 4], [1, 2, 9, 9], [1, 9, 9, 9]):
        cache(manager, A + block)
    assert manager.match_prefix([*A, 1, 2, 3, 0]) == 7
    assert manager.match_prefix([*A, 1, 2, 9, 0]) == 7
    assert manager.match_prefix([*A, 1, 9, 0, 0]) == 6
    assert manager.match_prefix([*A, 1, 0, 0, 0]) == 5
    assert manager.match_prefix([*A, 0, 0, 0, 0]) == 4


def test_a_partial_match_needs_no_open_block(manager: BlockManager) -> None:
    cache(manager, A + B[:3])  # the second block never became full
    assert manager.match_prefix(A + B) == 4


def test_a_chain_of_many_forks_is_walked_to_its_end() -> None:
    manager = BlockManager(2048, 1)
    prompt = list(range(500))
    for depth in range(1, 500, 2):
        cache(manager, [*prompt[:depth], -1])
    cache(manager, prompt)
    manager.check()
    assert manager.match_prefix(prompt) == 500
    assert manager.match_prefix([*prompt[:251], -1]) == 252
    manager.clear_prefix_cache()
    manager.check()
    assert manager.num_free_blocks == 2048


def test_a_prompt_grown_by_tokens_is_found(
    manager: BlockManager,
) -> None:
    sequence = manager.allocate([])
    for token in A + B + C:
        manager.append(sequence, [token])
        manager.commit(sequence)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12


def test_a_run_without_its_tail_can_be_extended() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A + B + C + D)
    evict(manager, 2)
    assert manager.match_prefix(A + B + C + D) == 8
    cache(manager, A + B + E)
    cache(manager, A + B + C)
    manager.check()
    for prompt in (A + B + E, A + B + C):
        assert manager.match_prefix(prompt) == 12


def test_a_place_beyond_a_lost_tail_is_gone() -> None:
    manager = BlockManager(16, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])  # the duplicate's place is in the blocks of the first
    manager.free(first)
    held = manager.allocate(manager.num_free_blocks * 4)
    manager.append(held, 1)  # the tail of the run leaves
    manager.free(held)
    assert manager.match_prefix(A + B) == 4
    cache(manager, A + C + D)
    manager.append(duplicate, E)
    manager.commit(duplicate)
    manager.check()
    assert manager.match_prefix(A + B + E) == 12
    assert manager.match_prefix(A + C + E) == 8


# -------------------------------------------------------------------- duplicates and forks


def test_a_duplicate_continues_after_the_published_blocks(manager: BlockManager) -> None:
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.append([first, duplicate], [C, D])
    manager.commit([duplicate, first])
    manager.check()
    assert manager.stats().num_shared == 0
    assert manager.match_prefix(A + B + C) == manager.match_prefix(A + B + D) == 12


def test_a_duplicate_publishes_its_blocks_after_an_eviction() -> None:
    manager = BlockManager(8, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.free(first)
    evict(manager, 2)
    assert manager.match_prefix(A + B) == 0
    manager.append(duplicate, C)
    manager.commit(duplicate)
    manager.check()
    hit = manager.allocate(A + B + C + D)
    assert hit.num_cached_tokens == 12
    assert manager.block_tables(hit)[0][:3].tolist() == manager.block_tables(duplicate)[0].tolist()


def test_a_duplicate_whose_front_was_evicted_publishes_its_own_blocks() -> None:
    manager = BlockManager(8, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.append(duplicate, C)
    manager.commit(duplicate)  # C stands behind the blocks of the first
    manager.free(first)
    manager.clear_prefix_cache()  # takes them, and with them C, although it is held
    manager.check()
    assert manager.match_prefix(A + B + C) == 0
    manager.commit(duplicate)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12


def test_forks_publish_their_different_continuations(manager: BlockManager) -> None:
    parent = committed(manager, A)
    children = manager.fork(parent, 3)
    manager.append(children, [B, C, D])
    manager.commit(children)
    manager.append(children, [E, E, E])
    manager.commit(children)
    manager.check()
    for block in (B, C, D):
        assert manager.match_prefix(A + block + E) == 12


def test_forks_that_write_the_same_are_duplicates(manager: BlockManager) -> None:
    family = [parent := manager.allocate(A), *manager.fork(parent, 2)]
    manager.append(family, [B, B, B])
    manager.commit(family)
    manager.check()
    manager.free(family)
    assert manager.stats().num_cached == 2
    assert manager.match_prefix(A + B) == 8


def test_a_fork_taken_before_the_commit_publishes_once(manager: BlockManager) -> None:
    parent = manager.allocate(A + B)
    child = manager.fork(parent)
    manager.commit(child)
    manager.commit(parent)
    manager.check()
    manager.free([parent, child])
    assert manager.stats().num_cached == 2
