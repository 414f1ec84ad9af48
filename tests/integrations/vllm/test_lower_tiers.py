"""Chunks in the stores below host memory: saved behind the engine, loaded before a hit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.vllm_parts import (
    LookupResult,
    Node,
    closing,
    context_of,
    interface,
    key_of,
)

HIT, MISS = LookupResult.HIT, LookupResult.MISS
PENDING, RETRY = LookupResult.HIT_PENDING, LookupResult.RETRY
KEYS = [key_of(number) for number in range(64)]
MakeNode = Callable[..., Node]


@pytest.fixture
def store() -> DictStore:
    return DictStore(64)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeNode]:
    """Make nodes that are closed, and hold nothing in the end."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(
            closing(Node(tmp_path, *args, **settings))
        )


def fill(make: MakeNode, store: DictStore, keys: list[Any]) -> Any:
    """Save a block for each key through one engine; return their bytes."""
    node = make(8 * len(keys), [store])
    node.save(keys, list(range(len(keys))))
    node.lower.drain()
    return node.blocks(range(len(keys)))


def test_another_engine_loads_what_one_saved(make: MakeNode, store: DictStore) -> None:
    want = fill(make, store, KEYS[:3])
    other = make(8, [store], caches=None)
    other.caches.tensors[0].tensor[:] = 0
    context = context_of(KEYS)
    other.manager.on_new_request(context)
    assert other.look_up(KEYS[:5], context) == [RETRY] * 5
    assert other.look_up(KEYS[:4], context) == [PENDING] * 3 + [MISS]
    assert other.look_up(KEYS[:4], context) == [HIT] * 3 + [MISS]
    other.load(KEYS[:3], [8, 9, 10], context)
    assert (other.blocks([8, 9, 10]) == want).all()


def test_a_prefix_ends_at_its_first_missing_chunk(make: MakeNode, store: DictStore) -> None:
    fill(make, store, [*KEYS[:2], *KEYS[3:6]])
    node, context = make(8, [store]), context_of(KEYS)
    node.look_up(KEYS[:6], context)
    assert node.look_up(KEYS[:6], context) == [PENDING] * 2 + [MISS] * 4


def test_a_window_is_found_behind_missing_chunks(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[3:6])
    node, context = make(8, [store]), context_of(KEYS)
    backwards = KEYS[7:1:-1]  # as vLLM asks for sliding windows
    node.look_up(backwards, context)
    assert node.look_up(backwards, context) == [MISS, MISS, PENDING, PENDING, PENDING, MISS]


def test_groups_are_looked_up_apart(make: MakeNode, store: DictStore) -> None:
    keys = [key_of(number, group) for group in (0, 1) for number in range(3)]
    names = [key_of(number, group) for group in (0, 1) for number in (10 * group, 10 * group + 1)]
    fill(make, store, names)
    node, context = make(8, [store]), context_of()
    asked = [names[0], names[1], keys[2], names[3], names[2]]
    for position, key in enumerate([names[0], names[1], keys[2]]):
        context.set_offload_key_position(key, position)
    for position, key in enumerate([names[2], names[3]]):
        context.set_offload_key_position(key, position)
    node.look_up(asked, context)
    assert node.look_up(asked, context) == [PENDING, PENDING, MISS, PENDING, PENDING]


def test_the_first_store_that_has_a_chunk_serves_it(make: MakeNode, store: DictStore) -> None:
    second = DictStore(64)
    fill(make, store, KEYS[:1])
    fill(make, second, KEYS[:2])
    node, context = make(8, [store, second]), context_of(KEYS)
    for _ in range(3):
        node.look_up(KEYS[:2], context)
    assert (store.num_loads, second.num_loads) == (1, 1)
    assert node.manager.get_load_source(KEYS[0], context).value == "external_unspecified"
    assert node.manager.get_load_source(KEYS[5], context).value == "host"


def test_each_stored_chunk_is_offered_to_all_stores(make: MakeNode, store: DictStore) -> None:
    second = DictStore(64)
    node = make(16, [store, second])
    node.save(KEYS[:3], [0, 1, 2])
    node.lower.drain()
    assert len(store.blocks) == len(second.blocks) == 3


