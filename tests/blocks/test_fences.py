"""Blocks of copies under way: they are kept until the copies are complete."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.stats import BlockStatus
from kvpager.plans import AppendPlan, CopyPlan
from tests.support.prefixes import A, B, cache, committed


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
        manager.copies.complete(CopyPlan(plan.copies, "device", "host", plan.ticket + 1))
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
    pending = list[tuple[CopyPlan | AppendPlan | SequenceHandle, list[int]]]()

    def begin(work: CopyPlan | AppendPlan | SequenceHandle) -> None:
        if work.ticket:
            out = isinstance(work, CopyPlan) and work.destination == "host"
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
