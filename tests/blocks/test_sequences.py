"""Speculative tokens, dropped blocks, appended ids, batches and handles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import SequenceSwapped, StaleSequence
from tests.support.manager_state import same_state, state_of

Arrays = dict[str, np.ndarray]


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=32, block_size=4, num_host_blocks=16)


def refused(
    manager: BlockManager, error: Any, call: Callable[[], object], match: str = "."
) -> None:
    """`call` raises `error` and leaves everything as it was."""
    before = state_of(manager)
    with pytest.raises(error, match=match):
        call()
    assert same_state(state_of(manager), before)
    manager.check()


# -------------------------------------------------------------------- speculative tokens


def test_speculative_tokens_get_slots_like_other_tokens(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    step = manager.append(sequence, 6, speculative=True)
    assert len(sequence) == 9
    assert step.slots.tolist() == manager.slots(sequence, 3).tolist()


@pytest.mark.parametrize("commit", [None, 8, "batch", "publish"])
def test_speculative_tokens_are_never_published(manager: BlockManager, commit) -> None:
    sequence = manager.allocate(range(8))
    other = manager.allocate(3)
    manager.append(sequence, list(range(8, 16)), speculative=True)
    if commit == "batch":
        manager.commit([sequence, other])
    elif commit == "publish":
        manager.free(sequence, publish=True)
    else:
        manager.commit(sequence, commit)
    assert manager.match_prefix(range(16)) == 8
    manager.check()


def test_a_commit_of_speculative_tokens_is_refused(manager: BlockManager) -> None:
    sequence, other = manager.allocate(range(8)), manager.allocate(12)
    manager.append(sequence, list(range(8, 12)), speculative=True)
    refused(manager, ValueError, lambda: manager.commit(sequence, 9), "8 tokens only")
    refused(manager, ValueError, lambda: manager.commit([other, sequence], 9), "8 tokens only")


@pytest.mark.parametrize("kept", range(10))
def test_accept_keeps_the_first_tokens_and_releases_the_rest(
    manager: BlockManager, kept: int
) -> None:
    sequence = manager.allocate(range(6))
    manager.append(sequence, list(range(6, 15)), speculative=True)
    table = manager.block_tables(sequence)[0]
    manager.accept(sequence, kept)
    assert len(sequence) == 6 + kept
    num_blocks = -(-(6 + kept) // 4)
    assert manager.block_tables(sequence)[0].tolist() == table[:num_blocks].tolist()
    assert manager.num_free_blocks == 32 - num_blocks
    manager.commit(sequence)
    assert manager.match_prefix(range(15)) == (6 + kept) // 4 * 4
    manager.check()


def test_accepted_ids_become_publishable(manager: BlockManager) -> None:
    sequence = manager.allocate(range(6))
    manager.append(sequence, 5, speculative=True)
    manager.accept(sequence, 3, [6, 7, 8])
    manager.commit(sequence)
    manager.append(sequence, [9, 10, 11])
    manager.commit(sequence)
    assert manager.match_prefix(range(12)) == 12


def test_speculative_tokens_accepted_without_ids_end_reuse(manager: BlockManager) -> None:
    sequence = manager.allocate(range(6))
    manager.append(sequence, 5, speculative=True)
    manager.accept(sequence, 5)
    manager.append(sequence, [11])
    manager.commit(sequence)
    assert manager.match_prefix(range(12)) == 4


def test_ids_of_rejected_speculative_tokens_are_forgotten(manager: BlockManager) -> None:
    sequence = manager.allocate(range(4))
    manager.append(sequence, [4, 5, 99, 98], speculative=True)
    manager.accept(sequence, 2)
    manager.append(sequence, [6, 7])
    manager.commit(sequence)
    assert manager.match_prefix([*range(8), 9]) == 8
    assert manager.match_prefix([0, 1, 2, 3, 4, 5, 99, 98]) == 6


def test_a_batch_accepts_different_counts(manager: BlockManager) -> None:
    sequences = [manager.allocate([n] * 3) for n in range(6)]
    manager.append(sequences, [[n] * 5 for n in range(6)], speculative=True)
    manager.accept(manager.batch(sequences), [0, 1, 2, 3, 4, 5])
    assert manager.lengths(sequences).tolist() == [3, 4, 5, 6, 7, 8]
    manager.commit(sequences)
    assert [manager.match_prefix([n] * 8) for n in range(6)] == [0, 4, 4, 4, 4, 8]
    manager.check()


def test_a_batch_accepts_ragged_ids(manager: BlockManager) -> None:
    sequences = [manager.allocate([n] * 3) for n in range(3)]
    manager.append(sequences, counts=[1, 5, 3], speculative=True)
    manager.accept(sequences, [1, 5, 0], [[0], [1] * 5, []])
    manager.commit(sequences)
    assert [manager.match_prefix([n] * 8) for n in range(3)] == [4, 8, 0]
    manager.check()


def test_one_count_stands_for_the_whole_batch(manager: BlockManager) -> None:
    sequences = [manager.allocate(3) for _ in range(3)]
    manager.append(sequences, 4, speculative=True)
    manager.accept(sequences, 2)
    assert manager.lengths(sequences).tolist() == [5, 5, 5]


def test_more_speculative_tokens_may_follow(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    manager.append(sequence, 2, speculative=True)
    manager.append(sequence, 4, speculative=True)
    refused(
        manager,
        ValueError,
        lambda: manager.accept(sequence, 7),
        "counts=7: .* 6 speculative tokens",
    )
    manager.accept(sequence, 5)
    assert len(sequence) == 8


def test_plain_tokens_wait_until_speculative_tokens_are_decided(manager: BlockManager) -> None:
    sequence, other = manager.allocate(3), manager.allocate(3)
    manager.append(sequence, 2, speculative=True)
    for call in (
        lambda: manager.append(sequence, 1),
        lambda: manager.append(sequence, counts=0),
        lambda: manager.append([other, sequence], [1, 2]),
        lambda: manager.append(manager.batch([other, sequence]), 1),
    ):
        refused(manager, ValueError, call, "has speculative tokens")
    manager.append(other, 1)
    manager.accept(sequence, 0)
    manager.append([other, sequence], 1)


@pytest.mark.parametrize(
    ("counts", "tokens", "error"),
    [
        (3, None, ValueError),
        ([3, 0], None, ValueError),
        ([0, 0, 0], None, ValueError),
        (-1, None, ValueError),
        (2**31, None, ValueError),
        (2**70, None, (TypeError, ValueError)),
        (1.0, None, TypeError),
        (True, None, TypeError),
        (None, None, TypeError),
        ("1", None, TypeError),
        ([1, 1], [[1], []], ValueError),
        ([1, 1], [[1]], ValueError),
        ([1, 1], 1, ValueError),
        ([1, 1], [[1.0], [2.0]], TypeError),
        ([1, 1], [[2**31], [2]], ValueError),
        ([1, 1], ["a", "b"], TypeError),
    ],
)
def test_a_bad_accept_is_refused(manager: BlockManager, counts, tokens, error) -> None:
    sequences = [manager.allocate(range(3)), manager.allocate(3)]
    manager.append(sequences, 2, speculative=True)
    refused(manager, error, lambda: manager.accept(sequences, counts, tokens))


def test_accept_without_speculative_tokens_takes_none_only(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    manager.accept(sequence, 0)
    refused(manager, ValueError, lambda: manager.accept(sequence, 1))


def test_a_fork_has_its_own_speculative_tokens(manager: BlockManager) -> None:
    parent = manager.allocate(range(6))
    manager.append(parent, [6, 7, 8, 9], speculative=True)
    child = manager.fork(parent)
    manager.accept(parent, 4)
    refused(manager, ValueError, lambda: manager.append(child, 1), "has speculative tokens")
    manager.accept(child, 1)
    assert (len(parent), len(child)) == (10, 7)
    step = manager.append(child, [99])
    assert len(step.copies) == 1  # the parent still reads its own eighth token
    manager.commit([parent, child])
    assert manager.match_prefix([*range(8), 0]) == 8
    assert manager.match_prefix([*range(7), 99]) == 8
    manager.check()


def test_speculative_tokens_of_a_fork_get_its_own_block(manager: BlockManager) -> None:
    parent = manager.allocate(6)
    child = manager.fork(parent)
    step = manager.append(child, 1, speculative=True)
    assert len(step.copies) == 1
    manager.accept(child, 0)
    assert manager.block_tables(child)[0][1] != manager.block_tables(parent)[0][1]
    manager.check()


@pytest.mark.parametrize(("length", "left"), [(9, 3), (7, 1), (6, 0), (2, 0), (0, 0)])
def test_truncate_takes_speculative_tokens_first(
    manager: BlockManager, length: int, left: int
) -> None:
    sequence = manager.allocate(range(6))
    manager.append(sequence, 6, speculative=True)
    manager.truncate(sequence, length)
    refused(manager, ValueError, lambda: manager.accept(sequence, left + 1))
    manager.accept(sequence, left)
    assert len(sequence) == length
    manager.append(sequence, 1)
    manager.check()


def test_free_ends_speculative_tokens(manager: BlockManager) -> None:
    sequence = manager.allocate(6)
    manager.append(sequence, 6, speculative=True)
    manager.free(sequence)
    assert manager.num_free_blocks == 32
    manager.append(manager.allocate(1), 1)
    manager.check()


def test_a_refused_speculative_append_changes_nothing(manager: BlockManager) -> None:
    sequence = manager.allocate(100)
    refused(manager, OutOfBlocks, lambda: manager.append(sequence, 40, speculative=True))
    manager.append(sequence, 1)


def test_speculative_tokens_survive_a_swap(manager: BlockManager) -> None:
    sequence = manager.allocate(range(6))
    manager.append(sequence, list(range(6, 12)), speculative=True)
    manager.swap(sequence, "host")
    refused(manager, SequenceSwapped, lambda: manager.accept(sequence, 1))
    manager.swap(sequence, "device")
    manager.accept(sequence, 2)
    manager.commit(sequence)
    assert manager.match_prefix(range(12)) == 8
    manager.check()


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


def test_what_lost_its_front_is_not_offered(manager: BlockManager) -> None:
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


# -------------------------------------------------------------------- appended ids


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4, 5, 6, 7],
        (3, 4, 5, 6, 7),
        range(3, 8),
        np.arange(3, 8),
        np.arange(3, 8, dtype=np.int32),
        np.arange(3, 8, dtype=np.uint8),
        np.arange(3, 8, dtype=np.uint64),
        np.arange(3, 8, dtype=">i4"),
        np.arange(6, 16)[::2] // 2,
        [np.int64(n) for n in range(3, 8)],
    ],
)
def test_ids_may_come_in_many_forms(manager: BlockManager, ids) -> None:
    for wrap in (False, True):
        sequence = manager.allocate([int(wrap), 1, 2])
        step = manager.append([sequence] if wrap else sequence, [ids] if wrap else ids)
        assert len(step.slots) == 5
        manager.commit(sequence)
        assert manager.match_prefix([int(wrap), *range(1, 8)]) == 8


def test_an_iterator_of_ids_is_read_once(manager: BlockManager) -> None:
    sequences = [manager.allocate([0, 1, 2]), manager.allocate([9, 1, 2])]
    manager.append(sequences[0], iter([3]))
    manager.append(sequences[1:], iter([[3]]))
    manager.commit(iter(sequences))
    assert manager.match_prefix([0, 1, 2, 3]) == manager.match_prefix([9, 1, 2, 3]) == 4


@pytest.mark.parametrize(
    "ids", [[1, 2, 3], np.array([1, 2, 3]), np.array([[1], [2], [3]]), [[1], [2], [3]]]
)
def test_one_id_for_each_of_a_batch(manager: BlockManager, ids) -> None:
    sequences = [manager.allocate([0, 0, n]) for n in range(3)]
    manager.append(sequences, ids)
    manager.commit(sequences)
    assert [manager.match_prefix([0, 0, n, n + 1]) for n in range(3)] == [4, 4, 4]


def test_a_matrix_of_ids_goes_row_by_row(manager: BlockManager) -> None:
    sequences = [manager.allocate([n]) for n in range(3)]
    step = manager.append(sequences, np.arange(21).reshape(3, 7))
    assert len(step.slots) == 21
    manager.commit(sequences)
    for n in range(3):
        assert manager.match_prefix([n, *range(7 * n, 7 * n + 7)]) == 8


def test_ragged_ids_and_ids_mixed_with_lists(manager: BlockManager) -> None:
    sequences = [manager.allocate([n, n]) for n in range(4)]
    step = manager.append(sequences, [[], [5, 6], 7, np.arange(6)])
    assert manager.lengths(sequences).tolist() == [2, 4, 3, 8]
    expected = [manager.slots(one, 2) for one in sequences]
    assert step.slots.tolist() == np.concatenate(expected).tolist()
    manager.commit(sequences)
    assert manager.match_prefix([3, 3, *range(6)]) == 8


def test_int64_ids_that_fit_are_taken(manager: BlockManager) -> None:
    edge = [2**31 - 1, -(2**31), 0, 2**31 - 1]
    manager.commit(manager.allocate(np.array(edge, np.int64)))
    sequence = manager.allocate([1])
    manager.append(sequence, np.array(edge, np.int64))
    assert manager.match_prefix(edge) == 4


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([2**31], ValueError),
        ([-(2**31) - 1], ValueError),
        (np.array([2**40]), ValueError),
        (np.array([2**63], np.uint64), ValueError),
        ([2**70], (TypeError, ValueError)),
        ([1.0], TypeError),
        (np.array([1.0, 2.0]), TypeError),
        (np.array([True]), TypeError),
        ([True], TypeError),
        (["a"], TypeError),
        ("abc", TypeError),
        (b"abc", TypeError),
        ([None], TypeError),
        (np.array([[1]]), ValueError),
        (np.array(3), (TypeError, ValueError)),
        ([[1, 2], [3]], ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (-1, ValueError),
        (2**31, ValueError),
        (2**63, ValueError),
    ],
)
def test_bad_ids_or_counts_are_refused_and_change_nothing(manager, ids, error) -> None:
    sequence = manager.allocate([1, 2])
    refused(manager, error, lambda: manager.append(sequence, ids))
    pair = [sequence, manager.allocate(2)]
    if not isinstance(ids, int) and type(ids) is not np.ndarray:
        refused(manager, (TypeError, ValueError), lambda: manager.append(pair, [[4], ids]))


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        ([1], ValueError),
        ([1, 2, 3], ValueError),
        ([[1, 2]], ValueError),
        ([1, -1], ValueError),
        ([1, 2**31], ValueError),
        ([1, 2**63], (TypeError, ValueError)),
        ([1, 2**70], (TypeError, ValueError)),
        ([1.0, 2.0], TypeError),
        ([True, False], TypeError),
        (["1", "2"], TypeError),
        ("12", TypeError),
    ],
)
def test_bad_counts_are_refused_and_change_nothing(manager: BlockManager, counts, error) -> None:
    pair = [manager.allocate(3), manager.allocate(2)]
    refused(manager, error, lambda: manager.append(pair, counts=counts))


def test_zero_counts_change_nothing_and_one_count_is_broadcast(manager: BlockManager) -> None:
    pair = [manager.allocate(3), manager.fork(manager.allocate(6))]
    before = state_of(manager)
    step = manager.append(pair, counts=[0, 0])
    assert (len(step.slots), len(step.copies)) == (0, 0)
    assert len(manager.append(pair, counts=0).slots) == 0
    assert len(manager.append([], 1).slots) == 0
    assert same_state(state_of(manager), before)
    manager.append(pair, counts=np.uint8(5))
    assert manager.lengths(pair).tolist() == [8, 11]


def test_lengths_and_counts_beyond_the_end_are_refused(manager: BlockManager) -> None:
    sequence, other = manager.allocate(5), manager.allocate(9)
    for bad in (6, 2**31 - 1, 2**31, -1, 2**70):
        refused(manager, ValueError, lambda bad=bad: manager.commit(sequence, bad))
        refused(manager, ValueError, lambda bad=bad: manager.commit([other, sequence], bad))
        refused(manager, ValueError, lambda bad=bad: manager.truncate(sequence, bad))
    for bad in (1.0, True, "1"):
        refused(manager, TypeError, lambda bad=bad: manager.commit(sequence, bad))
        refused(manager, TypeError, lambda bad=bad: manager.truncate(sequence, bad))


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