def test_a_lost_chunk_is_a_miss_in_the_end(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:2])
    store.lost.add(KEYS[1][:32])
    node, context = make(8, [store]), context_of(KEYS)
    node.look_up(KEYS[:2], context)
    assert node.look_up(KEYS[:2], context) == [PENDING, PENDING]
    assert node.look_up(KEYS[:2], context) == [HIT, MISS]


def test_a_store_that_breaks_its_contract_costs_only_hits(
    make: MakeNode, store: DictStore, caplog: pytest.LogCaptureFixture
) -> None:
    fill(make, store, KEYS[:2])
    store.fails = True
    node, context = make(8, [store]), context_of(KEYS)
    node.save(KEYS[4:5], [0])
    node.look_up(KEYS[:2], context)
    node.look_up(KEYS[:2], context)
    assert node.look_up(KEYS[:2], context) == [MISS, MISS]
    assert "failed to load blocks" in caplog.text
    assert "failed to save blocks" in caplog.text


def fail(*_: Any) -> Any:
    raise OSError("a broken store")


@pytest.mark.parametrize("call", ["find", "save", "bypassed"])
@pytest.mark.parametrize("step", [1, -1])  # -1: as vLLM asks for sliding windows
def test_a_store_that_fails_keeps_no_other_from_being_asked(
    make: MakeNode, store: DictStore, caplog: pytest.LogCaptureFixture, call: str, step: int
) -> None:
    fill(make, store, KEYS[:2])
    member = property(fail) if call == "bypassed" else fail
    broken: DictStore = type("Broken", (DictStore,), {call: member})(64)
    node, context = make(8, [broken, store]), context_of(KEYS)
    node.save(KEYS[4:5], [0])
    node.lower.drain()
    asked = KEYS[:2][::step]
    for _ in range(3):
        found = node.look_up(asked, context)
    assert found == [HIT] * 2
    assert KEYS[4][:32] in store.blocks
    assert f"the store {broken.name} failed to" in caplog.text


def test_chunks_of_other_stores_arrive_if_a_store_fails_to_load(
    make: MakeNode, store: DictStore
) -> None:
    second = DictStore(64)
    fill(make, store, KEYS[:1])
    fill(make, second, KEYS[1:2])
    store.fails = True
    node, context = make(8, [store, second]), context_of(KEYS)
    for _ in range(3):
        found = node.look_up(KEYS[:2], context)
    assert found == [MISS, HIT]


def test_outcomes_that_are_no_integers_are_no_hits(
    make: MakeNode, store: DictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make, store, KEYS[:2])
    load = store.load
    monkeypatch.setattr(store, "load", lambda *call: load(*call) == 0)  # False equals `HIT`
    store.lost = set(store.blocks)
    node, context = make(8, [store]), context_of(KEYS)
    for _ in range(2):
        node.look_up(KEYS[:2], context)
    assert node.look_up(KEYS[:2], context) == [MISS, MISS]


def test_chunks_that_find_no_room_are_misses(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:6])
    node, context = make(4, [store]), context_of(KEYS)
    node.look_up(KEYS[:6], context)
    assert node.look_up(KEYS[:6], context) == [PENDING] * 6
    assert node.look_up(KEYS[:6], context) == [HIT] * 4 + [MISS] * 2


def test_a_fetch_makes_no_room_by_hits_of_its_own_prompt(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:4])
    node, context = make(4, [store]), context_of(KEYS)
    store.answer = Saved.REFUSED
    node.save([*KEYS[:2], *KEYS[50:52]], [0, 1, 2, 3])
    node.look_up(KEYS[:4], context)
    node.look_up(KEYS[:4], context)
    assert node.look_up(KEYS[:4], context) == [HIT] * 4


def test_a_chunk_that_left_again_is_not_fetched_twice(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:2])
    node, context = make(2, [store]), context_of(KEYS)
    node.look_up(KEYS[:2], context)
    node.look_up(KEYS[:2], context)
    store.answer = Saved.REFUSED
    node.save(KEYS[10:12], [0, 1])
    assert node.look_up(KEYS[:2], context) == [MISS, MISS]


def test_two_requests_for_one_prefix_share_a_load(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:3])
    node, contexts = make(8, [store]), [context_of(KEYS), context_of(KEYS)]
    for _ in range(3):
        for context in contexts:
            results = [node.manager.lookup(key, context) for key in KEYS[:3]]
        node.manager.on_schedule_end(SimpleNamespace())
        node.lower.drain()
    assert [node.manager.lookup(key, contexts[0]) for key in KEYS[:3]] == results == [HIT] * 3
    assert store.num_loads == 3


