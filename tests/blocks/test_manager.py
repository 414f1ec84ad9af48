"""The block manager's promises, one behaviour a test."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError, OutOfBlocks
from kvpager.blocks.sequences import Batch, SequenceHandle
from kvpager.blocks.stats import BlockStatus
from kvpager.errors import BrokenInvariant, SequenceSwapped, StaleSequence


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4, num_host_blocks=4)


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def committed(
    manager: BlockManager, ids: list[int], namespace: str | None = None
) -> SequenceHandle:
    sequence = manager.allocate(ids, namespace=namespace)
    manager.commit(sequence)
    return sequence


# -------------------------------------------------------------------- allocate


def test_a_sequence_gets_one_block_per_block_size_tokens(manager: BlockManager) -> None:
    assert len(manager.block_tables(manager.allocate(9))[0]) == 3
    assert manager.stats().num_held == 3


def test_the_whole_pool_can_be_allocated(manager: BlockManager) -> None:
    table = manager.block_tables(manager.allocate(32))[0]
    assert sorted(table.tolist()) == list(range(8))
    assert table.dtype == np.int32


def test_an_empty_sequence_holds_nothing_and_can_grow(manager: BlockManager) -> None:
    sequence = manager.allocate([])
    assert len(sequence) == 0
    assert bool(sequence)
    assert manager.append(sequence, 1).slots.shape == (1,)


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


# -------------------------------------------------------------------- prefix reuse


def test_a_known_prefix_is_shared_except_the_last_token(manager: BlockManager) -> None:
    first = committed(manager, prompt(8))
    second = manager.allocate(prompt(8))
    # The second block is needed for one more token than may be reused: it is copied in part.
    assert second.num_cached_tokens == 7
    assert manager.block_tables(second)[0][0] == manager.block_tables(first)[0][0]
    assert second.copies.tolist() == [
        [manager.block_tables(first)[0][1], manager.block_tables(second)[0][1]]
    ]


def test_a_longer_prompt_shares_all_full_blocks_of_the_shorter(manager: BlockManager) -> None:
    first = committed(manager, prompt(8))
    second = manager.allocate(prompt(10))
    assert second.num_cached_tokens == 8
    assert len(second.copies) == 0
    assert manager.block_tables(second)[0][:2].tolist() == manager.block_tables(first)[0].tolist()
    assert manager.stats().num_shared == 2


def test_a_match_may_end_inside_a_block(manager: BlockManager) -> None:
    committed(manager, prompt(8))
    second = manager.allocate([0, 1, 2, 3, 4, 5, 99, 98])
    assert second.num_cached_tokens == 6
    assert second.copies.shape == (1, 2)


def test_nothing_is_reusable_before_commit(manager: BlockManager) -> None:
    sequence = manager.allocate(prompt(8))
    assert manager.allocate(prompt(8)).num_cached_tokens == 0
    manager.commit(sequence, 4)
    assert manager.allocate(prompt(8)).num_cached_tokens == 4


def test_an_open_block_is_not_reusable(manager: BlockManager) -> None:
    committed(manager, prompt(6))
    assert manager.allocate(prompt(6)).num_cached_tokens == 4


def test_namespaces_never_hit_each_others_blocks(manager: BlockManager) -> None:
    committed(manager, prompt(4), "acme")
    assert manager.allocate(prompt(5), namespace="acme").num_cached_tokens == 4
    assert manager.allocate(prompt(5)).num_cached_tokens == 0
    assert manager.allocate(prompt(5), namespace="acm").num_cached_tokens == 0


def test_appended_ids_extend_what_can_be_reused(manager: BlockManager) -> None:
    sequence = committed(manager, prompt(3))
    manager.append(sequence, [3])
    manager.append([sequence], [[4, 5, 6, 7]])
    manager.commit(sequence)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


def test_tokens_of_unknown_id_end_what_can_be_reused(manager: BlockManager) -> None:
    sequence = committed(manager, prompt(4))
    manager.append(sequence, 4)
    manager.append(sequence, [8, 9, 10, 11])
    manager.commit(sequence)
    assert manager.allocate([*prompt(12), 99]).num_cached_tokens == 4


def test_a_freed_prompt_stays_cached_until_its_room_is_needed(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(16)))
    assert manager.stats().num_cached == 4
    assert manager.allocate(prompt(13)).num_cached_tokens == 12
    manager.check()
    other = manager.allocate(16)
    assert manager.stats().num_cached == 0
    assert manager.stats().total_evicted == 1
    assert len(manager.block_tables(other)[0]) == 4


def test_the_least_recently_used_prefix_is_evicted_from_its_tail(
    manager: BlockManager,
) -> None:
    manager.free(committed(manager, prompt(16)))
    manager.free(committed(manager, prompt(16, first=100)))
    manager.free(manager.allocate(prompt(16)))  # used again
    manager.allocate(8)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8
    manager.check()


def test_equal_prompts_keep_their_blocks_and_one_is_published(
    manager: BlockManager,
) -> None:
    first, second = manager.allocate(prompt(8)), manager.allocate(prompt(8))
    manager.commit([first, second])
    manager.check()
    assert not set(manager.block_tables(first)[0]) & set(manager.block_tables(second)[0])
    manager.free(first)
    manager.check()
    manager.append(second, prompt(4, first=8))
    manager.commit(second)
    assert manager.allocate(prompt(13)).num_cached_tokens == 12
    manager.check()


def test_a_duplicate_publishes_its_own_blocks_after_eviction(manager: BlockManager) -> None:
    first, second = manager.allocate(prompt(4)), manager.allocate(prompt(4))
    manager.commit([first, second])
    manager.free(first)
    manager.clear_prefix_cache()
    manager.append(second, prompt(4, first=4))
    manager.commit(second)
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


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


def test_slide_gives_back_the_blocks_behind_a_window(manager: BlockManager) -> None:
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


# -------------------------------------------------------------------- misuse


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
    with pytest.raises(StaleSequence, match="was freed"):
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


# -------------------------------------------------------------------- the rest


def test_a_grown_pool_keeps_its_sequences(manager: BlockManager) -> None:
    sequence = manager.allocate(32)
    table = manager.block_tables(sequence)[0]
    manager.grow(10)
    manager.append(sequence, 8)
    assert manager.block_tables(sequence)[0][:8].tolist() == table.tolist()
    manager.check()


def test_check_names_the_broken_law(manager: BlockManager) -> None:
    block = manager.block_tables(manager.allocate(4))[0][0]
    manager._state.pool.refs[block] = 2
    with pytest.raises(BrokenInvariant, match=f"block {block}: refcount 2, but 1 tables hold it"):
        manager.check()


def test_empty_namespaces_leave_nothing_behind(manager: BlockManager) -> None:
    for tenant in range(20):
        manager.free(committed(manager, prompt(4), f"tenant {tenant}"))
    manager.clear_prefix_cache()
    assert manager._state.forest.roots == {}


def test_threads_share_a_manager_without_losing_a_block() -> None:
    manager = BlockManager(num_blocks=64, block_size=4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            random = np.random.default_rng(seed)
            for _ in range(200):
                sequence = manager.allocate(random.integers(0, 2, 9))
                child = manager.fork(sequence)
                manager.append([sequence, child], 3)
                manager.commit(child)
                manager.free([child, sequence])
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    manager.check()
    stats = manager.stats()
    assert stats.num_free + stats.num_cached == 64


def test_errors_share_one_base() -> None:
    for error in (OutOfBlocks, StaleSequence, SequenceSwapped, BrokenInvariant):
        assert issubclass(error, KVPagerError)


def test_the_control_plane_never_imports_torch() -> None:
    code = "import sys, kvpager.blocks.manager; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_slide_takes_a_start_for_each_sequence(manager: BlockManager) -> None:
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


# -------------------------------------------------------------------- at the edges


def test_a_prompt_that_fits_an_idle_pool_is_never_refused() -> None:
    manager = BlockManager(4, 4)
    manager.free(committed(manager, prompt(16)))
    sequence = manager.allocate(prompt(16))  # shares 3 blocks, and needs the fourth one's room
    assert sequence.num_cached_tokens == 15
    manager.check()


def test_a_refused_allocation_does_not_count_as_use() -> None:
    manager = BlockManager(4, 4)
    manager.free(committed(manager, prompt(4)))
    manager.free(committed(manager, prompt(4, first=100)))
    held = manager.allocate(8)
    with pytest.raises(OutOfBlocks):
        manager.allocate([*prompt(4), *prompt(12, first=50)])
    manager.append(held, 1)  # evicts the prompt that was really used longest ago
    assert manager.allocate([*prompt(3, first=100)]).num_cached_tokens == 2
    manager.check()


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


def test_foreign_handles_do_not_deadlock_two_managers() -> None:
    managers = [BlockManager(8, 4), BlockManager(8, 4)]
    handles = [manager.allocate(3) for manager in managers]

    def work(mine: int) -> None:
        for _ in range(300):
            with pytest.raises(StaleSequence):
                managers[mine].append(handles[1 - mine], 1)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_out_of_blocks_survives_pickling_and_copying() -> None:
    error = OutOfBlocks(3, 1, 0, 8, "host", "raise num_host_blocks")
    copied = copy.copy(error)
    assert str(copied) == str(error)
    assert (copied.need, copied.free, copied.tier) == (3, 1, "host")


def test_using_a_prompt_again_and_again_costs_no_memory(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(9)))
    for _ in range(1000):
        manager.free(manager.allocate(prompt(9)))
    assert len(manager._state.evictor._queues[0]._heap) < 100
    manager.check()


def test_a_prefix_is_published_again_after_its_duplicate_was_evicted(manager: BlockManager) -> None:
    first, second = manager.allocate(prompt(8)), manager.allocate(prompt(8))
    manager.commit([first, second])
    manager.free(first)
    manager.clear_prefix_cache()
    manager.commit(second)
    assert manager.allocate(prompt(9)).num_cached_tokens == 8
    manager.check()


def test_ids_after_unknown_tokens_are_not_taken_for_their_neighbours(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, prompt(4))
    manager.append(sequence, 4)
    manager.append(sequence, [8, 9, 10, 11])
    manager.commit(sequence)
    assert manager.allocate([0, 1, 2, 3, 8, 9, 10, 11, 99]).num_cached_tokens == 4


def test_a_published_block_keeps_its_tokens_when_its_sequence_changes(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, prompt(8))
    child = manager.fork(sequence)
    manager.truncate(sequence, 4)
    manager.append(sequence, [90, 91, 92, 93])
    manager.append(child, [8])
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 8


def test_appending_nothing_copies_nothing(manager: BlockManager) -> None:
    parent = manager.allocate(6)
    child = manager.fork(parent)
    assert len(manager.append([parent, child], counts=0).copies) == 0
    assert len(manager.append([parent, child], counts=[0, 0]).slots) == 0


def test_a_fork_of_a_slid_sequence_is_not_offered_either(manager: BlockManager) -> None:
    sequence = manager.allocate(prompt(8))
    manager.drop_before(sequence, 4)
    child = manager.fork(sequence)
    manager.commit([sequence, child])
    manager.check()
    assert manager.allocate(prompt(9)).num_cached_tokens == 0


def test_a_slid_sequence_swaps_what_it_still_has(manager: BlockManager) -> None:
    sequence = manager.allocate(12)
    manager.drop_before(sequence, 5)
    plan = manager.swap(sequence, "host")
    assert len(plan) == 2
    assert plan.copies.min() >= 0
    manager.check()
    manager.swap(sequence, "device")
    assert manager.block_tables(sequence)[0][0] == -1
    manager.check()


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


def put(manager: BlockManager, sequence: SequenceHandle, column: int, block: int) -> None:
    """Overwrite an entry of a block table."""
    manager._state.rows.tables.row(sequence._row)[column] = block


BREAK = {
    "refcount": lambda m, s: m._state.pool.refs.__setitem__(m.block_tables(s)[0][0], 2),
    "evictable count": lambda m, s: setattr(m._state.pool, "num_evictable", 2),
    "free twice": lambda m, s: m._state.pool._stack.__setitem__(
        slice(0, 2), m._state.pool._stack[0]
    ),
    "free and used": lambda m, s: m._state.pool._stack.__setitem__(0, m.block_tables(s)[0][0]),
    "bump pointer": lambda m, s: setattr(m._state.pool, "_num_used_ever", 1),
    "held back": lambda m, s: m._state.pool.holds.__setitem__(0, 1),
    "pins": lambda m, s: m._state.fences.pins.popitem(),
    "length": lambda m, s: m._state.rows.lengths.__setitem__(s._row, 40),
    "committed": lambda m, s: m._state.rows.committed.__setitem__(s._row, 99),
    "speculative tokens": lambda m, s: m._state.rows.speculative.__setitem__(s._row, 4),
    "rows with speculative tokens": lambda m, s: setattr(m._state.rows, "num_speculating", 3),
    "hole": lambda m, s: put(m, s, 0, -1),
    "twice": lambda m, s: put(m, s, 0, m.block_tables(s)[0][1]),
    "no such block": lambda m, s: put(m, s, 0, 99),
    "stray": lambda m, s: put(m, s, 3, 1),
    "free row": lambda m, s: m._state.rows.free_rows.append(s._row),
    "swapped": lambda m, s: put(m, s, 2, -2),
    "published": lambda m, s: m._state.rows.published.__setitem__(s._row, 3),
    "knows too much": lambda m, s: m._state.rows.known.__setitem__(s._row, 16),
    "other tokens": lambda m, s: m._state.pool.ids.__setitem__((m.block_tables(s)[0][0], 0), 55),
    "namespace": lambda m, s: setattr(m._state.rows.nodes[s._row], "tree", ("acme", None)),
    "run's start": lambda m, s: setattr(m._state.rows.nodes[s._row], "start", 7),
    "run's end": lambda m, s: setattr(m._state.rows.nodes[s._row], "end", 1),
    "run's parent": lambda m, s: setattr(m._state.rows.nodes[s._row], "parent", None),
    "look-up": lambda m, s: m._state.forest.node_of.__setitem__(m.block_tables(s)[0][0], 9),
    "cached flag": lambda m, s: m._state.pool.cached.__setitem__(m.block_tables(s)[0][0], False),
    "never evicted": lambda m, s: m._state.evictor._queues[0].ranks.clear(),
    "quota": lambda m, s: setattr(m._state.accounts._accounts[1], "used", 7),
    "host refcount": lambda m, s: m._state.host.refs.__setitem__(0, 1),
}


@pytest.mark.parametrize("damage", BREAK)
def test_check_sees_every_kind_of_damage(damage: str) -> None:
    manager = BlockManager(12, 4, num_host_blocks=4)
    others = [manager.allocate(4) for _ in range(3)]
    manager.free(committed(manager, prompt(4, first=60)))
    sequence = committed(manager, prompt(10))
    manager.pins.pin(sequence)
    manager.quotas.set("acme", floor=1)
    manager.free(others)
    manager.check()
    BREAK[damage](manager, sequence)
    with pytest.raises(BrokenInvariant):
        manager.check()


def test_a_prompt_leaves_from_its_end(manager: BlockManager) -> None:
    manager.free(committed(manager, prompt(12)))
    held = manager.allocate(24)  # evicts one of the three
    assert len(manager.block_tables(held)[0]) == 6
    manager.truncate(held, 20)
    assert manager.allocate(prompt(13)[:9]).num_cached_tokens == 8


def test_a_sequence_republishes_after_its_namespace_was_emptied() -> None:
    manager = BlockManager(6, 4)
    duplicate = manager.allocate(prompt(8), namespace="acme")
    manager.free(committed(manager, prompt(8), "acme"))
    manager.commit(duplicate, 0)
    manager.clear_prefix_cache()
    manager.commit(duplicate)
    manager.check()
    assert manager.allocate(prompt(9), namespace="acme").num_cached_tokens == 8
