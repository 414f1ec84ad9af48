"""Keys and slots of a tier: each method."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from kvpager.blocks.policies import POLICIES
from kvpager.storage.tiers.eviction_order import SlotPolicy
from kvpager.storage.tiers.keyed import KNOWN, NO_ROOM, KeyedTier
from kvpager.testing.store_calls import key_of


def keys(*numbers: int) -> list[bytes]:
    return [key_of(number) for number in numbers]


def fill(tier: KeyedTier, numbers: Iterable[int]) -> list[int]:
    """Offer keys, all in one call; return their slots."""
    slots = tier.reserve(keys(*numbers)).slots
    tier.publish(slots)
    return slots.tolist()


def offered(tier: KeyedTier, numbers: Iterable[int]) -> set[int]:
    return {number for number in numbers if tier.find(keys(number))}


# ---------------------------------------------------------------- one key's way


def test_a_key_is_offered_once_its_slot_is_published() -> None:
    tier = KeyedTier(2)
    slots = tier.reserve(keys(0)).slots
    assert tier.find(keys(0)) == 0
    assert tier.pin(keys(0)).tolist() == [-1]
    tier.publish(slots)
    assert tier.find(keys(0, 1)) == 1
    assert tier.pin(keys(1, 0)).tolist() == [-1, *slots]


def test_an_abandoned_slot_is_free_and_its_key_new() -> None:
    tier = KeyedTier(1)
    tier.abandon(tier.reserve(keys(0)).slots)
    assert tier.find(keys(0)) == 0
    assert tier.num_available == 1
    assert tier.reserve(keys(0)).slots.tolist() == [0]


def test_keys_that_are_offered_or_written_get_no_second_slot() -> None:
    tier = KeyedTier(4)
    fill(tier, [0])
    tier.reserve(keys(1))
    slots = tier.reserve(keys(0, 1, 2, 2)).slots.tolist()
    assert (slots[0], slots[1], slots[3]) == (KNOWN, KNOWN, KNOWN)
    assert slots[2] >= 0


@pytest.mark.parametrize("end", ["publish", "abandon", "unpin", "discard"])
def test_a_slot_that_is_free_cannot_be_ended(end: str) -> None:
    tier = KeyedTier(2)
    with pytest.raises(ValueError, match="slot 1: it is not"):
        getattr(tier, end)([1])
    tier.check()


def test_negative_slots_are_skipped() -> None:
    tier = KeyedTier(1)
    for end in (tier.publish, tier.abandon, tier.unpin, tier.discard):
        end([KNOWN, NO_ROOM])
    tier.check()


def test_a_policy_is_told_the_given_depths() -> None:
    policy = POLICIES["lifetime"](4)
    tier = KeyedTier(4, policy)
    slots = tier.reserve(keys(0, 1), depths=[5, 9]).slots
    tier.publish(slots)
    assert policy.depths[slots].tolist() == [5, 9]


def test_keys_that_rest_leave_last_and_the_last_key_first() -> None:
    tier = KeyedTier(3)
    for number in (0, 1, 2):
        fill(tier, [number])
    tier.rest(keys(0, 1, 7))
    assert [key for key, _ in tier.reserve(keys(3, 4)).evicted] == keys(2, 1)
    tier.check()


def test_rest_leaves_pinned_keys_pinned() -> None:
    tier = KeyedTier(1)
    fill(tier, [0])
    slots = tier.pin(keys(0))
    tier.rest(keys(0))
    assert tier.num_available == 0
    tier.unpin(slots)
    tier.check()


# ---------------------------------------------------------------- room


def test_the_least_recently_used_key_leaves_and_is_reported() -> None:
    tier = KeyedTier(3)
    slots = {number: fill(tier, [number])[0] for number in range(3)}
    tier.unpin(tier.pin(keys(0)))
    taken, evicted = tier.reserve(keys(9))
    assert evicted == [(key_of(1), slots[1])]
    assert taken.tolist() == [slots[1]]


def test_later_blocks_of_a_prefix_leave_first() -> None:
    tier = KeyedTier(4)
    fill(tier, range(4))
    assert [key for key, _ in tier.reserve(keys(8, 9)).evicted] == keys(3, 2)


def test_later_blocks_leave_first_after_a_hit() -> None:
    tier = KeyedTier(4)
    for number in (3, 1, 0, 2):
        fill(tier, [number])
    tier.unpin(tier.pin(keys(0, 1, 2, 3)))
    assert [key for key, _ in tier.pairs()] == keys(3, 2, 1, 0)


def test_without_room_for_all_none_is_reserved_and_none_leaves() -> None:
    tier = KeyedTier(3)
    fill(tier, [0, 1])
    tier.pin(keys(0, 1))
    taken, evicted = tier.reserve(keys(5, 0, 6))
    assert taken.tolist() == [NO_ROOM, KNOWN, NO_ROOM]
    assert evicted == []
    assert tier.num_available == 1
    assert tier.reserve(keys(5)).slots.tolist() == [2]


def test_partly_reserves_the_first_keys_that_fit() -> None:
    tier = KeyedTier(2)
    taken, _ = tier.reserve(keys(5, 6, 7), partly=True)
    assert sorted(taken.tolist()[:2]) == [0, 1]
    assert taken[2] == NO_ROOM


def test_a_known_key_makes_no_room_for_its_neighbours() -> None:
    tier = KeyedTier(2)
    fill(tier, [0])
    fill(tier, [1])
    _, evicted = tier.reserve(keys(0, 9))
    assert [key for key, _ in evicted] == keys(1)
    assert tier.find(keys(0)) == 1


def test_slots_being_written_make_no_room() -> None:
    tier = KeyedTier(2)
    tier.reserve(keys(0, 1))
    assert tier.reserve(keys(2)).slots.tolist() == [NO_ROOM]


# ---------------------------------------------------------------- pins


def test_a_pinned_key_makes_no_room_until_each_pin_ends() -> None:
    tier = KeyedTier(1)
    fill(tier, [0])
    first, second = tier.pin(keys(0)), tier.pin(keys(0))
    tier.unpin(first)
    assert tier.reserve(keys(1)).slots.tolist() == [NO_ROOM]
    tier.unpin(second)
    assert tier.reserve(keys(1)).slots.tolist() == [0]


def test_a_discarded_slot_is_not_reused_while_it_is_pinned() -> None:
    tier = KeyedTier(1)
    fill(tier, [0])
    reader, slots = tier.pin(keys(0)), tier.pin(keys(0))
    assert tier.discard(slots) == [(key_of(0), 0)]
    assert tier.discard(slots) == []
    assert tier.find(keys(0)) == 0
    tier.unpin(slots)
    assert tier.reserve(keys(1)).slots.tolist() == [NO_ROOM]
    tier.unpin(reader)
    assert tier.reserve(keys(1)).slots.tolist() == [0]


def test_a_discarded_key_may_be_saved_elsewhere_at_once() -> None:
    tier = KeyedTier(2)
    [slot] = fill(tier, [0])
    pinned = tier.pin(keys(0))
    tier.discard(pinned)
    [other] = fill(tier, [0])
    assert other != slot
    tier.unpin(pinned)
    assert tier.find(keys(0)) == 1


# ---------------------------------------------------------------- slots without a key


def test_a_taken_slot_evicts_and_is_free_when_given_up() -> None:
    tier = KeyedTier(3)
    fill(tier, [0, 1, 2])
    slots, evicted = tier.take(2)
    assert [key for key, _ in evicted] == keys(2, 1)
    assert (tier.capacity, tier.num_ready) == (1, 1)
    assert tier.take(2).slots.tolist() == []
    assert len(tier.take(2, partly=True).slots) == 1
    tier.unpin(slots)
    assert (tier.capacity, tier.num_available) == (2, 2)
    tier.check()


def test_a_shared_slot_is_free_after_its_last_use() -> None:
    tier = KeyedTier(1)
    slots = tier.take(1).slots
    tier.share(slots)
    tier.unpin(slots)
    assert tier.num_available == 0
    tier.unpin(slots)
    assert tier.num_available == 1
    with pytest.raises(ValueError, match="not pinned"):
        tier.share(slots)


def test_a_named_slot_is_offered_and_stays_pinned() -> None:
    tier = KeyedTier(4)
    fill(tier, [0])
    slots = tier.take(3).slots.tolist()
    assert tier.name(slots, keys(1, 0, 1)).tolist() == [slots[0], KNOWN, KNOWN]
    assert tier.find(keys(0, 1)) == 2
    assert tier.reserve(keys(5, 6)).slots.tolist() == [NO_ROOM, NO_ROOM]
    tier.unpin(slots)
    assert tier.pin(keys(1)).tolist() == slots[:1]
    assert tier.num_available == 3
    with pytest.raises(ValueError, match="not taken"):
        tier.name(slots[:1], keys(7))
    tier.check()


# ---------------------------------------------------------------- restore, pairs, close


def test_restored_keys_are_offered_and_leave_oldest_first() -> None:
    tier = KeyedTier(4)
    tier.restore([(key_of(7), 2), (key_of(8), 0)])
    assert tier.pin(keys(7, 8)).tolist() == [2, 0]
    tier = KeyedTier(2)
    tier.restore([(key_of(7), 1), (key_of(8), 0)])
    assert tier.reserve(keys(9)).evicted == [(key_of(7), 1)]
    tier.check()


def test_pairs_restore_a_tier_with_its_order() -> None:
    tier = KeyedTier(4)
    for number in (3, 1, 0, 2):
        fill(tier, [number])
    tier.unpin(tier.pin(keys(1)))
    again = KeyedTier(4)
    again.restore(tier.pairs())
    assert again.pairs() == tier.pairs()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 0), (0, 1)], "comes twice"),
        ([(0, 0), (1, 0)], "comes twice"),
        ([(0, 2)], "not in 0..1"),
        ([(0, -1)], "not in 0..1"),
    ],
)
def test_pairs_that_contradict_each_other_restore_nothing(
    pairs: list[tuple[int, int]], message: str
) -> None:
    tier = KeyedTier(2)
    with pytest.raises(ValueError, match=message):
        tier.restore([(key_of(number), slot) for number, slot in pairs])
    assert tier.num_ready == 0
    tier.check()


def test_a_used_tier_is_not_restored() -> None:
    tier = KeyedTier(2)
    tier.reserve(keys(0))
    with pytest.raises(ValueError, match="not empty"):
        tier.restore([(key_of(1), 1)])


def test_a_closed_tier_offers_and_reserves_nothing_but_lets_calls_end() -> None:
    tier = KeyedTier(3)
    fill(tier, [0])
    pinned, written = tier.pin(keys(0)), tier.reserve(keys(1)).slots
    tier.close()
    assert tier.find(keys(0)) == tier.num_ready == 0
    assert tier.pin(keys(0)).tolist() == [-1]
    assert tier.reserve(keys(2)).slots.tolist() == [NO_ROOM]
    tier.unpin(pinned)
    tier.publish(written)
    tier.check()


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("name", POLICIES)
def test_each_eviction_policy_of_block_managers_serves_a_tier(name: str) -> None:
    policy: SlotPolicy = POLICIES[name](8)
    tier, chosen = KeyedTier(8, policy), np.random.default_rng(0)
    for _ in range(400):
        some = keys(*chosen.integers(0, 24, size=3).tolist())
        tier.publish(tier.reserve(some).slots)
        tier.unpin(tier.pin(some[:2]))
        if chosen.random() < 0.1:
            pinned = tier.pin(some[:1])
            tier.discard(pinned)
            tier.unpin(pinned)
    tier.check()
    assert tier.num_ready >= 7


def test_a_policys_order_decides_who_leaves() -> None:
    policy = POLICIES["priority"](3)
    tier = KeyedTier(3, policy)
    slots = fill(tier, [0, 1, 2])
    policy.retain(np.array(slots[2:], np.int32), 90, None)
    policy.retain(np.array(slots[:1], np.int32), 60, None)
    for number in (0, 1, 2):  # a policy updates ranks at the next use
        tier.unpin(tier.pin(keys(number)))
    assert [key for key, _ in tier.pairs()] == keys(1, 0, 2)
