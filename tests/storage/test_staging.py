"""The slots between a storage and stores: each has one owner, or several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpager import BlockStorage
from kvpager.storage import streams
from kvpager.storage.staging import Staging


def staging(num_slots: int = 4) -> Staging:
    return Staging(BlockStorage(8, 4, [(1, 2, 2)], dtype=torch.float32), num_slots)


class Event:
    """The end of a copy on a GPU."""

    def __init__(self) -> None:
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed


def test_no_more_slots_are_taken_than_are_free() -> None:
    slots = staging()
    assert sorted(slots.take(3)) == [0, 1, 2]
    assert slots.take(3) == [3]
    assert slots.take(1) == []
    slots.give([2, 0])
    assert slots.num_free == 2
    assert sorted(slots.take(9)) == [0, 2]


def test_a_shared_slot_is_free_when_all_gave_it_back() -> None:
    slots = staging()
    taken = slots.take(4)
    slots.share(taken[:2])
    slots.share(taken[:1])
    slots.give(taken)
    assert slots.num_free == 2
    slots.give(taken[:2])
    assert slots.num_free == 3
    slots.give(taken[:1])
    assert slots.num_free == 4


def test_blocks_come_back_as_they_were_read() -> None:
    slots = staging()
    tier = slots._storage.tier()
    tier.copy_(torch.arange(tier.numel()).view_as(tier))
    expected = tier.clone()
    taken = slots.take(3)
    slots.read([1, 5, 6], taken)
    tier.zero_()
    slots.write(taken, [6, 1, 0])
    assert slots.num_free == 4
    for block, source in ((6, 1), (1, 5), (0, 6)):
        assert torch.equal(tier[block], expected[source])


def test_a_slot_is_reused_only_after_the_copy_that_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots, events = staging(), list[Event]()

    def copy_across(*_: Any) -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(streams, "copy_across", copy_across)
    first, second, *_ = slots.take(4)
    slots.share([second])
    slots.write([first], [0])
    slots.write([second], [1])
    assert slots.num_free == 0
    events[0].has_passed = True
    assert slots.num_free == 1
    events[1].has_passed = True
    assert slots.num_free == 1  # another one reads it
    slots.give([second])
    assert slots.num_free == 2
