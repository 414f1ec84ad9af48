"""How much there is, who may have it, what stays, and what is told about it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError, OutOfBlocks
from kvpager.blocks.events import Event
from kvpager.blocks.policies import Priority
from kvpager.blocks.quotas import Quota
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.stats import BlockStatus, Metrics
from kvpager.errors import OutOfQuota, SequenceSwapped, StaleSequence
from kvpager.plans import Plan, Step
from tests.support.manager_state import handles_of
from tests.support.twins import twin_of

A, B, C, D, E = ([first + i for i in range(4)] for first in range(10, 60, 10))  # a block each


def committed(
    manager: BlockManager, ids: list[int], namespace: str | None = None
) -> SequenceHandle:
    sequence = manager.allocate(ids, namespace=namespace)
    manager.commit(sequence)
    return sequence


def cache(manager: BlockManager, ids: list[int], namespace: str | None = None) -> None:
    manager.free(committed(manager, ids, namespace))


def press(manager: BlockManager, namespace: str | None = None) -> None:
    """Take every available block, one by one, and release them."""
    taken = list[SequenceHandle]()
    with suppress(OutOfBlocks):
        while True:
            taken.append(manager.allocate(1, namespace=namespace))
    manager.check()
    manager.free(taken)


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


# -------------------------------------------------------------------- fences


def fenced(num_blocks: int = 6, num_host_blocks: int = 6) -> BlockManager:
    return BlockManager(num_blocks, 4, num_host_blocks, fences=True)


def all_that_can_be_had(manager: BlockManager) -> set[int]:
    """Every device block that the manager is willing to hand out, evicting what it may."""
    taken = list[SequenceHandle]()
    with suppress(OutOfBlocks):
        while True:
            taken.append(manager.allocate(1))
    manager.check()
    blocks = {int(manager.block_tables(one)[0][0]) for one in taken}
    manager.free(taken)
    return blocks


def test_a_block_swapped_out_is_kept_until_complete() -> None:
    manager = fenced()
    plan = manager.swap(manager.allocate(8), "host")
    manager.check()
    assert manager.stats().num_kept == 2
    assert not all_that_can_be_had(manager) & set(plan.copies[:, 0].tolist())
    manager.copies.complete(plan)
    manager.check()
    assert manager.stats().num_kept == 0
    assert all_that_can_be_had(manager) == set(range(6))


def test_a_host_block_swapped_in_is_kept_until_complete() -> None:
    manager = fenced(num_host_blocks=2)
    sequence, other = manager.allocate(8), manager.allocate(8)
    manager.copies.complete(manager.swap(sequence, "host"))
    back = manager.swap(sequence, "device")
    with pytest.raises(OutOfBlocks, match="need 2 host blocks, 0 free"):
        manager.swap(other, "host")
    manager.copies.complete(back)
    assert len(manager.swap(other, "host")) == 2
    manager.check()


def test_the_source_of_a_copy_on_write_stays_until_complete() -> None:
    manager = fenced()
    parent = manager.allocate(6)
    child = manager.fork(parent)
    step = manager.append(child, 1)
    source = int(step.copies[0, 0])
    manager.free(parent)
    manager.check()
    assert manager.queries.block_statuses()[source] == BlockStatus.KEPT
    assert source not in all_that_can_be_had(manager)
    manager.copies.complete(step)
    assert source in all_that_can_be_had(manager)


def test_the_source_of_a_partial_match_is_kept_until_complete() -> None:
    manager = fenced(4)
    cache(manager, A + B)
    hit = manager.allocate(A + B[:2] + [99])
    source = int(hit.copies[0, 0])
    manager.check()
    assert hit.num_cached_tokens == 6
    assert source not in all_that_can_be_had(manager)
    assert manager.match_prefix(A + B) == 8
    manager.copies.complete(hit)
    manager.check()
    assert source in all_that_can_be_had(manager)
    assert manager.match_prefix(A + B) == 4  # the first block is held by the hit


def test_a_partial_match_without_room_for_its_source_is_refused() -> None:
    manager = fenced(2)
    cache(manager, A + B)
    before = manager.stats()
    with pytest.raises(OutOfBlocks):
        manager.allocate(A + B[:2] + [99])
    assert manager.stats() == before
    manager.check()


@pytest.mark.parametrize("copy", ["swap", "step", "match"])
def test_freeing_during_a_copy_keeps_source_and_destination(copy: str) -> None:
    manager = fenced()
    cache(manager, A)
    sequence = manager.allocate(6)
    work: object
    if copy == "swap":
        work = manager.swap(sequence, "host")
        manager.free(sequence)
    elif copy == "step":
        child = manager.fork(sequence)
        work = manager.append(child, 1)
        manager.free([sequence, child])
    else:
        work = manager.allocate([*A[:3], 99])
        manager.free(sequence)
        manager.free(work)
    manager.check()
    copies = work.copies  # type: ignore[attr-defined]
    if copy == "swap":
        assert not all_that_can_be_had(manager) & set(copies[:, 0].tolist())
        assert manager.stats().num_host_free == 4
    else:
        assert not all_that_can_be_had(manager) & set(copies.ravel().tolist())
    manager.copies.complete(work)  # type: ignore[arg-type]
    manager.check()
    assert manager.stats().num_host_free == 6
    assert all_that_can_be_had(manager) == set(range(6))


def test_a_block_in_two_copies_stays_until_both_are_complete() -> None:
    manager = fenced()
    parent = manager.allocate(6)
    steps = [manager.append(child, 1) for child in manager.fork(parent, 2)]
    source = int(steps[0].copies[0, 0])
    assert source == steps[1].copies[0, 0]
    manager.free(parent)
    manager.copies.complete(steps[1])
    manager.check()
    assert source not in all_that_can_be_had(manager)
    manager.copies.complete(steps[0])
    assert source in all_that_can_be_had(manager)


def test_completing_twice_is_refused() -> None:
    manager = fenced()
    plan = manager.swap(manager.allocate(8), "host")
    manager.copies.complete(plan)
    with pytest.raises(ValueError, match="completed already, or of another manager"):
        manager.copies.complete(plan)
    manager.check()


def test_a_ticket_that_was_never_given_is_refused() -> None:
    manager = fenced()
    plan = manager.swap(manager.allocate(8), "host")
    with pytest.raises(ValueError, match="another manager"):
        manager.copies.complete(Plan(plan.copies, "device", "host", plan.ticket + 1))
    manager.check()
    manager.copies.complete(plan)


def test_what_copies_nothing_has_nothing_to_complete() -> None:
    manager = fenced()
    sequence = manager.allocate(5)
    step = manager.append(sequence, 1)
    assert sequence.ticket == step.ticket == 0
    for work in (sequence, step, sequence, step):
        manager.copies.complete(work)
    manager.check()


def test_without_fences_complete_does_nothing() -> None:
    manager = BlockManager(6, 4, 6)
    plan = manager.swap(manager.allocate(8), "host")
    assert plan.ticket == 0
    assert manager.stats().num_kept == 0
    before = manager.stats()
    manager.copies.complete(plan)
    manager.copies.complete(plan)
    assert manager.stats() == before


def test_shrinking_waits_for_copies_beyond() -> None:
    manager = fenced(8)
    low, high = manager.allocate(16), manager.allocate(8)
    plan = manager.swap(high, "host")
    manager.free(low)
    with pytest.raises(ValueError, match="unfinished copy"):
        manager.shrink(4)
    manager.copies.complete(plan)
    manager.shrink(4)
    manager.check()


def test_where_a_block_moved_by_shrinking_arrives_stays_until_complete() -> None:
    manager = fenced(8)
    low, high = manager.allocate(16), manager.allocate(8)
    manager.free(low)
    plan = manager.shrink(4)
    manager.free(high)
    assert not all_that_can_be_had(manager) & set(plan.copies[:, 1].tolist())
    manager.copies.complete(plan)
    assert all_that_can_be_had(manager) == set(range(4))


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("seed", range(6))
def test_a_late_swap_reads_the_bytes_it_was_planned_for(seed: int) -> None:
    random = np.random.default_rng(seed)
    manager = BlockManager(12, 4, 8, fences=True)
    writes = np.zeros(12, int)  # the number of writes into each block
    live, swapped = list[SequenceHandle](), set[SequenceHandle]()
    pending = list[tuple[Plan | Step | SequenceHandle, list[int]]]()

    def begin(work: Plan | Step | SequenceHandle) -> None:
        if work.ticket:
            out = isinstance(work, Plan) and work.destination == "host"
            pending.append((work, writes[work.copies[:, 0]].tolist() if out else []))

    def complete(number: int) -> None:
        work, before = pending.pop(number)
        if before:
            assert writes[work.copies[:, 0]].tolist() == before
        manager.copies.complete(work)

    for _ in range(300):
        here = [s for s in live if s not in swapped]
        choice = random.integers(7)
        try:
            if choice <= 1:
                ids = random.integers(0, 2, random.integers(1, 14)).tolist()
                live.append(committed(manager, ids))
                begin(live[-1])
                num_shared = live[-1].num_cached_tokens // 4
                writes[manager.block_tables(live[-1])[0][num_shared:]] += 1
            elif choice == 2 and here:
                begin(step := manager.append(here, [[0]] * len(here)))
                writes[step.slots // 4] += 1
            elif choice == 3 and here:
                live.append(manager.fork(here[random.integers(len(here))]))
            elif choice == 4 and live:
                swapped.discard(gone := live.pop(random.integers(len(live))))
                manager.free(gone)
            elif choice == 5 and live:
                one = live[random.integers(len(live))]
                begin(plan := manager.swap(one, "device" if one in swapped else "host"))
                if one in swapped:
                    writes[plan.copies[:, 1]] += 1
                swapped ^= {one}
            elif pending:
                complete(random.integers(len(pending)))
        except OutOfBlocks:
            pass
        manager.check()
    while pending:
        complete(0)
        manager.check()
    manager.free(live)
    assert (manager.stats().num_kept, manager.stats().num_host_free) == (0, 8)


# -------------------------------------------------------------------- pin


def test_a_pinned_prefix_survives_any_pressure() -> None:
    manager = BlockManager(6, 4)
    sequence = committed(manager, A + B)
    manager.pins.pin(sequence)
    manager.free(sequence)
    for prompt in (C, D, E):
        cache(manager, prompt)
    press(manager)
    assert manager.clear_prefix_cache() == 0
    assert manager.match_prefix(A + B) == 8
    assert manager.stats().num_kept == 2
    manager.check()


def test_an_unpinned_prefix_can_leave_again() -> None:
    manager = BlockManager(6, 4)
    sequence = committed(manager, A + B)
    ticket = manager.pins.pin(sequence)
    manager.free(sequence)
    manager.pins.unpin(ticket)
    manager.check()
    assert manager.stats().num_cached == 2
    assert manager.clear_prefix_cache() == 2


def test_a_prefix_pinned_twice_stays_until_both_pins_end() -> None:
    manager = BlockManager(6, 4)
    sequence = committed(manager, A)
    tickets = [manager.pins.pin(sequence), manager.pins.pin(manager.fork(sequence))]
    manager.free(list(handles_of(manager).values()))
    manager.pins.unpin(tickets[0])
    press(manager)
    assert manager.match_prefix(A) == 4
    manager.pins.unpin(tickets[1])
    press(manager)
    assert manager.match_prefix(A) == 0
    manager.check()


def test_what_is_published_after_the_pin_is_not_pinned() -> None:
    manager = BlockManager(6, 4)
    sequence = committed(manager, A)
    manager.pins.pin(sequence)
    manager.append(sequence, B)
    manager.commit(sequence)
    manager.free(sequence)
    press(manager)
    assert manager.match_prefix(A + B) == 4


def test_a_pinned_block_is_shared_and_released_normally() -> None:
    manager = BlockManager(6, 4)
    sequence = committed(manager, A)
    manager.pins.pin(sequence)
    hit = manager.allocate(A + B)
    manager.free([sequence, hit])
    manager.check()
    assert manager.queries.block_statuses().tolist().count(BlockStatus.KEPT) == 1


def test_unpinning_twice_or_by_a_wrong_ticket_is_refused() -> None:
    manager = BlockManager(6, 4)
    ticket = manager.pins.pin(committed(manager, A))
    manager.pins.unpin(ticket)
    for wrong in (ticket, ticket + 1, 0, -1):
        with pytest.raises(ValueError, match="not a pin of this manager, or ended already"):
            manager.pins.unpin(wrong)
    manager.check()


def test_a_copys_ticket_is_no_pin() -> None:
    manager = fenced()
    plan = manager.swap(manager.allocate(8), "host")
    with pytest.raises(ValueError, match="not a pin"):
        manager.pins.unpin(plan.ticket)
    ticket = manager.pins.pin(committed(manager, A))
    with pytest.raises(ValueError, match="completed already"):
        manager.copies.complete(Plan(plan.copies, "device", "host", ticket))
    manager.check()


def test_only_a_live_sequence_on_the_device_can_be_pinned() -> None:
    manager = BlockManager(6, 4, 6)
    freed, swapped = committed(manager, A), committed(manager, B)
    manager.free(freed)
    manager.swap(swapped, "host")
    for sequence, error in ((freed, StaleSequence), (swapped, SequenceSwapped)):
        with pytest.raises(error):
            manager.pins.pin(sequence)
        with pytest.raises(error):
            manager.pins.retain(sequence, 1)


# -------------------------------------------------------------------- retain


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ranked(clock: Clock) -> BlockManager:
    return BlockManager(6, 4, eviction=Priority(6, clock=clock))


def retained(
    manager: BlockManager, ids: list[int], priority: int, ttl_s: float | None = None
) -> None:
    sequence = committed(manager, ids)
    manager.pins.retain(sequence, priority, ttl_s)
    manager.free(sequence)


def order_of_leaving(manager: BlockManager, prompts: list[list[int]]) -> list[list[int]]:
    held = manager.allocate(manager.num_free_blocks * 4)
    order = list[list[int]]()
    for _ in prompts:
        manager.append(held, 4)
        manager.check()
        gone = [p for p in prompts if p not in order and not manager.match_prefix(p)]
        assert len(gone) == 1
        order += gone
    return order


def test_a_lower_priority_leaves_first(ranked: BlockManager) -> None:
    for prompt, priority in ((A, 100), (B, 0), (C, 49), (D, 51)):
        retained(ranked, prompt, priority)
    cache(ranked, E)  # 50
    assert order_of_leaving(ranked, [A, B, C, D, E]) == [B, C, E, D, A]


def test_among_equal_priorities_the_least_recently_used_leaves_first(ranked: BlockManager) -> None:
    for prompt in (A, B, C):
        retained(ranked, prompt, 7)
    ranked.free(ranked.allocate(A + E))
    assert order_of_leaving(ranked, [A, B, C]) == [B, C, A]


def test_what_outlived_its_time_leaves_first_of_all(ranked: BlockManager, clock: Clock) -> None:
    retained(ranked, A, 100, ttl_s=10)
    retained(ranked, B, 0)
    retained(ranked, C, 90, ttl_s=20)
    clock.now += 10
    assert order_of_leaving(ranked, [A, B, C]) == [A, B, C]


def test_before_its_time_is_over_a_priority_counts(ranked: BlockManager, clock: Clock) -> None:
    retained(ranked, A, 100, ttl_s=10)
    retained(ranked, B, 0)
    clock.now += 9.9
    assert order_of_leaving(ranked, [A, B]) == [B, A]


def test_time_runs_out_for_held_blocks_too(ranked: BlockManager, clock: Clock) -> None:
    sequence = committed(ranked, A)
    ranked.pins.retain(sequence, 100, ttl_s=10)
    retained(ranked, B, 0)
    clock.now += 11
    ranked.free(ranked.allocate(4 * ranked.num_free_blocks))
    ranked.free(sequence)
    ranked.check()
    assert order_of_leaving(ranked, [A, B]) == [A, B]


def test_the_last_word_about_retention_counts(ranked: BlockManager, clock: Clock) -> None:
    sequence = committed(ranked, A)
    ranked.pins.retain(sequence, 100, ttl_s=10)
    ranked.pins.retain(sequence, 60)
    ranked.free(sequence)
    retained(ranked, B, 55)
    clock.now += 11
    assert order_of_leaving(ranked, [A, B]) == [B, A]


def test_an_evicted_block_loses_its_retention(
    ranked: BlockManager,
) -> None:
    retained(ranked, A, 100)
    ranked.clear_prefix_cache()
    cache(ranked, A)
    retained(ranked, B, 60)
    assert order_of_leaving(ranked, [A, B]) == [A, B]


def test_retention_outlives_growing_and_shrinking(ranked: BlockManager, clock: Clock) -> None:
    retained(ranked, A, 100, ttl_s=10)
    retained(ranked, B, 60)
    ranked.grow(9)
    ranked.shrink(4)
    retained(ranked, C, 10)
    clock.now += 11
    assert order_of_leaving(ranked, [A, B, C]) == [A, C, B]


@pytest.mark.parametrize("policy", ["lru", "lifetime"])
def test_other_policies_refuse_to_retain(policy: str) -> None:
    manager = BlockManager(6, 4, eviction=policy)
    sequence = committed(manager, A)
    with pytest.raises(ValueError, match='Use eviction="priority"'):
        manager.pins.retain(sequence, 5)


@pytest.mark.parametrize("priority", [-1, 101, 1.5, True, "high"])
def test_a_priority_is_an_int_from_0_to_100(ranked: BlockManager, priority: object) -> None:
    with pytest.raises((ValueError, TypeError), match="priority"):
        ranked.pins.retain(committed(ranked, A), priority)  # type: ignore[arg-type]


@pytest.mark.parametrize("ttl_s", [-1, -0.001, float("inf"), float("nan")])
def test_a_time_to_live_is_finite_and_not_negative(ranked: BlockManager, ttl_s: float) -> None:
    with pytest.raises(ValueError, match=r"ttl_s=.*: expected seconds, at least 0"):
        ranked.pins.retain(committed(ranked, A), 5, ttl_s)


# -------------------------------------------------------------------- quotas


def room(manager: BlockManager, namespace: str | None) -> int:
    """Return how many blocks a namespace could get now."""
    twin = twin_of(manager)
    num_blocks = 0
    with suppress(OutOfBlocks):
        while True:
            twin.allocate(1, namespace=namespace)
            twin.check()
            num_blocks += 1
    return num_blocks


def test_a_namespace_gets_no_more_than_its_ceiling() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    manager.allocate(12, namespace="acme")
    with pytest.raises(OutOfBlocks, match=r"namespace 'acme' may have 3 blocks\. Free or swap"):
        manager.allocate(1, namespace="acme")
    assert manager.quotas.used("acme") == 3
    assert room(manager, "other") == room(manager, None) == 5
    manager.check()


def test_a_quota_error_names_the_namespace_in_a_full_pool() -> None:
    manager = BlockManager(4, 4)
    manager.quotas.set("acme", ceiling=2)
    held = manager.allocate(8, namespace="acme")
    manager.allocate(8)
    for call in (
        lambda: manager.append(held, 4),
        lambda: manager.allocate(4, namespace="acme"),
        lambda: manager.allocate(4, namespace="acme", reserve=1),
    ):
        with pytest.raises(OutOfQuota, match="'acme' may have 2 blocks") as caught:
            call()
        copied = copy.copy(caught.value)
        assert copied.namespace == caught.value.namespace == "acme"
        assert (str(copied), copied.missing) == (str(caught.value), caught.value.missing)
    with pytest.raises(OutOfBlocks) as refused:
        manager.allocate(4)
    assert not isinstance(refused.value, OutOfQuota)


def test_at_its_ceiling_a_namespace_evicts_its_own_blocks_first() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    cache(manager, A, "other")  # the least recently used of all
    cache(manager, A + B, "acme")
    manager.allocate(8, namespace="acme")
    manager.check()
    assert manager.match_prefix(A, namespace="other") == 4
    assert manager.match_prefix(A + B, namespace="acme") == 4
    assert manager.quotas.used("acme") == 3


def test_nobody_else_can_take_a_floor() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=3)
    assert room(manager, "other") == room(manager, None) == 5
    assert room(manager, "acme") == 8
    manager.allocate(20)
    with pytest.raises(OutOfBlocks, match="floors of other namespaces reserve the rest"):
        manager.allocate(1, namespace="other")
    manager.allocate(12, namespace="acme")
    manager.check()


def test_what_is_cached_within_a_floor_nobody_else_evicts() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2)
    cache(manager, A + B + C, "acme")
    assert room(manager, "other") == 6
    manager.free(manager.allocate(24, namespace="other"))
    manager.check()
    assert manager.match_prefix(A + B + C, namespace="acme") == 8


def test_a_floor_that_is_held_guards_nothing_more() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2)
    cache(manager, A, "acme")
    manager.allocate(8, namespace="acme")
    assert room(manager, "other") == 6
    manager.allocate(24, namespace="other")
    manager.check()
    assert manager.match_prefix(A, namespace="acme") == 0


def test_sharing_a_cached_prefix_cannot_undercut_anothers_floor() -> None:
    manager = BlockManager(4, 4)
    cache(manager, A + B, "other")
    manager.allocate(8, namespace="other")
    manager.quotas.set("acme", floor=2)
    with pytest.raises(OutOfBlocks, match="floors of other namespaces reserve the rest"):
        manager.allocate([*A, *B, 1], namespace="other")
    assert room(manager, "acme") == 2


def test_no_namespace_is_a_namespace_of_its_own() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set(None, ceiling=2)
    assert room(manager, None) == 2
    assert room(manager, "None") == 8


def test_forks_count_once_and_their_copies_too() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    parent = manager.allocate(6, namespace="acme")
    child, third = manager.fork(parent, 2)
    assert manager.quotas.used("acme") == 2
    manager.append(child, 1)
    assert manager.quotas.used("acme") == 3
    with pytest.raises(OutOfBlocks, match="namespace 'acme' may have 3 blocks"):
        manager.append(third, 1)
    manager.check()


def test_swapped_blocks_do_not_count_until_they_are_back() -> None:
    manager = BlockManager(8, 4, 8)
    manager.quotas.set("acme", ceiling=3)
    sequence = manager.allocate(12, namespace="acme")
    manager.swap(sequence, "host")
    assert manager.quotas.used("acme") == 0
    other = manager.allocate(4, namespace="acme")
    with pytest.raises(OutOfBlocks, match="namespace 'acme' may have 3 blocks"):
        manager.swap(sequence, "device")
    manager.free(other)
    manager.swap(sequence, "device")
    assert manager.quotas.used("acme") == 3
    manager.check()


def test_cached_and_kept_blocks_count() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    sequence = committed(manager, A + B, "acme")
    ticket = manager.pins.pin(sequence)
    manager.free(sequence)
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 1
    manager.pins.unpin(ticket)
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 3


def test_a_batch_over_several_namespaces_charges_each() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("a", ceiling=3)
    manager.quotas.set("b", ceiling=2)
    mixed = [manager.allocate(4, namespace=name) for name in ("a", "b", None, "a")]
    with pytest.raises(OutOfBlocks, match="namespace 'a' may have 3 blocks"):
        manager.append(mixed, 1)
    assert [len(sequence) for sequence in mixed] == [4, 4, 4, 4]
    manager.append(mixed[:3], 1)
    assert (manager.quotas.used("a"), manager.quotas.used("b")) == (3, 2)
    manager.check()


def test_a_quota_can_be_read_replaced_and_dropped() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=1, ceiling=2)
    assert manager.quotas.get("acme") == Quota(1, 2)
    manager.quotas.set("acme", floor=3)
    assert manager.quotas.get("acme") == Quota(3, None)
    manager.quotas.drop("acme")
    assert room(manager, "other") == 8
    manager.check()


def test_an_unknown_namespace_has_no_quota_to_read_or_drop() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=1)
    for use in (manager.quotas.get, manager.quotas.drop, manager.quotas.used):
        for name in ("other", None):
            with pytest.raises(ValueError, match=r"it has no quota. Call quotas\.set"):
                use(name)
    assert manager.quotas.get("acme") == Quota(1)


def test_floors_that_exceed_the_pool_are_refused_and_change_nothing() -> None:
    manager = BlockManager(8, 4, null_block=True)
    manager.quotas.set("a", floor=4)
    with pytest.raises(ValueError, match="8 blocks, but only 7 are available"):
        manager.quotas.set("b", floor=4)
    with pytest.raises(ValueError, match="it has no quota"):
        manager.quotas.get("b")
    manager.quotas.set("a", floor=7)  # its own old floor does not count


@pytest.mark.parametrize(
    "limits", [{"floor": -1}, {"ceiling": 0}, {"floor": 3, "ceiling": 2}, {"floor": 1.5}]
)
def test_a_quota_that_makes_no_sense_is_refused(limits: dict[str, int]) -> None:
    manager = BlockManager(8, 4)
    with pytest.raises((ValueError, TypeError), match=r"floor|ceiling"):
        manager.quotas.set("acme", **limits)


def test_lowering_a_ceiling_evicts_the_namespaces_own_cached_blocks() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A, "other")
    cache(manager, A + B + C, "acme")
    manager.quotas.set("acme", ceiling=1)
    manager.check()
    assert manager.quotas.used("acme") == 1
    assert manager.match_prefix(A + B + C, namespace="acme") == 4
    assert manager.match_prefix(A, namespace="other") == 4


def test_a_ceiling_below_the_held_blocks_is_refused() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A + B, "acme")
    held = manager.allocate(8, namespace="acme")
    before = manager.stats()
    with pytest.raises(ValueError, match="ceiling=1: namespace 'acme' holds 2 blocks"):
        manager.quotas.set("acme", ceiling=1)
    assert manager.stats() == before
    assert manager.match_prefix(A + B, namespace="acme") == 8
    with pytest.raises(ValueError, match="it has no quota"):
        manager.quotas.get("acme")
    manager.free(held)
    manager.check()


def test_quotas_follow_the_pool_when_it_changes_its_size() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2, ceiling=4)
    sequence = committed(manager, A + B, "acme")
    manager.grow(10)
    manager.check()
    assert manager.quotas.used("acme") == 2
    manager.shrink(6)
    manager.check()
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 2
    manager.free(sequence)


def test_dropping_what_is_cached_reaches_every_namespace() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2, ceiling=6)
    cache(manager, A + B, "acme")
    cache(manager, C, "other")
    assert manager.clear_prefix_cache() == 3
    assert manager.quotas.used("acme") == 0
    manager.check()


def test_shrinking_evicts_from_namespaces_with_a_quota_too() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=6)
    cache(manager, A + B + C, "acme")
    manager.shrink(2)
    manager.check()
    assert manager.quotas.used("acme") == 2
    assert manager.match_prefix(A + B + C, namespace="acme") == 8


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("seed", range(6))
def test_quotas_hold_through_any_history(seed: int) -> None:
    random = np.random.default_rng(seed)
    manager = BlockManager(24, 4, 12)
    manager.quotas.set("a", floor=5)
    manager.quotas.set("b", floor=2, ceiling=8)
    manager.quotas.set(None, ceiling=10)
    live: dict[SequenceHandle, str | None] = {}
    swapped: set[SequenceHandle] = set()
    for _ in range(250):
        here = [s for s in live if s not in swapped]
        choice = random.integers(6)
        try:
            if choice <= 1:
                name = [None, "a", "b", "c"][random.integers(4)]
                ids = random.integers(0, 2, random.integers(1, 20)).tolist()
                live[committed(manager, ids, name)] = name
            elif choice == 2 and here:
                manager.append(here, [[0]] * len(here))
                manager.commit(here)
            elif choice == 3 and here:
                parent = here[random.integers(len(here))]
                live[manager.fork(parent)] = live[parent]
            elif choice == 4 and live:
                one = list(live)[random.integers(len(live))]
                manager.swap(one, "device" if one in swapped else "host")
                swapped ^= {one}
            elif live:
                one = list(live)[random.integers(len(live))]
                manager.free(one)
                swapped.discard(one)
                del live[one]
        except OutOfBlocks:
            pass
        manager.check()
        held = {name: set[int]() for name in (None, "a", "b", "c")}
        for sequence, name in live.items():
            held[name].update(b for b in manager.block_tables(sequence)[0].tolist() if b >= 0)
        assert manager.quotas.used("b") <= 8
        assert manager.quotas.used(None) <= 10
        assert len(held["c"]) + len(held[None]) <= 24 - max(5, len(held["a"])) - 2
    assert room(manager, "a") >= 5 - len(held["a"])


# -------------------------------------------------------------------- stats and metrics


def test_stats_and_block_states_add_up_in_every_state() -> None:
    manager = BlockManager(12, 4, 4, null_block=True, fences=True)
    pinned = committed(manager, A)
    manager.pins.pin(pinned)
    manager.free(pinned)
    cache(manager, B)
    manager.fork(manager.allocate(4))
    manager.allocate(4)
    manager.swap(manager.allocate(8), "host")
    stats, states = manager.stats(), manager.queries.block_statuses()
    counts = {state.name: int((states == state).sum()) for state in BlockStatus}
    assert counts == {"FREE": 5, "CACHED": 1, "HELD": 1, "SHARED": 1, "KEPT": 3, "RESERVED": 1}
    assert (stats.num_free, stats.num_cached, stats.num_kept, stats.num_shared) == (5, 1, 3, 1)
    assert stats.num_held == counts["HELD"] + counts["SHARED"]
    assert (stats.num_host_free, stats.num_swapped, stats.num_sequences) == (2, 1, 4)
    assert stats.num_never_used <= stats.num_free
    manager.check()


def metrics(manager: BlockManager, **arguments: object) -> Callable[..., float | None]:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(Metrics(manager, **arguments))  # type: ignore[arg-type]
    return lambda name, **labels: registry.get_sample_value(name, labels)


def test_prometheus_reads_blocks_by_state() -> None:
    manager = BlockManager(8, 4)
    pinned = committed(manager, A)
    manager.pins.pin(pinned)
    manager.free(pinned)
    cache(manager, B)
    manager.allocate(8)
    read = metrics(manager, block_bytes=10)
    found = {s: read("kvpager_blocks", state=s) for s in ("free", "held", "cached", "kept")}
    assert found == {"free": 4, "held": 2, "cached": 1, "kept": 1}


def test_prometheus_reads_prefix_hits_and_swapped_bytes() -> None:
    manager = BlockManager(8, 4, 8)
    cache(manager, A)
    sequence = manager.allocate(A + B)
    manager.swap(sequence, "host")
    manager.swap(sequence, "device", at_most=1)
    read = metrics(manager, block_bytes=10)
    assert read("kvpager_prefix_queries_total") == 2
    assert read("kvpager_prefix_hits_total") == 1
    assert read("kvpager_prefix_query_tokens_total") == 12
    assert read("kvpager_prefix_hit_tokens_total") == 4
    out, back = manager.stats().total_swapped_out, manager.stats().total_swapped_in
    assert read("kvpager_swap_bytes_total", tier="host") == 10 * out == 20
    assert read("kvpager_swap_bytes_total", tier="device") == 10 * back == 10


def test_prometheus_metrics_follow_the_manager_and_take_another_prefix() -> None:
    manager = BlockManager(8, 4)
    read = metrics(manager, block_bytes=1, prefix="mine")
    assert read("mine_sequences") == 0
    manager.allocate(5)
    assert (read("mine_sequences"), read("mine_tokens")) == (1, 5)
    assert read("kvpager_sequences") is None


# -------------------------------------------------------------------- events


def watched(num_blocks: int = 8, num_events: int = 1000, **options: object) -> BlockManager:
    return BlockManager(num_blocks, 4, 8, num_events=num_events, **options)  # type: ignore[arg-type]


def test_a_stored_event_has_place_and_tokens() -> None:
    manager = watched()
    sequence = manager.allocate(A + B, namespace="acme", lora="math")
    assert manager.events.fetch() == []
    manager.commit(sequence)
    (event,) = manager.events.fetch()
    assert (event.kind, event.namespace, event.lora) == ("stored", "acme", "math")
    assert event.blocks.tolist() == manager.block_tables(sequence)[0].tolist()
    assert event.parent == -1
    assert event.tokens is not None
    assert event.tokens.tolist() == [A, B]


def test_what_is_stored_later_names_the_block_before_it() -> None:
    manager = watched()
    sequence = committed(manager, A)
    manager.append(sequence, B)
    manager.commit(sequence)
    assert manager.events.fetch()[-1].parent == manager.block_tables(sequence)[0][0]


def test_a_twins_blocks_are_not_stored_twice() -> None:
    manager = watched()
    pair = [manager.allocate(A), manager.allocate(A)]
    manager.commit(pair)
    assert [event.kind for event in manager.events.fetch()] == ["stored"]


def test_room_made_is_told_as_evicted_and_removed() -> None:
    manager = watched(2)
    cache(manager, A + B)
    tail = manager.events.fetch()[0].blocks.tolist()[1]
    manager.allocate(4)
    evicted, removed = manager.events.fetch()
    assert (evicted.kind, evicted.blocks.tolist()) == ("evicted", [tail])
    assert (removed.kind, removed.blocks.tolist()) == ("removed", [tail])


def test_freeing_a_cached_sequence_removes_nothing() -> None:
    manager = watched()
    sequence = committed(manager, A)
    manager.events.fetch()
    manager.free([sequence, manager.fork(sequence)])
    assert manager.events.fetch() == []


def test_removed_is_logged_when_the_last_copy_leaves() -> None:
    manager = watched()
    sequence = committed(manager, A + B)
    manager.events.fetch()
    manager.swap(sequence, "host")  # what the index offers stays behind
    manager.free(sequence)
    assert [event.kind for event in manager.events.fetch()] == ["copied"]
    manager.clear_prefix_cache()
    assert [event.kind for event in manager.events.fetch()] == ["evicted", "removed"]


def test_every_kind_of_copy_is_told_with_its_tiers() -> None:
    manager = watched()
    parent = committed(manager, [*A, 1, 2])
    child = manager.fork(parent)
    manager.events.fetch()
    step = manager.append(child, 1)
    out = manager.swap(child, "host")
    back = manager.swap(child, "device")
    hit = manager.allocate(A[:3])
    events = manager.events.fetch()
    assert [event.tiers for event in events] == [
        ("device", "device"), ("device", "host"), ("host", "device"), ("device", "device"),
    ]  # fmt: skip
    for event, work in zip(events, (step, out, back, hit), strict=True):
        assert event.kind == "copied"
        assert event.copies is not None
        assert event.copies.tolist() == work.copies.tolist()


def test_a_call_that_is_refused_tells_nothing() -> None:
    manager = watched(2)
    cache(manager, A)
    manager.events.fetch()
    with pytest.raises(OutOfBlocks):
        manager.allocate(A + B + C)
    assert manager.events.fetch() == []


def test_events_are_numbered_from_one_and_never_skip() -> None:
    manager = watched()
    numbers = list[int]()
    for prompt in (A, B, C):
        cache(manager, prompt)
        numbers += [event.number for event in manager.events.fetch()]
    manager.clear_prefix_cache()
    numbers += [event.number for event in manager.events.fetch()]
    assert numbers == [1, 2, 3, 4, 5]


def test_a_full_log_drops_the_oldest_and_says_so_once() -> None:
    manager = watched(num_events=2)
    for prompt in (A, B, C, D):
        cache(manager, prompt)
    events = manager.events.fetch()
    assert [event.kind for event in events] == ["lost", "stored", "stored"]
    assert [event.number for event in events[1:]] == [3, 4]
    cache(manager, E)
    assert [(event.kind, event.number) for event in manager.events.fetch()] == [("stored", 5)]


def test_events_tell_nothing_of_what_happens_to_their_arrays_later() -> None:
    manager = watched()
    sequence = committed(manager, A)
    (event,) = manager.events.fetch()
    manager.append(sequence, B)
    manager.commit(sequence)
    assert event.tokens is not None
    event.tokens[:] = event.blocks[:] = 77
    manager.check()
    assert manager.match_prefix(A + B) == 8


def test_fetch_without_num_events_names_the_argument() -> None:
    with pytest.raises(ValueError, match="Pass num_events"):
        BlockManager(8, 4).events.fetch()


class Router:
    """Knows of a manager's index what its events said, and nothing else."""

    def __init__(self) -> None:
        self.index: dict[int, tuple[object, ...]] = {}

    def hear(self, events: list[Event]) -> None:
        for event in events:
            assert event.kind != "lost"
            if event.kind == "removed":
                for block in event.blocks.tolist():
                    del self.index[block]
            elif event.kind == "stored":
                self.store(event)

    def store(self, event: Event) -> None:
        assert event.tokens is not None
        before = event.parent
        for block, tokens in zip(event.blocks.tolist(), event.tokens.tolist(), strict=True):
            assert block not in self.index, "stored twice"
            assert before == -1 or before in self.index, "stored before its front"
            self.index[block] = (event.namespace, event.lora, before, tokens)
            before = block


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("policy", ["lru", "lifetime", "priority"])
@pytest.mark.parametrize("seed", range(3))
def test_a_router_knows_from_events_alone_what_is_offered(policy: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    manager, router = watched(16, eviction=policy), Router()
    live, last = list[SequenceHandle](), 0
    for _ in range(300):
        choice = random.integers(7)
        try:
            if choice <= 2:
                ids = random.integers(0, 2, random.integers(1, 24)).tolist()
                name = [None, "a"][random.integers(2)]
                lora = [None, "x"][random.integers(2)]
                live.append(manager.allocate(ids, namespace=name, lora=lora))
                manager.commit(live[-1])
            elif choice == 3 and live:
                manager.append(live, [[1]] * len(live))
                manager.commit(live)
            elif choice == 4 and live:
                live.append(manager.fork(live[random.integers(len(live))]))
            elif choice == 5 and live:
                one = live[random.integers(len(live))]
                manager.drop_before(one, random.integers(len(one) + 1))
            elif live:
                manager.free(live.pop(random.integers(len(live))))
        except KVPagerError:
            manager.free([live.pop()] if live else [])
        manager.check()
        events = manager.events.fetch()
        numbers = [last, *(event.number for event in events)]
        assert all(after == before + 1 for before, after in pairwise(numbers))
        last = numbers[-1]
        router.hear(events)
        anew = Router()
        for event in manager.events.published():
            anew.store(event)
        assert router.index == anew.index
    assert manager.queries.num_evicted_blocks > 50
