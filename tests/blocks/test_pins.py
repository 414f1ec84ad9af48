"""Cached prefixes that stay: pinned ones, and those with a priority."""

from __future__ import annotations

import pytest

from kvpager import BlockManager
from kvpager.blocks.policies import Priority
from kvpager.blocks.stats import BlockStatus
from kvpager.errors import SequenceSwapped, StaleSequence
from kvpager.plans import CopyPlan
from tests.support.clock import Clock
from tests.support.manager_state import handles_of
from tests.support.prefixes import A, B, C, D, E, cache, committed, press

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
    manager = BlockManager(6, 4, 6, fences=True)
    plan = manager.swap(manager.allocate(8), "host")
    with pytest.raises(ValueError, match="not a pin"):
        manager.pins.unpin(plan.ticket)
    ticket = manager.pins.pin(committed(manager, A))
    with pytest.raises(ValueError, match="completed already"):
        manager.copies.complete(CopyPlan(plan.copies, "device", "host", ticket))
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


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


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
