"""Pools that grow and shrink, and the block that they reserve."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.stats import BlockStatus
from tests.support.prefixes import A, B, C, D, cache, committed

# -------------------------------------------------------------------- grow


def test_growing_adds_free_blocks_and_moves_none() -> None:
    manager = BlockManager(4, 4)
    sequence = manager.allocate(16)
    table = manager.block_tables(sequence)[0].tolist()
    manager.grow(7)
    manager.check()
    assert (manager.num_blocks, manager.num_free_blocks) == (7, 3)
    assert manager.block_tables(sequence)[0].tolist() == table
    assert sorted(manager.block_tables(manager.allocate(12))[0].tolist()) == [4, 5, 6]


def test_growing_keeps_what_is_cached_and_its_order() -> None:
    manager = BlockManager(2, 4)
    cache(manager, A)
    cache(manager, B)
    manager.grow(4)
    manager.allocate(12)
    assert (manager.match_prefix(A), manager.match_prefix(B)) == (0, 4)
    manager.check()


def test_growing_to_the_same_size_changes_nothing() -> None:
    manager = BlockManager(4, 4)
    cache(manager, A)
    before = manager.stats()
    manager.grow(4)
    assert manager.stats() == before


@pytest.mark.parametrize("size", [3, 0, -1, 2**31, 4.0, True])
def test_growing_to_less_or_to_nonsense_is_refused(size: object) -> None:
    manager = BlockManager(4, 4)
    with pytest.raises((ValueError, TypeError), match="num_blocks"):
        manager.grow(size)  # type: ignore[arg-type]
    assert manager.num_blocks == 4


# -------------------------------------------------------------------- shrink


def test_shrinking_moves_the_blocks_beyond_to_free_ones() -> None:
    manager = BlockManager(8, 4)
    low, high = manager.allocate(20), manager.allocate(12)
    beyond = manager.block_tables(high)[0]
    manager.free(low)
    plan = manager.shrink(4)
    manager.check()
    assert (plan.source, plan.destination) == ("device", "device")
    assert plan.copies[:, 0].tolist() == sorted(beyond.tolist())
    assert plan.copies[:, 1].max() < 4
    assert not set(plan.copies[:, 0]) & set(plan.copies[:, 1])
    assert manager.block_tables(high)[0].tolist() == plan.copies[:, 1].tolist()
    assert (manager.num_blocks, manager.num_free_blocks) == (4, 1)


def test_shrinking_where_nothing_stands_beyond_moves_nothing() -> None:
    manager = BlockManager(8, 4)
    table = manager.block_tables(sequence := manager.allocate(8))[0].tolist()
    assert len(manager.shrink(2)) == 0
    assert manager.block_tables(sequence)[0].tolist() == table
    manager.check()


def test_forks_still_share_after_their_blocks_moved() -> None:
    manager = BlockManager(8, 4)
    low, parent = manager.allocate(16), manager.allocate(8)
    child = manager.fork(parent)
    manager.free(low)
    manager.shrink(3)
    manager.check()
    assert manager.block_tables(parent)[0].tolist() == manager.block_tables(child)[0].tolist()
    assert manager.stats().num_shared == 2


def test_a_cached_prefix_survives_the_move_and_is_hit_again() -> None:
    manager = BlockManager(8, 4)
    low = manager.allocate(20)
    cache(manager, A + B + C)
    manager.free(low)
    plan = manager.shrink(4)
    manager.check()
    hit = manager.allocate(A + B + C + D)
    assert hit.num_cached_tokens == 12
    assert manager.block_tables(hit)[0][:3].tolist() == plan.copies[:, 1].tolist()


def test_shrinking_evicts_cached_blocks_without_room() -> None:
    manager = BlockManager(8, 4)
    held = manager.allocate(8)
    cache(manager, A)
    cache(manager, B)
    manager.shrink(3)
    manager.check()
    assert (manager.match_prefix(A), manager.match_prefix(B)) == (0, 4)
    assert manager.stats().total_evicted == 1
    assert len(held) == 8


def test_a_sequence_goes_on_after_its_blocks_moved() -> None:
    manager = BlockManager(8, 4)
    low, sequence = manager.allocate(16), committed(manager, A + B)
    manager.free(low)
    manager.shrink(4)
    manager.append(sequence, C)
    manager.commit(sequence)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12


def test_shrinking_below_what_is_held_is_refused_and_changes_nothing() -> None:
    manager = BlockManager(8, 4)
    manager.allocate(20)
    cache(manager, A)
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="need 5 remaining device blocks, 4 free"):
        manager.shrink(4)
    assert manager.stats() == before
    assert manager.match_prefix(A) == 4


def test_shrinking_below_a_pinned_block_is_refused_and_changes_nothing() -> None:
    manager = BlockManager(8, 4)
    low, pinned = manager.allocate(20), committed(manager, A)
    manager.free(low)
    ticket = manager.pins.pin(pinned)
    manager.free(pinned)
    before = manager.stats()
    with pytest.raises(ValueError, match="num_blocks=4: a higher block is pinned"):
        manager.shrink(4)
    assert manager.stats() == before
    manager.pins.unpin(ticket)
    manager.shrink(4)
    assert manager.match_prefix(A) == 4
    manager.check()


@pytest.mark.parametrize("size", [0, -1, 9, 2.0])
def test_shrinking_to_nothing_or_to_more_is_refused(size: object) -> None:
    manager = BlockManager(8, 4)
    with pytest.raises((ValueError, TypeError), match="num_blocks"):
        manager.shrink(size)  # type: ignore[arg-type]


def test_a_pool_can_shrink_and_grow_again_and_again() -> None:
    manager = BlockManager(8, 4)
    sequence = committed(manager, A + B)
    for size in (2, 8, 3, 5, 2, 20, 4):
        (manager.grow if size >= manager.num_blocks else manager.shrink)(size)
        manager.check()
        assert manager.num_free_blocks == size - 2
    assert manager.match_prefix(A + B) == 8
    assert len(manager.block_tables(sequence)[0]) == 2


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("seed", range(6))
def test_a_memory_that_obeys_the_plan_keeps_all_contents(seed: int) -> None:
    random = np.random.default_rng(seed)
    manager, memory = BlockManager(24, 4), np.zeros((24, 4), np.int64)
    live: dict[SequenceHandle, list[int]] = {}
    for _ in range(120):
        try:
            ids = random.integers(0, 2, random.integers(1, 20)).tolist()
            sequence = manager.allocate(ids)
            memory[sequence.copies[:, 1]] = memory[sequence.copies[:, 0]]
            start, table = sequence.num_cached_tokens, manager.block_tables(sequence)[0]
            for position in range(start, len(ids)):
                memory[table[position // 4], position % 4] = hash(tuple(ids[: position + 1]))
            manager.commit(sequence)
            live[sequence] = ids
        except OutOfBlocks:
            pass
        for sequence in list(live):
            if random.random() < 0.3:
                manager.free(sequence)
                del live[sequence]
        size = int(random.integers(1, 25))
        if size >= manager.num_blocks:
            manager.grow(size)
            memory = np.concatenate([memory, np.zeros((size - len(memory), 4), np.int64)])
        elif manager.num_held_blocks <= size:
            plan = manager.shrink(size)
            memory[plan.copies[:, 1]] = memory[plan.copies[:, 0]]
            memory = memory[:size].copy()
        manager.check()
        for sequence, ids in live.items():
            kept = memory[manager.block_tables(sequence)[0]].reshape(-1)[: len(ids)]
            assert kept.tolist() == [hash(tuple(ids[: end + 1])) for end in range(len(ids))]


# -------------------------------------------------------------------- null block


def test_every_block_but_the_null_block_is_handed_out() -> None:
    manager = BlockManager(8, 4, null_block=True)
    table = manager.block_tables(manager.allocate(28))[0]
    assert sorted(table.tolist()) == list(range(1, 8))
    with pytest.raises(OutOfBlocks, match="0 free, 0 evictable of 8"):
        manager.allocate(1)
    manager.check()


def test_the_null_block_is_reserved_and_counted_nowhere_else() -> None:
    manager = BlockManager(8, 4, null_block=True)
    cache(manager, A)
    manager.allocate(4)
    stats = manager.stats()
    assert stats.num_held + stats.num_cached + stats.num_kept + stats.num_free == 7
    assert manager.queries.block_statuses()[0] == BlockStatus.RESERVED
    assert (manager.queries.block_statuses() == BlockStatus.RESERVED).sum() == 1


def test_the_null_block_survives_shrinking_and_growing() -> None:
    manager = BlockManager(8, 4, null_block=True)
    low, high = manager.allocate(16), manager.allocate(8)
    manager.free(low)
    plan = manager.shrink(3)
    assert sorted(plan.copies[:, 1].tolist()) == [1, 2]
    manager.free(high)
    manager.grow(6)
    assert sorted(manager.block_tables(manager.allocate(20))[0].tolist()) == [1, 2, 3, 4, 5]
    manager.check()


def test_a_pool_needs_a_block_beside_the_null_block() -> None:
    with pytest.raises(ValueError, match="num_blocks=1: expected at least 2"):
        BlockManager(1, 4, null_block=True)
    with pytest.raises(ValueError, match="num_blocks=1: expected at least 2"):
        BlockManager(8, 4, null_block=True).shrink(1)
