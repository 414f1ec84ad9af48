"""The token ids and counts that `append` accepts."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import BlockManager
from tests.support.manager_state import refused, same_state, state_of


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=32, block_size=4, num_host_blocks=16)


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
