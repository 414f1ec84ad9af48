"""`match_prefix` counts cached tokens and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import BlockManager
from tests.support.manager_state import state_of
from tests.support.prefixes import A, B, C, D, cache, evict


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=64, block_size=4)


def test_match_prefix_changes_nothing() -> None:
    manager = BlockManager(8, 4, num_events=10)
    cache(manager, A + B)
    cache(manager, C)
    manager.events.fetch()
    before = {name: array.copy() for name, array in state_of(manager).items()}
    for prompt in (A + B, A + B[:2], D, []):
        manager.match_prefix(prompt)
        manager.match_prefix(prompt, namespace="nobody yet", lora="x")
    after = state_of(manager)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert manager.events.fetch() == []


def test_match_prefix_counts_the_last_token_unlike_allocate(
    manager: BlockManager,
) -> None:
    cache(manager, A + B)
    assert manager.match_prefix(A + B) == 8
    assert manager.allocate(A + B).num_cached_tokens == 7


def test_match_prefix_returns_the_blocks_that_allocate_shares(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix([*A, *B, 99], blocks=True)
    assert match.num_tokens == 8
    table = manager.block_tables(manager.allocate([*A, *B, 99]))[0]
    assert match.blocks.dtype == np.int32
    assert match.blocks.tolist() == table[:2].tolist()


def test_match_prefix_returns_a_block_that_agrees_in_part(manager: BlockManager) -> None:
    cache(manager, A + B)
    whole = manager.match_prefix(A + B, blocks=True).blocks
    match = manager.match_prefix([*A, *B[:2], 99], blocks=True)
    assert (match.num_tokens, match.blocks.tolist()) == (6, whole.tolist())


def test_match_prefix_of_an_unknown_prompt_has_no_blocks(manager: BlockManager) -> None:
    cache(manager, A)
    for key in ({}, {"namespace": "other"}, {"lora": "x"}):
        match = manager.match_prefix(A if key else D, blocks=True, **key)
        assert (match.num_tokens, match.blocks.tolist()) == (0, [])


def test_blocks_of_a_match_are_a_read_only_copy(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix(A, blocks=True)
    with pytest.raises(ValueError, match="read-only"):
        match.blocks[0] = 0
    cache(manager, A + C)
    assert len(match.blocks) == 1


def test_blocks_of_a_match_are_not_held(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix(A + B, blocks=True)
    assert len(match.blocks) == 2
    assert manager.clear_prefix_cache() == 2
    assert manager.match_prefix(A + B, blocks=True).num_tokens == 0


def test_blocks_of_match_prefix_is_a_bool(manager: BlockManager) -> None:
    with pytest.raises(TypeError, match="blocks"):
        manager.match_prefix(A, blocks=1)  # type: ignore[call-overload]


def test_looking_at_a_prompt_does_not_keep_it(manager: BlockManager) -> None:
    manager = BlockManager(2, 4)
    cache(manager, A)
    cache(manager, B)
    manager.match_prefix(A)
    evict(manager)
    assert (manager.match_prefix(A), manager.match_prefix(B)) == (0, 4)
