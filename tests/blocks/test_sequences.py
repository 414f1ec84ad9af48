"""Dropped blocks, batches and handles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import SequenceSwapped, StaleSequence
from tests.support.manager_state import refused, same_state, state_of

Arrays = dict[str, np.ndarray]


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=32, block_size=4, num_host_blocks=16)


# -------------------------------------------------------------------- dropped blocks


def test_slots_of_a_dropped_block_are_refused(manager: BlockManager) -> None:
    sequence = manager.allocate(16)
    manager.drop_before(sequence, 13)
    refused(manager, ValueError, lambda: manager.slots(sequence), "expected 12 <= start")
    refused(manager, ValueError, lambda: manager.truncate(sequence, 11), "before token 12")


def test_a_fork_keeps_what_its_sibling_gave_back(manager: BlockManager) -> None:
    parent = manager.allocate(16)
    child = manager.fork(parent)
    table = manager.block_tables(child)[0]
    manager.drop_before(parent, 13)
    assert manager.block_tables(child)[0].tolist() == table.tolist()
    assert manager.num_held_blocks == 4
    manager.drop_before(child, 13)
    assert manager.block_tables(child)[0][:3].tolist() == [-1] * 3
    assert manager.num_held_blocks == 1
    manager.check()
    manager.free([parent, child])
    assert manager.num_free_blocks == 32


def test_a_sequence_without_its_front_is_not_published(manager: BlockManager) -> None:
    sequence = manager.allocate(range(8))
    manager.drop_before(sequence, 8)
    manager.append(sequence, list(range(8, 16)))
    manager.commit(sequence)
    assert manager.match_prefix(range(16)) == 0
    manager.check()


def test_a_sequence_without_its_front_swaps_and_comes_back(manager: BlockManager) -> None:
    sequence = manager.allocate(17)
    manager.drop_before(sequence, 13)
    assert len(manager.swap(sequence, "host")) == 2
    manager.swap(sequence, "device")
    manager.append(sequence, 8)
    assert (manager.block_tables(sequence)[0] >= 0).tolist() == [False] * 3 + [True] * 4
    manager.check()


# -------------------------------------------------------------------- batches and handles


def test_a_batch_notices_a_swap_and_works_again_afterwards(manager: BlockManager) -> None:
    sequences = [manager.allocate(3) for _ in range(3)]
    batch = manager.batch(sequences)
    manager.append(batch, 1)
    manager.swap(sequences[1], "host")
    refused(manager, SequenceSwapped, lambda: manager.append(batch, 1))
    refused(manager, SequenceSwapped, lambda: manager.commit(batch))
    assert manager.lengths(batch).tolist() == [4, 4, 4]
    manager.swap(sequences[1], "device")
    manager.append(batch, 1)
    assert manager.lengths(batch).tolist() == [5, 5, 5]


def test_a_batch_of_swapped_sequences_works_once_they_return(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    manager.swap(sequence, "host")
    batch = manager.batch([sequence])
    refused(manager, SequenceSwapped, lambda: manager.append(batch, 1))
    manager.swap(batch, "device")
    manager.append(batch, 1)


def test_a_batch_notices_a_row_that_a_new_sequence_took(manager: BlockManager) -> None:
    sequences = [manager.allocate(3) for _ in range(3)]
    batch = manager.batch(sequences)
    manager.append(batch, 1)
    manager.free(sequences[1])
    taker = manager.allocate(7)
    assert taker._row == sequences[1]._row
    for call in (
        lambda: manager.append(batch, 1),
        lambda: manager.commit(batch),
        lambda: manager.free(batch),
        lambda: manager.swap(batch, "host"),
        lambda: manager.lengths(batch),
        lambda: manager.block_tables(batch),
        lambda: manager.accept(batch, 0),
        lambda: manager.victims(batch, 1),
        lambda: manager.drop_before(batch, 0),
    ):
        refused(manager, StaleSequence, call, "Make a new batch")
    assert len(taker) == 7


def test_a_batch_outlives_strangers_that_come_and_go(manager: BlockManager) -> None:
    batch = manager.batch([manager.allocate(3), manager.allocate(4)])
    for _ in range(20):
        stranger = manager.allocate(5)
        manager.free([manager.fork(stranger), stranger])
        manager.append(batch, 1)
    assert manager.lengths(batch).tolist() == [23, 24]
    manager.check()


def test_a_batch_frees_all_and_is_stale_then(manager: BlockManager) -> None:
    batch = manager.batch([manager.allocate(3), manager.allocate(4)])
    manager.free(batch)
    refused(manager, StaleSequence, lambda: manager.free(batch))
    assert manager.num_free_blocks == 32


def test_free_with_publish_lets_the_same_prompt_hit(manager: BlockManager) -> None:
    pair = [manager.allocate(range(10)), manager.allocate(range(50, 59))]
    manager.append(pair[0], [10, 11])
    manager.free(pair, publish=True)
    assert manager.allocate(range(13)).num_cached_tokens == 12
    assert manager.allocate(range(50, 60)).num_cached_tokens == 8
    manager.check()


def test_free_with_publish_of_a_swapped_sequence_is_refused(manager: BlockManager) -> None:
    pair = [manager.allocate(range(10)), manager.allocate(range(8))]
    manager.swap(pair[1], "host")
    refused(manager, SequenceSwapped, lambda: manager.free(pair, publish=True))


def test_a_sequence_named_twice_is_refused_everywhere(manager: BlockManager) -> None:
    one, two = manager.allocate(range(5)), manager.allocate(5)
    twice = [one, two, one]
    for call in (
        lambda: manager.batch(twice),
        lambda: manager.append(twice, 1),
        lambda: manager.append(iter(twice), 1),
        lambda: manager.free(twice),
        lambda: manager.free(twice, publish=True),
        lambda: manager.swap(twice, "host"),
        lambda: manager.swap(twice, "device"),
        lambda: manager.commit(twice),
        lambda: manager.accept(twice, 0),
        lambda: manager.drop_before(twice, 0),
        lambda: manager.lengths(twice),
        lambda: manager.block_tables(twice),
        lambda: manager.victims(twice, 1),
    ):
        refused(manager, ValueError, call, "one is repeated")


VERBS: dict[str, Callable[[BlockManager, SequenceHandle], object]] = {
    "append": lambda m, s: m.append(s, 1),
    "append ids": lambda m, s: m.append([s], [[1]]),
    "append speculative": lambda m, s: m.append(s, 1, speculative=True),
    "accept": lambda m, s: m.accept(s, 0),
    "commit": lambda m, s: m.commit(s),
    "commit many": lambda m, s: m.commit([s]),
    "truncate": lambda m, s: m.truncate(s, 0),
    "drop_before": lambda m, s: m.drop_before(s, 0),
    "fork": lambda m, s: m.fork(s),
    "fork one": lambda m, s: m.fork(s, 1),
    "free": lambda m, s: m.free(s),
    "free publish": lambda m, s: m.free([s], publish=True),
    "swap out": lambda m, s: m.swap(s, "host"),
    "swap in": lambda m, s: m.swap([s], "device", at_most=0),
    "batch": lambda m, s: m.batch([s]),
    "length": lambda m, s: m.lengths(s),
    "lengths": lambda m, s: m.lengths(s),
    "block_table": lambda m, s: m.block_tables(s)[0],
    "block_tables": lambda m, s: m.block_tables(s),
    "slots": lambda m, s: m.slots(s),
    "victims": lambda m, s: m.victims([s], 1),
    "pin": lambda m, s: m.pins.pin(s),
    "retain": lambda m, s: m.pins.retain(s, 3),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_handle_of_another_manager_is_refused(manager: BlockManager, verb: str) -> None:
    manager.allocate(5)
    other = BlockManager(8, 4)
    theirs = other.allocate(5)
    before = state_of(other)
    refused(manager, StaleSequence, lambda: VERBS[verb](manager, theirs), "another manager")
    assert same_state(state_of(other), before)


@pytest.mark.parametrize("verb", VERBS)
def test_a_freed_handle_is_refused(manager: BlockManager, verb: str) -> None:
    stale = manager.allocate(5)
    manager.free(stale)
    refused(manager, StaleSequence, lambda: VERBS[verb](manager, stale), "was freed")
    manager.allocate(5)
    refused(manager, StaleSequence, lambda: VERBS[verb](manager, stale), "was freed")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("junk", [None, 3, "Sequence 0.0", [None], object()])
def test_what_is_no_handle_is_refused(manager: BlockManager, verb: str, junk) -> None:
    manager.allocate(5)
    refused(manager, TypeError, lambda: VERBS[verb](manager, junk))


@pytest.mark.parametrize(
    "verb",
    [
        "append",
        "accept",
        "commit",
        "truncate",
        "drop_before",
        "fork",
        "free publish",
        "slots",
        "pin",
    ],
)
def test_a_swapped_sequence_is_refused(manager: BlockManager, verb: str) -> None:
    sequence = manager.allocate(range(5))
    manager.swap(sequence, "host", at_most=1)
    refused(manager, SequenceSwapped, lambda: VERBS[verb](manager, sequence))


def test_one_bad_handle_in_a_batch_changes_nothing(manager: BlockManager) -> None:
    good = manager.allocate(range(9))
    stale = manager.allocate(3)
    manager.free(stale)
    for call in (
        lambda: manager.append([good, stale], 1),
        lambda: manager.append([good, stale], [[1], [2]]),
        lambda: manager.commit([good, stale]),
        lambda: manager.free([good, stale]),
        lambda: manager.free([good, stale], publish=True),
        lambda: manager.swap([good, stale], "host"),
        lambda: manager.drop_before([good, stale], 0),
    ):
        refused(manager, StaleSequence, call)


@pytest.mark.parametrize("count", [-1, 1.0, True, "2", 2**31, 2**70])
def test_a_bad_count_of_forks_is_refused(manager: BlockManager, count) -> None:
    sequence = manager.allocate(5)
    refused(manager, (TypeError, ValueError), lambda: manager.fork(sequence, count))


def test_a_refused_allocation_changes_nothing_where_a_row_is_free(manager: BlockManager) -> None:
    manager.free(manager.allocate(range(8)), publish=True)
    manager.allocate(60)
    refused(manager, OutOfBlocks, lambda: manager.allocate(200))
    refused(manager, OutOfBlocks, lambda: manager.allocate([*range(8), *range(100)]))
    refused(manager, TypeError, lambda: manager.allocate([1], lora=3))  # type: ignore[arg-type]
    refused(manager, ValueError, lambda: manager.allocate([1, 2], mm_hashes=[(0, 3, b"x")]))
    refused(manager, ValueError, lambda: manager.allocate([1, 2], mm_hashes=[(1, 1, b"x")]))
    refused(manager, TypeError, lambda: manager.allocate([1, 2], mm_hashes=[(0, 1, "x")]))  # type: ignore[list-item]