def test_an_aborted_request_leaves_its_fetch_to_others(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:2])
    node, gone, other = make(8, [store]), context_of(KEYS), context_of(KEYS)
    node.manager.on_new_request(gone)
    node.look_up(KEYS[:2], gone)
    store.gate.clear()
    for key in KEYS[:2]:
        node.manager.lookup(key, gone)
    node.manager.on_schedule_end(SimpleNamespace())
    node.manager.on_request_finished(gone)
    node.manager.on_new_request(other)
    assert [node.manager.lookup(key, other) for key in KEYS[:2]] == [PENDING] * 2
    store.gate.set()
    node.lower.drain()
    assert [node.manager.lookup(key, other) for key in KEYS[:2]] == [HIT] * 2


def test_saves_hold_at_most_a_quarter_of_the_slots(make: MakeNode, store: DictStore) -> None:
    node = make(8, [store])
    store.gate.clear()
    for number in range(8):
        node.save([KEYS[number]], [number])
    assert sum(node.manager._tier._pins) == 2
    assert node.save(KEYS[20:26], list(range(6))) == KEYS[20:26]
    store.gate.set()
    node.lower.drain()
    assert len(store.blocks) == 2


def test_a_reset_waits_for_loads_into_its_slots(make: MakeNode, store: DictStore) -> None:
    fill(make, store, KEYS[:2])
    node, context = make(8, [store]), context_of(KEYS)
    node.look_up(KEYS[:2], context)
    node.look_up(KEYS[:2], context)
    node.manager.reset_cache()
    assert node.manager._tier.num_ready == 0
    assert node.look_up(KEYS[:2], context) == [RETRY, RETRY]


def test_shutting_down_saves_what_waits_and_closes(make: MakeNode, store: DictStore) -> None:
    node = make(16, [store])
    node.save(KEYS[:4], [0, 1, 2, 3])
    node.manager.shutdown()
    assert len(store.blocks) == 4
    assert store.is_closed


def test_a_request_that_refuses_stores_finds_host_memory_only(
    make: MakeNode, store: DictStore
) -> None:
    fill(make, store, KEYS[:2])
    node = make(8, [store])
    node.save(KEYS[:1], [0])
    context = interface.ReqContext("hosts-only")
    context.load_tier_filter = SimpleNamespace(allows=lambda medium, locality: False)
    assert node.look_up(KEYS[:2], context) == [HIT, MISS]


def test_tiers_need_all_workers_on_one_machine(tmp_path: Path, store: DictStore) -> None:
    node = Node(tmp_path, 8, [store])
    node.manager._rows._count[0] = 1  # as if the worker were elsewhere
    with pytest.raises(RuntimeError, match="must run on one machine"):
        node.save(KEYS[:1], [0])
    node.close()


@pytest.mark.parametrize("seed", range(3))
def test_any_history_loads_the_bytes_of_its_keys(
    make: MakeNode, store: DictStore, seed: int
) -> None:
    """Prompts of several engines over one store; each block's bytes follow from its key."""
    choices = random.Random(seed)
    nodes = [make(choices.choice([3, 6, 12]), [store], block_bytes=64) for _ in range(3)]
    for _ in range(60):
        node, first = choices.choice(nodes), choices.randrange(8)
        keys = KEYS[8 * first : 8 * first + choices.randrange(1, 8)]
        context = context_of(keys)
        node.manager.on_new_request(context)
        for _ in range(3):
            results = node.look_up(keys, context)
        count = next((n for n, each in enumerate(results) if each is not HIT), len(keys))
        pages = node.caches.tensors[0].tensor
        if count:
            pages[:count] = -1
            node.load(keys[:count], list(range(count)), context)
        numbers = [KEYS.index(key) for key in keys]
        assert pages[:count, 0].tolist() == numbers[:count]
        for place in range(count, len(keys)):  # the model computes the rest
            pages[place] = numbers[place]
        node.save(keys[count:], list(range(count, len(keys))), context)
        node.manager.on_request_finished(context)
        if choices.random() < 0.05:
            node.manager.reset_cache()
    assert store.num_loads
