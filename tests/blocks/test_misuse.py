"""Invalid calls of the block manager: each is refused and changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError, OutOfBlocks
from kvpager.errors import BrokenInvariant, SequenceSwapped, StaleSequence


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4, num_host_blocks=4)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, s: m.append(s, 1),
        lambda m, s: m.fork(s),
        lambda m, s: m.free(s),
        lambda m, s: m.commit(s),
        lambda m, s: m.truncate(s, 0),
        lambda m, s: m.swap(s, "host"),
        lambda m, s: m.block_tables(s)[0],
        lambda m, s: m.block_tables([s]),
        lambda m, s: m.batch([s]),
        lambda m, s: m.slots(s),
        lambda m, s: len(s),
    ],
)
def test_a_stale_or_foreign_handle_is_refused_at_the_call(manager: BlockManager, use) -> None:
    sequence = manager.allocate(5)
    manager.free(sequence)
    manager.allocate(5)  # takes the same row again
    before = manager.stats()
    with pytest.raises(StaleSequence, match=r"^SequenceHandle \d+\.\d+ .*was freed"):
        use(manager, sequence)
    if use.__code__.co_names != ("len",):
        foreign = BlockManager(8, 4).allocate(5)
        with pytest.raises(StaleSequence, match="another manager"):
            use(manager, foreign)
    assert manager.stats() == before
    assert "freed" in repr(sequence)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks=0: expected at least 1"),
        ({"num_blocks": 2.5}, TypeError, "expected an int"),
        ({"num_blocks": 4, "block_size": 0}, ValueError, "block_size=0"),
        ({"num_blocks": 4, "block_size": 12}, ValueError, "power of two"),
        ({"num_blocks": 4, "num_host_blocks": -1}, ValueError, "num_host_blocks=-1"),
        ({"num_blocks": True}, TypeError, "num_blocks=True"),
    ],
)
def test_a_bad_size_is_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        BlockManager(**arguments)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-1, ValueError),
        (2.0, TypeError),
        ("abc", TypeError),
        (True, TypeError),
        ([1.5], TypeError),
        ([[1, 2]], ValueError),
        ([2**31], ValueError),
        ([None], TypeError),
        (None, (TypeError, ValueError)),
    ],
)
def test_a_bad_prompt_is_refused_and_changes_nothing(manager: BlockManager, bad, error) -> None:
    before = manager.stats()
    with pytest.raises(error):
        manager.allocate(bad)
    assert manager.stats() == before


@pytest.mark.parametrize(
    "bad",
    [{"tokens": -1}, {"tokens": "ab"}, {"tokens": [1]}, {"tokens": [1.5, 2.5]},
     {"counts": [1]}, {"counts": [-1, 1]}, {"tokens": 2, "counts": [1, 1]}, {"tokens": None}],
)  # fmt: skip
def test_a_bad_append_is_refused_and_changes_nothing(manager: BlockManager, bad) -> None:
    sequences = [manager.allocate(3), manager.allocate(3)]
    before = manager.stats()
    with pytest.raises((ValueError, TypeError)):
        manager.append(sequences, **bad)
    assert manager.stats() == before


def test_other_bad_arguments_are_refused(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    with pytest.raises(TypeError, match="namespace=7"):
        manager.allocate([1], namespace=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a SequenceHandle"):
        manager.free([7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="the sequence has 3 tokens only"):
        manager.truncate(sequence, 4)
    with pytest.raises(ValueError, match="the sequence has 3 tokens only"):
        manager.commit(sequence, 4)
    with pytest.raises(ValueError, match="expected at least 8"):
        manager.grow(7)


def test_errors_share_one_base() -> None:
    for error in (OutOfBlocks, StaleSequence, SequenceSwapped, BrokenInvariant):
        assert issubclass(error, KVPagerError)


@pytest.mark.parametrize("huge", [2**31, 2**40, 2**63 - 1, 2**64 - 2, 2**70])
def test_numbers_too_large_are_refused_before_anything_changes(
    manager: BlockManager, huge: int
) -> None:
    sequence = manager.allocate(5)
    before = manager.stats()
    for operation in (
        lambda: manager.append(sequence, huge),
        lambda: manager.append([sequence], counts=[huge]),
        lambda: manager.truncate(sequence, huge),
        lambda: manager.slots(sequence, huge),
        lambda: manager.fork(sequence, huge),
        lambda: manager.drop_before(sequence, huge),
        lambda: manager.allocate(huge),
    ):
        with pytest.raises((ValueError, TypeError)):
            operation()
    assert manager.stats() == before
    manager.check()


def test_numpy_numbers_do_not_wrap_around() -> None:
    manager = BlockManager(np.uint8(100), np.uint8(4))
    sequence = manager.allocate(np.uint8(200))
    manager.truncate(sequence, np.uint8(5))
    assert manager.slots(sequence, np.uint8(1), np.uint8(4)).shape == (3,)
    manager.grow(np.uint8(200))
    manager.allocate(np.int16(700))
    manager.check()


def test_what_takes_one_sequence_refuses_several(manager: BlockManager) -> None:
    pair = [manager.allocate(5), manager.allocate(6)]
    for operation in (
        manager.fork,
        manager.slots,
        lambda sequences: manager.truncate(sequences, 1),
    ):
        for several in (pair, manager.batch(pair)):
            with pytest.raises(TypeError, match="expected a SequenceHandle"):
                operation(several)
    assert manager.lengths(pair).tolist() == [5, 6]


def test_a_generator_that_frees_a_sequence_changes_nothing_else(manager: BlockManager) -> None:
    first, second = manager.allocate(4), manager.allocate(4)

    def ids():
        yield 1
        manager.free(second)
        yield 2

    with pytest.raises(StaleSequence):
        manager.append([first, second], ids())
    assert len(first) == 4
    manager.check()


def test_a_batch_of_another_manager_is_refused(manager: BlockManager) -> None:
    other = BlockManager(8, 4)
    batch = other.batch([other.allocate(3)])
    manager.allocate(3)
    with pytest.raises(StaleSequence, match="another manager"):
        manager.append(batch, 1)


def test_out_of_blocks_survives_pickling_and_copying() -> None:
    error = OutOfBlocks(3, 1, 0, 8, "host", "raise num_host_blocks")
    copied = copy.copy(error)
    assert str(copied) == str(error)
    assert (copied.need, copied.free, copied.tier) == (3, 1, "host")


def test_every_verb_but_swap_and_free_refuses_a_swapped_sequence(manager: BlockManager) -> None:
    sequence = manager.allocate(5)
    manager.swap(sequence, "host")
    for operation in (
        lambda: manager.truncate(sequence, 1),
        lambda: manager.drop_before(sequence, 1),
        lambda: manager.append([sequence], 1),
    ):
        with pytest.raises(SequenceSwapped):
            operation()
    manager.check()
