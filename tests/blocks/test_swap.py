"""Swapping: what shares on the device shares on the host, in parts and in any order."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.errors import SequenceSwapped
from tests.support.manager_state import same_state, state_of
from tests.support.swap_memory import BLOCK_SIZE, Memory, family


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=16, block_size=BLOCK_SIZE, num_host_blocks=12)


@pytest.fixture
def memory(manager: BlockManager) -> Memory:
    return Memory(manager)


# -------------------------------------------------------------------- families


def test_forks_swapped_together_share_on_host_and_device(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    assert len(memory.swap(members, "host")) == 5
    assert (manager.num_held_blocks, manager.stats().num_host_free) == (0, 7)
    memory.check()
    memory.tiers["device"][:] = -1
    assert len(memory.swap(members, "device")) == 5
    assert (manager.num_held_blocks, manager.stats().num_host_free) == (5, 12)
    assert manager.stats().num_shared == 2
    memory.check()


def test_one_member_comes_back_alone(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    memory.swap(members, "host")
    assert len(memory.swap(members[1], "device")) == 3
    memory.check()
    memory.append([members[1]], [[1, 2, 3]])
    with pytest.raises(SequenceSwapped):
        manager.append(members[0], 1)
    assert len(memory.swap(members[0], "device")) == 1
    assert len(memory.swap(members[2], "device")) == 1
    assert manager.stats().num_shared == 2
    memory.check()


def test_shared_blocks_leave_with_the_last_swapped_fork(memory: Memory) -> None:
    members = family(memory)
    plans = [len(memory.swap(one, "host")) for one in members]
    assert plans == [1, 1, 3]
    assert memory.manager.num_held_blocks == 0
    memory.check()
    plans = [len(memory.swap(one, "device")) for one in members]
    assert plans == [3, 1, 1]
    memory.check()


def test_when_the_last_resident_is_freed_the_rest_can_leave(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    memory.swap(members[:2], "host")
    memory.free(members[2])
    assert manager.num_held_blocks == 2
    assert len(memory.swap(members[0], "host")) == 2
    assert manager.num_held_blocks == 0
    memory.check()


def test_a_swapped_member_may_be_freed(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    memory.swap(members, "host")
    memory.free(members[0])
    assert manager.stats().num_host_free == 8
    memory.check()
    memory.swap(members[1:], "device")
    memory.check()
    for one in members[1:]:
        memory.free(one)
    assert (manager.num_free_blocks, manager.stats().num_host_free) == (16, 12)


def test_a_returned_fork_can_be_forked_and_swapped_again(memory: Memory) -> None:
    members = family(memory)
    memory.swap(members, "host")
    memory.swap(members[0], "device")
    child = memory.fork(members[0])
    memory.append([members[0], child], [[7, 7], [8, 8]])
    memory.check()
    memory.swap([members[0], child], "host")
    assert memory.manager.num_held_blocks == 0
    memory.check()
    memory.swap([*members, child], "device")
    memory.check()


def test_copy_on_write_still_guards_a_swapped_holder(memory: Memory) -> None:
    parent = memory.allocate([1, 2, 3, 4, 5, 6])
    child = memory.fork(parent)
    memory.swap(child, "host")
    memory.append([parent], [[7]])
    memory.check()
    memory.swap(child, "device")
    memory.append([child], [[8]])
    memory.check()


# -------------------------------------------------------------------- in parts


def test_a_sequence_leaves_from_its_end_in_parts(memory: Memory) -> None:
    manager, sequence = memory.manager, memory.allocate(list(range(20)))
    table = manager.block_tables(sequence)[0].tolist()
    for size in (2, 0, 1, 2):
        plan = memory.swap(sequence, "host", size)
        assert sorted(plan.copies[:, 0].tolist()) == sorted(table[len(table) - size :])
        del table[len(table) - size :]
        assert manager.stats().num_swapped == 1
        memory.check()
    assert manager.num_held_blocks == 0


def test_a_sequence_comes_back_from_its_front_in_parts(memory: Memory) -> None:
    manager, sequence = memory.manager, memory.allocate(list(range(20)))
    memory.swap(sequence, "host")
    for here in (2, 2, 4):
        memory.swap(sequence, "device", here - int((manager.block_tables(sequence)[0] >= 0).sum()))
        expected = [True] * here + [False] * (5 - here)
        assert (manager.block_tables(sequence)[0] >= 0).tolist() == expected
        with pytest.raises(SequenceSwapped):
            manager.append(sequence, 1)
        memory.check()
    memory.swap(sequence, "device", 9)
    memory.append([sequence], [[20]])
    memory.check()


def test_a_half_swapped_family_turns_round(memory: Memory) -> None:
    members = family(memory)
    memory.swap(members, "host", 4)
    memory.check()
    memory.swap(members, "device", 2)
    memory.check()
    memory.swap(members, "host", 1)
    memory.check()
    memory.swap(members, "device")
    memory.append(members, [[1], [2], [3]])
    memory.check()


def test_no_blocks_at_all_is_a_swap_too(memory: Memory) -> None:
    sequence = memory.allocate(list(range(8)))
    assert len(memory.swap(sequence, "host", 0)) == 0
    with pytest.raises(SequenceSwapped):
        memory.manager.append(sequence, 1)
    assert len(memory.swap(sequence, "device", 0)) == 0
    memory.append([sequence], [[9]])
    memory.check()


def test_an_empty_sequence_swaps(memory: Memory) -> None:
    sequence = memory.allocate([])
    assert len(memory.swap(sequence, "host")) == 0
    assert len(memory.swap(sequence, "device")) == 0
    memory.append([sequence], [[9]])
    memory.check()


def test_plans_never_read_what_they_write(memory: Memory) -> None:
    members = family(memory)
    for to in ("host", "device"):
        plan = memory.swap(members, to)
        assert len(np.unique(plan.copies[:, 0])) == len(np.unique(plan.copies[:, 1])) == 5
        assert plan.copies.dtype == np.int32
        assert plan.ticket == 0


@pytest.mark.parametrize("bad", [-1, 1.0, True, "1", 2**31, 2**70])
def test_a_bad_at_most_is_refused(memory: Memory, bad) -> None:
    sequence = memory.allocate(list(range(8)))
    before = state_of(memory.manager)
    with pytest.raises((TypeError, ValueError), match="at_most"):
        memory.manager.swap(sequence, "host", at_most=bad)
    assert same_state(state_of(memory.manager), before)


# -------------------------------------------------------------------- refusals


def test_swapping_in_a_resident_sequence_changes_nothing(memory: Memory) -> None:
    sequence = memory.allocate(list(range(8)))
    before = state_of(memory.manager)
    assert len(memory.swap(sequence, "device")) == 0
    assert same_state(state_of(memory.manager), before)


def test_what_is_wholly_on_the_host_cannot_leave_again(memory: Memory) -> None:
    sequence = memory.allocate(list(range(8)))
    memory.swap(sequence, "host")
    before = state_of(memory.manager)
    with pytest.raises(SequenceSwapped, match="on the host already"):
        memory.manager.swap(sequence, "host")
    assert same_state(state_of(memory.manager), before)


def test_a_host_too_small_changes_nothing(memory: Memory) -> None:
    manager = memory.manager
    members = family(memory)
    memory.swap(memory.allocate(list(range(50, 82))), "host")
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 5 host blocks, 4 free"):
        manager.swap(members, "host")
    assert same_state(state_of(manager), before)
    assert len(memory.swap(members, "host", 4)) == 4
    memory.check()


def test_tables_lack_blocks_in_host_memory_where_computing_is_refused(memory: Memory) -> None:
    manager = memory.manager
    sequence = memory.allocate(list(range(12)))
    memory.swap(sequence, "host", at_most=2)
    (table,) = manager.block_tables(sequence, padding=-7)
    assert (table == -7).sum() == 2
    for compute in (manager.tables_and_lengths, manager.slots, manager.append):
        with pytest.raises(SequenceSwapped):
            compute(sequence)
    memory.swap(sequence, "device")
    assert (manager.block_tables(sequence, padding=-7) >= 0).all()


def test_no_host_at_all_refuses(memory: Memory) -> None:
    manager = BlockManager(4, 4)
    sequence = manager.allocate(range(8))
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 2 host blocks, 0 free"):
        manager.swap(sequence, "host")
    assert same_state(state_of(manager), before)


def test_a_device_too_full_changes_nothing(memory: Memory) -> None:
    manager = memory.manager
    members = family(memory)
    memory.swap(members, "host")
    filler = memory.allocate(list(range(50, 102)))  # 13 of 16 blocks
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 5 device blocks, 3 free"):
        manager.swap(members, "device")
    assert same_state(state_of(manager), before)
    memory.swap(members, "device", 3)
    memory.check()
    memory.free(filler)
    memory.swap(members, "device")
    memory.check()


def test_the_way_back_stops_at_a_ceiling_and_changes_nothing() -> None:
    manager = BlockManager(16, 4, 16)
    sequence = manager.allocate(range(16), namespace="a")
    manager.swap(sequence, "host")
    manager.quotas.set("a", ceiling=3)
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="may have 3 blocks"):
        manager.swap(sequence, "device")
    assert same_state(state_of(manager), before)
    manager.quotas.set("a", ceiling=4)
    manager.swap(sequence, "device")
    assert manager.quotas.used("a") == 4
    manager.check()


# -------------------------------------------------------------------- and the prefix index


def test_published_blocks_stay_cached_after_a_swap(memory: Memory) -> None:
    manager, ids = memory.manager, list(range(12))
    sequence = memory.allocate(ids)
    manager.commit(sequence)
    memory.swap(sequence, "host")
    assert manager.stats().num_cached == 3
    assert manager.match_prefix(ids) == 12
    other = memory.allocate([*ids, 99])
    assert other.num_cached_tokens == 12
    memory.check()
    memory.swap(sequence, "device")
    memory.check()


def test_a_returned_sequence_publishes_again_after_an_eviction(memory: Memory) -> None:
    manager, ids = memory.manager, list(range(12))
    sequence = memory.allocate(ids)
    manager.commit(sequence)
    memory.swap(sequence, "host")
    assert manager.clear_prefix_cache() == 3
    assert manager.match_prefix(ids) == 0
    memory.swap(sequence, "device")
    manager.commit(sequence)
    assert manager.match_prefix(ids) == 12
    other = memory.allocate([*ids, 99])
    assert other.num_cached_tokens == 12
    memory.check()


def test_a_returned_sequence_and_its_cached_copies_coexist(memory: Memory) -> None:
    manager, ids = memory.manager, list(range(8))
    sequence = memory.allocate(ids)
    manager.commit(sequence)
    memory.swap(sequence, "host")
    memory.swap(sequence, "device")
    memory.append([sequence], [[8, 9, 10, 11]])
    manager.commit(sequence)
    assert manager.match_prefix(range(12)) == 12
    memory.check()
    memory.free(sequence)
    memory.allocate([*range(12), 77])
    memory.check()


def test_cached_blocks_make_room_for_the_way_back(memory: Memory) -> None:
    manager = memory.manager
    sequence = memory.allocate(list(range(48)))
    memory.swap(sequence, "host")
    other = memory.allocate(list(range(100, 164)))
    manager.commit(other)
    memory.free(other)
    assert manager.num_free_blocks == 0
    memory.swap(sequence, "device")
    assert manager.queries.num_evicted_blocks == 12
    memory.check()


# -------------------------------------------------------------------- room that is to be left


def test_a_swap_leaves_the_blocks_that_are_to_be_spared(manager: BlockManager) -> None:
    sequence = manager.allocate(5 * BLOCK_SIZE)
    manager.swap(sequence, "host")
    manager.allocate(8 * BLOCK_SIZE)
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 9 device blocks, 8 free"):
        manager.swap(sequence, "device", reserve=4)
    assert same_state(state_of(manager), before)
    manager.swap(sequence, "device", reserve=3)
    assert manager.num_available_blocks == 3


def test_allocate_leaves_the_blocks_that_are_to_be_spared(manager: BlockManager) -> None:
    ids = list(range(4 * BLOCK_SIZE))
    manager.free(manager.allocate(ids), publish=True)
    held = manager.allocate(10 * BLOCK_SIZE)
    assert (manager.num_free_blocks, manager.num_available_blocks) == (2, 6)
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 7 device blocks"):
        manager.allocate(
            [*ids, 1], reserve=2
        )  # four cached blocks are no room any more, one is new
    assert same_state(state_of(manager), before)
    assert manager.allocate([*ids, 1], reserve=1).num_cached_tokens == 4 * BLOCK_SIZE
    manager.free(held)
    manager.check()
