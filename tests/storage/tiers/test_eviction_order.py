"""A key leaves a tier after the keys that continue it."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager.blocks.policies import POLICIES
from kvpager.errors import BrokenInvariant
from kvpager.storage.tiers.keyed import NO_ROOM, KeyedTier
from kvpager.storage.tiers.ranked import Ranked
from kvpager.testing.store_calls import key_of

KEYS = [key_of(number) for number in range(20)]


def save(tier: KeyedTier, number: int, parent: int | None = None) -> list[int]:
    """Offer one key; return the numbers of the keys that left."""
    parents = [None if parent is None else KEYS[parent]]
    slots, evicted = tier.reserve([KEYS[number]], parents=parents)
    tier.publish(slots)
    return [KEYS.index(key) for key, _ in evicted]


def use(tier: KeyedTier, *numbers: int) -> None:
    tier.unpin(tier.pin([KEYS[number] for number in numbers]))


def test_a_prefix_leaves_after_what_continues_it() -> None:
    tier = KeyedTier(3)
    save(tier, 0)
    save(tier, 1, parent=0)
    save(tier, 2, parent=1)
    assert [save(tier, number) for number in (10, 11, 12)] == [[2], [1], [0]]
    tier.check()


def test_a_prefix_of_two_ends_leaves_after_both() -> None:
    tier = KeyedTier(3)
    save(tier, 0)
    save(tier, 1, parent=0)
    save(tier, 2, parent=0)
    assert [save(tier, number) for number in (10, 11, 12)] == [[1], [2], [0]]


def test_a_prefix_whose_continuation_left_has_the_place_of_its_last_use() -> None:
    tier = KeyedTier(4)
    save(tier, 0)
    save(tier, 5)
    save(tier, 1, parent=0)
    save(tier, 6)
    use(tier, 5)
    use(tier, 1)
    assert [save(tier, 10), save(tier, 11)] == [[6], [5]]  # 0 is the oldest, but 1 is here
    assert save(tier, 12) == [1]
    assert save(tier, 13) == [0]


def test_a_prefix_may_arrive_after_what_continues_it() -> None:
    tier = KeyedTier(2)
    save(tier, 1, parent=0)
    save(tier, 0)
    use(tier, 1)
    assert [save(tier, 10), save(tier, 11)] == [[1], [0]]
    tier.check()


def test_a_prefix_that_was_dropped_and_saved_again_still_leaves_last() -> None:
    tier = KeyedTier(2)
    save(tier, 0)
    save(tier, 1, parent=0)
    pinned = tier.pin(KEYS[:1])
    tier.discard(pinned)
    tier.unpin(pinned)
    save(tier, 0)
    use(tier, 1)
    assert save(tier, 10) == [1]


@pytest.mark.parametrize("is_written", [False, True])
def test_a_continuation_in_use_holds_its_prefix_while_others_can_leave(is_written: bool) -> None:
    tier = KeyedTier(3)
    save(tier, 0)
    save(tier, 9)
    if is_written:
        tier.reserve(KEYS[1:2], parents=KEYS[:1])
    else:
        save(tier, 1, parent=0)
        tier.pin(KEYS[1:2])
    assert save(tier, 10) == [9]
    assert save(tier, 11) == [10]
    # Room is promised for each key that is not in use: now the prefix leaves, too.
    assert tier.num_available == 2
    assert len(tier.reserve(KEYS[12:14]).evicted) == 2
    assert tier.reserve(KEYS[14:15]).slots.tolist() == [NO_ROOM]
    tier.check()


def test_the_parent_of_a_saved_key_may_be_told_later() -> None:
    tier = KeyedTier(2)
    save(tier, 0)
    save(tier, 1)
    slots = tier.pin(KEYS[1:2]).tolist()
    tier.link(slots, KEYS[:1])
    tier.link(slots, KEYS[5:6])  # the first counts
    tier.unpin(slots)
    assert save(tier, 10) == [1]
    tier.check()


def test_an_abandoned_continuation_holds_nothing() -> None:
    tier = KeyedTier(2)
    save(tier, 0)
    tier.abandon(tier.reserve(KEYS[1:2], parents=KEYS[:1]).slots)
    save(tier, 9)
    assert save(tier, 10) == [0]
    tier.check()


def test_keys_that_continue_each_other_leave_all_the_same() -> None:
    tier = KeyedTier(2)
    save(tier, 0, parent=1)
    save(tier, 1, parent=0)
    assert [save(tier, number) for number in (10, 11)] == [[0], [1]]
    tier.check()


@pytest.mark.parametrize("name", POLICIES)
def test_no_prefix_leaves_before_what_continues_it(name: str) -> None:
    tier, random = KeyedTier(16, POLICIES[name](16)), np.random.default_rng(1)
    chains = [[key_of(100 * chain + number) for number in range(6)] for chain in range(8)]
    for _ in range(400):
        chain = chains[random.integers(8) * random.integers(2)]
        prompt = chain[: random.integers(1, 7)]
        slots = tier.reserve(prompt, partly=True, parents=[None, *prompt[:-1]]).slots
        tier.publish(slots)
        use_of = tier.pin(prompt[: random.integers(1, 7)])
        tier.unpin(use_of)
        for each in chains:
            held = [tier.has(key) for key in each]
            assert held == sorted(held, reverse=True)
    tier.check()


def test_a_wrong_count_of_continuations_is_found() -> None:
    tier = KeyedTier(2)
    save(tier, 1, parent=0)
    tier._order._num_children[KEYS[0]] = 2
    with pytest.raises(BrokenInvariant, match="number of children"):
        tier.check()


# ---------------------------------------------------------------- the queue


def test_equal_ranks_leave_in_the_order_of_pushes() -> None:
    ranked = Ranked(8)
    ranked.push([1, 1, 0, 1], [3, 5, 2, 0])
    ranked.push([1, 0], [4, 3])
    assert ranked.in_order() == [2, 3, 5, 0, 4]
    assert [ranked.pop(None) for _ in range(6)] == [2, 3, 5, 0, 4, None]


def test_a_released_slot_leaves_in_its_place() -> None:
    ranked = Ranked(8)
    ranked.push([1, 1, 1, 1], [0, 1, 2, 3])
    assert ranked.pop(lambda slot: slot < 2) == 2
    ranked.release([0])
    assert [ranked.pop(lambda slot: slot == 1), ranked.pop(None)] == [0, 3]
    assert ranked.pop(None) is None
    ranked.release_all()
    assert (len(ranked), ranked.pop(None)) == (1, 1)


def test_the_heap_stays_small_while_slots_are_used_again() -> None:
    ranked = Ranked(8)
    for number in range(4000):
        ranked.push([number] * 3, [number % 8, (number + 1) % 8, (number + 3) % 8])
    assert len(ranked) == 8
    assert ranked._num_entries <= 2 * 8 + 64
    assert ranked._num_entries == sum(len(slots) for *_, slots in ranked._heap)
