"""Which blocks a store is offered."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager.storage.tiers.admission import Admission, Admissions
from tests.support.dict_store import DictStore
from tests.support.tier_node import Node, prompt


def store_of(capacity: int | None) -> DictStore:
    store = DictStore(0)
    store.capacity = capacity
    return store


def test_a_block_is_taken_when_it_is_used_for_the_second_time() -> None:
    node = Node(admit="second")
    (store,) = node.stores
    node.compute(prompt(1))
    assert node.clean() == 0  # not even copied
    assert not store.num_saves
    node.compute(prompt(1))
    assert node.clean() == 5
    node.compute(prompt(2))
    node.clean()
    node.manager.clear_prefix_cache()
    node.compute(prompt(2))
    assert node.clean() == 5  # evicted between its uses
    node.end()


def test_an_offer_that_could_not_be_copied_does_not_count() -> None:
    node = Node(admit="second")
    node.compute(prompt(1, 9))
    assert node.clean() == 0
    node.compute(prompt(1, 13))  # a third block is offered for the first time
    node.manager.quotas.set("other", floor=15)
    assert node.clean() == 0
    node.manager.quotas.drop("other")
    assert node.clean() == 2
    node.end()


def test_a_block_without_a_slot_keeps_its_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(admit="second")
    (store,) = node.stores
    take = node.staging.take

    def clean_with(num_slots: int) -> int:
        """Save blocks while a thread takes all slots but some."""
        with monkeypatch.context() as patch:
            patch.setattr(node.staging, "take", lambda count: take(min(count, num_slots)))
            return node.tiering.clean()

    node.compute(prompt(1))
    assert node.clean() == 0
    node.compute(prompt(1))
    node.compute(prompt(2))
    assert clean_with(0) == 0
    assert clean_with(2) == 2
    assert node.clean() == 3
    assert len(store.blocks) == 5  # not those of the second prompt, which were used once
    node.end()


def test_a_small_store_that_is_full_takes_blocks_used_twice() -> None:
    node = Node([store_of(5)])
    node.compute(prompt(1))
    assert node.clean() == 5
    node.compute(prompt(2))
    assert node.clean() == 0
    node.compute(prompt(2))
    assert node.clean() == 5
    node.end()


@pytest.mark.parametrize("capacity", [64, None])
def test_a_large_store_takes_every_block(capacity: int | None) -> None:
    node = Node([store_of(capacity)])
    for seed in range(20):
        node.compute(prompt(seed))
        assert node.clean() == 5
    node.end()


def test_always_takes_every_block() -> None:
    node = Node([store_of(5)], admit="always")
    for seed in range(3):
        node.compute(prompt(seed))
        assert node.clean() == 5
    node.end()


def test_a_store_that_chooses_itself_is_offered_every_block() -> None:
    class Choosing(DictStore):
        admit = "second"

    node = Node([Choosing(0)], admit="second")
    node.compute(prompt(1))
    assert node.clean() == 5
    node.end()


def test_each_store_has_its_own_choice() -> None:
    node = Node([store_of(5), store_of(None)])
    node.compute(prompt(1))
    node.clean()
    node.compute(prompt(2))
    assert node.clean() == 5
    assert [len(store.blocks) for store in node.stores] == [5, 10]
    node.end()


@pytest.mark.parametrize("admit", ["lots", None, 2])
def test_another_admission_is_refused(admit: Any) -> None:
    with pytest.raises(ValueError, match=r"admit=.*: expected one of"):
        Node(admit=admit)


def test_refused_keys_are_remembered_for_a_while() -> None:
    admission = Admission("second", num_slots=2)
    keys = [bytes([number]) for number in range(9)]
    assert not any(admission.admits(key, has_room=False) for key in keys)
    assert admission.admits(keys[8], has_room=False)
    assert not admission.admits(keys[0], has_room=False)  # forgotten after eight other keys


def test_blocks_that_pass_through_a_store_need_room_there() -> None:
    shared, below = store_of(3), store_of(3)
    admissions = Admissions([shared, below], "auto", 3, shared)
    assert admissions.wanted([b"a", b"b", b"c"]) == [[1]] * 3
    assert admissions.wanted([b"d", b"e"]) == [[0, 1]] * 2
