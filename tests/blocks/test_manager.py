"""The verbs of the block manager, one behaviour a test."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.sequences import Batch
from kvpager.blocks.stats import BlockStatus
from kvpager.errors import SequenceSwapped, StaleSequence
from tests.support.prefixes import committed, prompt


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4, num_host_blocks=4)


# -------------------------------------------------------------------- allocate


def test_a_sequence_gets_one_block_per_block_size_tokens(manager: BlockManager) -> None:
    assert len(manager.block_tables(manager.allocate(9))[0]) == 3
    assert manager.stats().num_held == 3


def test_the_whole_pool_can_be_allocated(manager: BlockManager) -> None:
    table = manager.block_tables(manager.allocate(32))[0]
    assert sorted(table.tolist()) == list(range(8))
    assert table.dtype == np.int32


@pytest.mark.parametrize("nothing", [[], 0, np.empty(0, np.int32)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_an_empty_sequence_holds_nothing_and_can_grow(nothing: Any, grouped: bool) -> None:
    manager = GroupedManager((None, 8), 8, 4) if grouped else BlockManager(8, 4)
    sequence = manager.allocate(nothing)
    assert len(sequence) == 0
    assert bool(sequence)
    assert manager.append(sequence, nothing).slots.size == 0
    assert manager.num_held_blocks == 0
    assert manager.append(sequence, 1).slots.size == (2 if grouped else 1)
    assert manager.append([sequence], 0).slots.size == 0
    assert len(sequence) == 1
    manager.check()


def test_negative_token_ids_are_reused_like_others(manager: BlockManager) -> None:
    prompt = [-1, -100, 5, 6, -(2**31), 8]
    manager.commit(manager.allocate(prompt))
    assert manager.match_prefix(prompt) == 4
    assert manager.match_prefix([1, 100, *prompt[2:]]) == 0


def test_a_handle_is_shown_with_its_class_length_and_state(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    assert repr(sequence) == "<SequenceHandle 0.0: 3 tokens>"
    manager.free(sequence)
    assert repr(sequence) == "<SequenceHandle 0.0: freed>"


def test_slots_are_block_times_block_size_plus_offset(manager: BlockManager) -> None:
    sequence = manager.allocate(6)
    table = manager.block_tables(sequence)[0]
    expected = [table[i // 4] * 4 + i % 4 for i in range(6)]
    assert manager.slots(sequence).tolist() == expected
    assert manager.slots(sequence, 3, 5).tolist() == expected[3:5]
    assert manager.slots(sequence).dtype == np.int64


def test_a_pool_too_small_refuses_and_says_by_how_much(manager: BlockManager) -> None:
    manager.allocate(20)
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="need 4 device blocks, 3 free, 0 evictable of 8; free"):
        manager.allocate(16)
    assert manager.stats() == before


# -------------------------------------------------------------------- fork and copy-on-write


def test_a_fork_shares_every_block_and_copies_nothing(manager: BlockManager) -> None:
    parent = manager.allocate(6)
    children = manager.fork(parent, 3)
    assert manager.stats().num_held == 2
    assert manager.stats().num_shared == 2
    for child in children:
        assert manager.block_tables(child)[0].tolist() == manager.block_tables(parent)[0].tolist()


def test_writing_into_a_shared_block_copies_it_first(manager: BlockManager) -> None:
    parent = manager.allocate(6)
    child = manager.fork(parent)
    tail = manager.block_tables(parent)[0][1]
    step = manager.append(child, 1)
    own = manager.block_tables(child)[0][1]
    assert step.copies.tolist() == [[tail, own]]
    assert own != tail
    assert step.slots.tolist() == [own * 4 + 2]
    # The parent is alone with its tail now and writes in place.
    assert len(manager.append(parent, 1).copies) == 0


def test_a_full_shared_tail_is_not_copied(manager: BlockManager) -> None:
    child = manager.fork(manager.allocate(8))
    assert len(manager.append(child, 1).copies) == 0


def test_the_last_of_a_batch_keeps_the_shared_tail(manager: BlockManager) -> None:
    family = [parent := manager.allocate(6), *manager.fork(parent, 2)]
    tail = manager.block_tables(parent)[0][1]
    step = manager.append(family, 1)
    assert step.copies[:, 0].tolist() == [tail, tail]
    assert manager.block_tables(family[-1])[0][1] == tail
    manager.check()


def test_a_cached_tail_is_copied_even_by_its_only_holder(manager: BlockManager) -> None:
    sequence = committed(manager, prompt(8))
    manager.truncate(sequence, 6)
    step = manager.append(sequence, [99])
    assert len(step.copies) == 1
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


# -------------------------------------------------------------------- append


def test_a_batch_steps_in_one_call(manager: BlockManager) -> None:
    sequences = [manager.allocate(n) for n in (3, 4, 1)]
    step = manager.append(sequences, 1)
    expected = [int(manager.slots(s, len(s) - 1)[0]) for s in sequences]
    assert step.slots.tolist() == expected
    assert [len(s) for s in sequences] == [4, 5, 2]


def test_a_batch_may_take_different_counts(manager: BlockManager) -> None:
    sequences = [manager.allocate(n) for n in (3, 4)]
    step = manager.append(sequences, counts=[0, 5])
    assert len(step.slots) == 5
    assert [len(s) for s in sequences] == [3, 9]


def test_a_batch_is_made_once_and_used_often(manager: BlockManager) -> None:
    sequences = [manager.allocate(1), manager.allocate(2)]
    batch = manager.batch(sequences)
    assert isinstance(batch, Batch)
    for _ in range(5):
        manager.append(batch, 1)
    assert manager.lengths(batch).tolist() == [6, 7]
    manager.free(sequences[0])
    with pytest.raises(StaleSequence, match="Make a new batch"):
        manager.append(batch, 1)


def test_a_refused_append_changes_nothing(manager: BlockManager) -> None:
    sequences = [manager.allocate(16), manager.allocate(12)]
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="need 2 device blocks, 1 free"):
        manager.append(sequences, 1)
    assert manager.stats() == before
    assert [len(s) for s in sequences] == [16, 12]
    manager.check()


def test_a_sequence_twice_in_a_batch_is_refused(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    with pytest.raises(ValueError, match="one is repeated"):
        manager.append([sequence, sequence], 1)
    assert len(sequence) == 3


def test_block_tables_are_padded_with_minus_one(manager: BlockManager) -> None:
    sequences = [manager.allocate(9), manager.allocate(2)]
    tables = manager.block_tables(sequences)
    assert tables.shape == (2, 3)
    assert tables.dtype == np.int32
    assert tables[1, 1:].tolist() == [-1, -1]
    assert tables[0].tolist() == manager.block_tables(sequences[0])[0].tolist()


# -------------------------------------------------------------------- truncate, drop_before


def test_truncate_gives_whole_blocks_back(manager: BlockManager) -> None:
    sequence = manager.allocate(12)
    manager.truncate(sequence, 5)
    assert len(sequence) == 5
    assert manager.stats().num_free == 6
    manager.truncate(sequence, 0)
    assert manager.stats().num_free == 8


def test_truncated_tokens_are_not_published_later(manager: BlockManager) -> None:
    sequence = manager.allocate(prompt(8))
    manager.truncate(sequence, 2)
    manager.append(sequence, [50, 51, 52])
    manager.commit(sequence)
    assert manager.allocate(prompt(9)).num_cached_tokens == 2
    assert manager.allocate([0, 1, 50, 51, 1]).num_cached_tokens == 4


def test_drop_before_releases_the_blocks_behind_a_window(manager: BlockManager) -> None:
    sequence = manager.allocate(15)
    manager.drop_before(sequence, 9)
    assert manager.stats().num_free == 6
    assert manager.block_tables(sequence)[0][:2].tolist() == [-1, -1]
    manager.append(sequence, 2)
    assert len(sequence) == 17
    with pytest.raises(ValueError, match="before token 8"):
        manager.truncate(sequence, 7)
    manager.check()


# -------------------------------------------------------------------- swap


def test_swap_moves_blocks_out_and_back(manager: BlockManager) -> None:
    sequence = manager.allocate(12)
    table = manager.block_tables(sequence)[0]
    plan = manager.swap(sequence, "host")
    assert (plan.source, plan.destination) == ("device", "host")
    assert plan.copies[:, 0].tolist() == table.tolist()
    assert manager.stats().num_free == 8
    assert manager.stats().num_host_free == 1
    back = manager.swap(sequence, "device")
    assert back.copies[:, 0].tolist() == plan.copies[:, 1].tolist()
    assert manager.block_tables(sequence)[0].tolist() == back.copies[:, 1].tolist()
    assert manager.stats().num_host_free == 4
    manager.check()


def test_swap_leaves_shared_blocks_where_they_are_needed(manager: BlockManager) -> None:
    parent = manager.allocate(8)
    child = manager.fork(parent)
    manager.append(child, 3)
    plan = manager.swap(child, "host")
    assert len(plan) == 1
    manager.free(parent)
    manager.check()
    assert manager.stats().num_held == 2  # the swapped child still counts on them
    manager.swap(child, "device")
    assert len(manager.block_tables(child)[0]) == 3
    manager.check()


def test_a_swapped_sequence_can_only_be_swapped_back_or_freed(manager: BlockManager) -> None:
    sequence = manager.allocate(5)
    manager.swap(sequence, "host")
    for operation in (manager.fork, manager.append, manager.commit, manager.slots):
        with pytest.raises(SequenceSwapped, match="swap"):
            operation(sequence)
    manager.free(sequence)
    assert manager.stats().num_host_free == 4
    manager.check()


def test_a_full_host_refuses_and_changes_nothing(manager: BlockManager) -> None:
    sequence = manager.allocate(20)
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="need 5 host blocks, 4 free"):
        manager.swap(sequence, "host")
    assert manager.stats() == before


def test_a_full_device_refuses_the_way_back_and_changes_nothing(manager: BlockManager) -> None:
    sequence = manager.allocate(12)
    manager.swap(sequence, "host")
    manager.allocate(24)
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="need 3 device blocks, 2 free"):
        manager.swap(sequence, "device")
    assert manager.stats() == before


def test_swapping_to_where_it_is_moves_nothing(manager: BlockManager) -> None:
    assert len(manager.swap(manager.allocate(5), "device")) == 0
    with pytest.raises(ValueError, match='expected "device" or "host"'):
        manager.swap(manager.allocate(5), "disk")  # type: ignore[arg-type]


# -------------------------------------------------------------------- size, states, counts


def test_a_grown_pool_keeps_its_sequences(manager: BlockManager) -> None:
    sequence = manager.allocate(32)
    table = manager.block_tables(sequence)[0]
    manager.grow(10)
    manager.append(sequence, 8)
    assert manager.block_tables(sequence)[0][:8].tolist() == table.tolist()
    manager.check()


def test_the_control_plane_never_imports_torch() -> None:
    code = "import sys, kvpager.blocks.manager; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drop_before_takes_a_start_for_each_sequence(manager: BlockManager) -> None:
    long, short = manager.allocate(16), manager.allocate(3)
    manager.drop_before([long, short], [8, 1])
    assert manager.block_tables(long)[0][:2].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="start=4: the sequence has 3 tokens only"):
        manager.drop_before([long, short], [9, 4])
    with pytest.raises(ValueError, match="expected one int, or one for each of 2"):
        manager.drop_before([long, short], [1, 2, 3])


def test_every_block_is_in_exactly_one_state(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(8)))
    manager.fork(manager.allocate(4))
    manager.allocate(4)
    states = manager.queries.block_statuses()
    counts = {state: int((states == state).sum()) for state in BlockStatus}
    assert counts == {
        BlockStatus.FREE: 4,
        BlockStatus.CACHED: 2,
        BlockStatus.HELD: 1,
        BlockStatus.SHARED: 1,
        BlockStatus.KEPT: 0,
        BlockStatus.RESERVED: 0,
    }


def test_appending_nothing_copies_nothing(manager: BlockManager) -> None:
    parent = manager.allocate(6)
    child = manager.fork(parent)
    assert len(manager.append([parent, child], counts=0).copies) == 0
    assert len(manager.append([parent, child], counts=[0, 0]).slots) == 0


def test_a_sequence_without_its_front_swaps_its_other_blocks(manager: BlockManager) -> None:
    sequence = manager.allocate(12)
    manager.drop_before(sequence, 5)
    plan = manager.swap(sequence, "host")
    assert len(plan) == 2
    assert plan.copies.min() >= 0
    manager.check()
    manager.swap(sequence, "device")
    assert manager.block_tables(sequence)[0][0] == -1
    manager.check()


def test_stats_count_what_happened() -> None:
    manager = BlockManager(8, 4, num_host_blocks=4)
    first = committed(manager, prompt(8))
    second = manager.allocate([0, 1, 2, 3, 4, 5, 77])  # copies the second block in part
    child = manager.fork(second)
    manager.append(child, 1)  # copies the tail
    manager.swap(child, "host")
    manager.swap(child, "device")
    stats = manager.stats()
    assert (stats.total_copied, stats.total_swapped_out, stats.total_swapped_in) == (2, 1, 1)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (15, 6)
    # 8 of the first; 3 of the second beyond what it shares; 4 of the child's own block.
    assert stats.num_tokens == 8 + 3 + 4
    manager.free([first, second, child])
    manager.clear_prefix_cache()
    assert manager.stats().total_evicted == 2
