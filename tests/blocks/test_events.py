"""The log of events: what a router learns from it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError, OutOfBlocks
from kvpager.blocks.events import Event
from kvpager.blocks.sequences import SequenceHandle
from tests.support.prefixes import A, B, C, D, E, cache, committed


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


def test_duplicate_blocks_are_not_stored_twice() -> None:
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
    manager.swap(sequence, "host")  # published blocks stay cached
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
def test_a_router_knows_from_events_which_blocks_are_cached(policy: str, seed: int) -> None:
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
