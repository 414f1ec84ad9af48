"""Speculative tokens: appended, accepted or dropped."""

from __future__ import annotations

import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.errors import SequenceSwapped
from tests.support.manager_state import refused


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=32, block_size=4, num_host_blocks=16)


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
