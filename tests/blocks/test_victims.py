"""Victims: the sequences to preempt so that blocks become free."""

from __future__ import annotations

import pytest

from kvpager import BlockManager, OutOfBlocks
from tests.support.clones import clone_of
from tests.support.manager_state import handles_of, same_state, state_of
from tests.support.swap_memory import BLOCK_SIZE, Memory, family


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=16, block_size=BLOCK_SIZE, num_host_blocks=12)


@pytest.fixture
def memory(manager: BlockManager) -> Memory:
    return Memory(manager)


def test_victims_are_the_first_that_are_enough(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    alone = memory.allocate(list(range(50, 59)))
    order = [members[2], alone, members[0], members[1]]

    def names(need: int) -> list[str]:
        return [one.name for one in manager.victims(order, need)]

    expected = [one.name for one in order]
    assert names(0) == []
    assert names(1) == expected[:1]
    assert names(4) == expected[:2]
    assert names(5) == expected[:3]
    assert names(6) == names(8) == expected  # all of the family, and what it shares


def test_victims_free_the_blocks_that_are_needed(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    for need in range(1, 6):
        chosen = manager.victims(members, need)
        copy = clone_of(manager)
        handles = handles_of(copy)
        free = copy.num_free_blocks
        copy.swap([handles[one.name] for one in chosen], "host")
        assert copy.num_free_blocks - free >= need
        copy.check()


def test_too_few_victims_are_refused_with_numbers(memory: Memory) -> None:
    members, manager = family(memory), memory.manager
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="need 6 device blocks, 5 free") as caught:
        manager.victims(members, 6)
    assert caught.value.free == 5
    with pytest.raises(OutOfBlocks):
        manager.victims([], 1)
    for bad in (-1, 1.0, True, "1", 2**70):
        with pytest.raises((TypeError, ValueError)):
            manager.victims(members, bad)
    assert same_state(state_of(manager), before)
