"""Blocks leave for stores and come back: through staging, in order, each once."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.protocol import Outcomes
from tests.support.clock import Clock
from tests.support.dict_store import DictStore
from tests.support.tier_node import SIZE, Node, finished, prompt


@pytest.fixture
def store() -> DictStore:
    """A store in which a node saved `prompt(1)`."""
    node = Node()
    node.compute(prompt(1))
    assert node.clean() == 5
    node.end()
    (store,) = node.stores
    store.is_closed = False
    return store


@pytest.fixture
def other(store: DictStore) -> Node:
    """Another node over the store."""
    return Node([store])


def test_another_process_finds_what_one_computed() -> None:
    one = Node()
    one.compute(prompt(1))
    assert one.clean() == 5
    assert one.clean() == 0
    other = Node(one.stores)
    assert other.fetch(prompt(1)) == 5
    assert other.compute(prompt(1)) == 20
    assert other.fetch(prompt(1)) == 0
    assert other.clean() == 0  # a fetched block is clean
    one.end()
    other.end()


def test_an_evicted_prefix_is_found_again() -> None:
    node = Node(num_blocks=6)
    for seed in range(5):
        node.compute(prompt(seed))
        node.clean()
    for seed in range(5):
        assert node.fetch(prompt(seed)) == 5
        assert node.compute(prompt(seed)) == 20
    node.end()


def test_tenants_adapters_and_images_stay_apart() -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"namespace": "a"}, {"namespace": "b"}, {"lora": "a"}, {"lora": "b"},
        {"mm_hashes": [(2, 6, b"image of 16 byte")]}, {"mm_hashes": [(2, 6, b"other image")]},
    ]  # fmt: skip
    for own in kinds:
        node = Node(num_blocks=64)
        node.compute(prompt(1), **own)
        node.clean()
        other = Node(node.stores, num_blocks=64)
        found = [kind for kind in kinds if other.fetch(prompt(1), **kind)]
        assert found == [own]
        assert other.compute(prompt(1), **own) == 20
        other.end()


def test_what_is_loaded_in_order_is_used(store: DictStore, other: Node) -> None:
    store.lost = {next(iter(store.blocks))}  # the last block of the prompt left first
    assert other.fetch(prompt(1)) == 4
    assert other.compute(prompt(1)) == 16
    other.end()


def test_an_image_may_end_behind_the_loaded_blocks() -> None:
    image = [(6, 15, b"image of 16 byte")]
    node = Node()
    node.compute(prompt(1), mm_hashes=image)
    node.clean()
    (store,) = node.stores
    other = Node(node.stores)
    store.drop([list(store.blocks)[2]])  # of blocks 4 3 2 1 0
    assert other.fetch(prompt(1), mm_hashes=image) == 2
    assert other.compute(prompt(1), mm_hashes=image) == 8
    other.end()


def test_tokens_after_a_truncated_image_are_not_the_image() -> None:
    image = [(2, 6, b"image of 16 byte")]
    node = Node()
    sequence = node.manager.allocate(prompt(1), mm_hashes=image)
    node.manager.truncate(sequence, 5)
    node.manager.append(sequence, prompt(1)[5:])
    node.manager.commit(sequence)
    node.manager.free(sequence)
    found = node.manager.match_prefix(prompt(1), mm_hashes=image)
    assert found < 2 * SIZE
    node.clean()
    other = Node(node.stores)
    assert other.fetch(prompt(1), mm_hashes=image) == found // SIZE
    other.end()


def test_a_later_store_serves_what_an_earlier_one_lacks() -> None:
    near, far = (DictStore(64 * SIZE) for _ in range(2))
    node = Node()
    near.block_bytes = far.block_bytes = node.storage.block_bytes
    node.compute(prompt(1))
    node.clean()
    whole = list(node.stores[0].blocks.items())
    near.blocks, far.blocks = dict(whole[3:]), dict(whole[:3])
    other = Node([near, far])
    assert other.fetch(prompt(1)) == 5
    assert (near.num_loads, far.num_loads) == (2, 3)
    assert other.compute(prompt(1)) == 20
    other.end()


def test_prompts_that_begin_alike_share_a_fetch(store: DictStore, other: Node) -> None:
    store.gate.clear()
    fetches = [other.tiering.begin(prompt(1)) for _ in range(64)]
    store.gate.set()
    assert len(set(map(id, fetches))) == 1
    assert fetches[0] is not None
    finished(fetches[0])
    assert [other.tiering.attach(fetch) for fetch in fetches if fetch] == [{"dict": 20}, *[{}] * 63]
    assert store.num_loads == 5
    other.end()


def test_one_that_gives_up_leaves_the_fetch_to_the_others(store: DictStore, other: Node) -> None:
    store.gate.clear()
    first, second = (other.tiering.begin(prompt(1)) for _ in range(2))
    assert first is second is not None
    other.tiering.cancel(first)
    store.gate.set()
    finished(second)
    assert other.tiering.attach(second) == {"dict": 20}
    other.end()


@pytest.mark.parametrize("is_done", [True, False])
def test_a_cancelled_fetch_gives_its_slots_back(
    is_done: bool, store: DictStore, other: Node
) -> None:
    if not is_done:
        store.gate.clear()
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    if is_done:
        finished(fetch)
        assert other.staging.num_free == 27
    else:
        with pytest.raises(ValueError, match="not done"):
            other.tiering.attach(fetch)
    other.tiering.cancel(fetch)
    store.gate.set()
    assert other.fetch(prompt(2)) == 0
    other.end()


def test_a_full_staging_ends_loads_early_and_saves_nothing() -> None:
    node = Node(slots=3)
    node.compute(prompt(1))
    assert node.tiering.clean() == 3
    node.settle()
    assert node.clean() == 2
    taken = node.staging.take(2)
    assert node.tiering.clean() == 0
    other = Node(node.stores, slots=3)
    assert other.fetch(prompt(1)) == 3
    held = other.staging.take(3)
    assert other.fetch(prompt(1)) == 0
    node.staging.give(taken)
    other.staging.give(held)
    assert other.fetch(prompt(1)) == 2
    node.end()
    other.end()


def test_no_room_in_the_pool_loses_only_the_fetch(store: DictStore) -> None:
    other = Node([store], num_blocks=6)
    running = other.manager.allocate(5 * SIZE)
    assert other.fetch(prompt(1)) == 0
    other.manager.free(running)
    assert other.fetch(prompt(1)) == 5
    other.end()


def test_blocks_cached_meanwhile_are_kept_and_not_written(other: Node) -> None:
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    finished(fetch)
    assert other.compute(prompt(1)[:10]) == 0
    assert other.tiering.attach(fetch) == {"dict": 12}
    assert other.compute(prompt(1)) == 20
    other.end()


def test_blocks_that_left_meanwhile_make_the_fetch_useless(other: Node) -> None:
    other.compute(prompt(1)[:9])
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    finished(fetch)
    assert fetch.first == 2
    other.manager.clear_prefix_cache()
    assert other.tiering.attach(fetch) == {}
    assert other.compute(prompt(1)) == 0
    other.end()


def test_a_store_that_raises_is_a_store_without_blocks(store: DictStore, other: Node) -> None:
    store.fails = True
    assert other.fetch(prompt(1)) == 0
    other.compute(prompt(2))
    assert other.clean() == 5
    other.end()


def test_a_fetch_may_take_half_of_what_computing_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(recompute_s=lambda num_blocks: 0.2 * num_blocks, max_wait_s=0.3)
    monkeypatch.setattr("kvpager.storage.tiers.tiering.time.monotonic", lambda: 100.0)
    short, long = node.tiering.begin(prompt(1, 9)), node.tiering.begin(prompt(2, 41))
    assert short is not None
    assert long is not None
    assert (short.deadline, long.deadline) == (100.2, 100.3)
    node.end()


def test_each_caller_waits_for_a_shared_fetch_as_its_own_prompt_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node(recompute_s=lambda num_blocks: 0.2 * num_blocks, max_wait_s=0.3)
    clock = Clock(100.0)
    monkeypatch.setattr("kvpager.storage.tiers.tiering.time.monotonic", clock)
    fetches, ends = set[Fetch](), []
    for length, wait_s in (41, 60.0), (9, None), (41, None), (41, 90.0):
        fetch = node.tiering.begin(prompt(1, length), wait_s=wait_s)
        assert fetch is not None
        fetches.add(fetch)
        ends.append(fetch.wait_until)
    assert ends == [160.0, 100.2, 100.3, 160.0]
    assert len(fetches) == 1
    node.end()


def test_a_fetch_is_not_joined_by_a_prompt_that_is_computed_sooner() -> None:
    node = Node(recompute_s=lambda _: 0.0)
    fetch = node.tiering.begin(prompt(1), wait_s=60.0)
    assert fetch is not None
    finished(fetch)
    assert node.tiering.begin(prompt(1)) is None
    assert node.tiering.stats().total_declined == 1
    node.tiering.cancel(fetch)
    node.end()


@pytest.mark.parametrize("seed", range(8))
def test_traffic_at_random_reads_what_was_computed(seed: int) -> None:
    chance = random.Random(seed)
    stores = Node().stores
    nodes = [Node(stores, num_blocks=chance.randrange(8, 20), slots=6) for _ in range(2)]
    open_fetches: list[tuple[Node, Fetch]] = []
    for _ in range(150):
        node = chance.choice(nodes)
        tokens = prompt(chance.randrange(6), chance.randrange(2, 26))
        key = chance.choice([{}, {"namespace": "a"}, {"lora": "x"}])
        action = chance.random()
        if action < 0.4:
            node.compute(tokens, **key)
        elif action < 0.6:
            node.tiering.clean(chance.randrange(1, 10))
        elif action < 0.85:
            fetch = node.tiering.begin(tokens, **key)
            if fetch is not None:
                open_fetches.append((node, fetch))
        elif open_fetches:
            node, fetch = open_fetches.pop(chance.randrange(len(open_fetches)))
            if chance.random() < 0.3:
                node.tiering.cancel(fetch)
            else:
                finished(fetch)
                node.tiering.attach(fetch)
        if chance.random() < 0.05:
            stores[0].drop(chance.sample(list(stores[0].blocks), len(stores[0].blocks) // 2))
    for node, fetch in open_fetches:
        node.tiering.cancel(fetch)
    for node in nodes:
        node.end()


def test_an_interrupted_begin_loses_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    node.compute(prompt(1))
    node.clean()
    submit = node.tiering._loader._threads.submit

    def interrupted(*work: Any) -> None:
        submit(*work).result(60)
        raise KeyboardInterrupt

    node.manager.clear_prefix_cache()
    monkeypatch.setattr(node.tiering._loader._threads, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        node.tiering.begin(prompt(1))
    monkeypatch.undo()
    assert node.staging.num_free == node.staging.num_slots
    assert node.tiering.stats().num_fetching == 0
    assert node.fetch(prompt(1)) == 5
    node.end()


def test_a_cancelled_fetch_begins_no_more_transfers() -> None:
    node = Node(num_blocks=64, slots=64)
    node.compute(prompt(1, 40 * SIZE))
    node.clean()
    (store,) = node.stores
    other = Node(node.stores, num_blocks=64, slots=64)
    store.gate.clear()
    fetch = other.tiering.begin(prompt(1, 40 * SIZE))
    assert fetch is not None
    while not fetch.work.running():
        pass
    other.tiering.cancel(fetch)
    store.gate.set()
    finished(fetch)
    assert store.num_loads <= 16
    other.end()


def test_a_cancelled_fetch_asks_no_store() -> None:
    node = Node()
    for seed in range(2):
        node.compute(prompt(seed))
    node.clean()
    (store,) = node.stores
    other = Node(node.stores)
    store.gate.clear()
    busy = [other.tiering.begin(prompt(seed)) for seed in range(2)]  # one for each thread
    while not all(fetch.work.running() for fetch in busy if fetch):
        pass
    waiting = [other.tiering.begin(prompt(seed)) for seed in range(2, 30)]
    for fetch in [*busy, *waiting]:
        assert fetch is not None
        other.tiering.cancel(fetch)
    assert all(fetch.work.cancelled() for fetch in waiting if fetch)
    store.gate.set()
    other.end()


def test_more_than_a_bounded_number_of_fetches_is_refused() -> None:
    node = Node()
    node.compute(prompt(0))
    node.clean()
    other = Node(node.stores)
    node.stores[0].gate.clear()
    fetches = [other.tiering.begin([seed, *prompt(1)]) for seed in range(300)]
    assert sum(fetch is not None for fetch in fetches) == 256
    node.stores[0].gate.set()
    other.end()


def test_every_block_is_saved_however_many_are_idle() -> None:
    node = Node(num_blocks=400, slots=8)
    for seed in range(60):
        node.compute(prompt(seed))
    count = 0
    while saved := node.tiering.clean(8):
        count += saved
        node.settle()
    assert count == len(node.stores[0].blocks) == 300


def test_one_broken_store_keeps_no_block_from_the_next() -> None:
    broken, whole = DictStore(0), DictStore(0)
    node = Node([broken, whole])
    broken.fails = True
    node.compute(prompt(1))
    node.clean()
    assert len(whole.blocks) == 5
    node.end()


# ------------------------------------------------------------------- faster stores


def test_a_block_of_a_lower_store_goes_to_the_stores_above(store: DictStore) -> None:
    stores = [DictStore(0), DictStore(0), store]
    whole = list(store.blocks.items())
    stores[1].blocks = dict(whole[3:])
    store.blocks = dict(whole[:3])
    other = Node(stores)
    assert other.fetch(prompt(1)) == 5
    other.settle()
    assert [len(store.blocks) for store in stores] == [5, 5, 3]
    assert (stores[1].num_saves, store.num_saves) == (3, 5)
    assert all(stores[0].blocks[key] == block for key, block in whole)
    assert other.staging.num_free == other.staging.num_slots
    assert other.compute(prompt(1)) == 20
    assert other.clean() == 0
    other.end()


def test_a_block_is_not_promoted_while_slots_are_short(store: DictStore) -> None:
    stores = [DictStore(0), store]
    other = Node(stores, slots=6)
    assert other.fetch(prompt(1)) == 5
    other.settle()
    assert stores[0].num_saves == 0
    other.end()


def test_a_slot_that_is_promoted_is_not_reused_before_that(store: DictStore) -> None:
    above = DictStore(0)
    other = Node([above, store], slots=10)
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    finished(fetch)
    above.gate.clear()
    assert other.tiering.attach(fetch) == {"dict": 20}
    taken = other.staging.take(10)
    assert len(taken) == 5
    for slot in taken:
        other.staging.slot(slot)[:] = bytes(other.staging.block_bytes)
    above.gate.set()
    other.settle()
    assert above.blocks == store.blocks
    other.staging.give(taken)
    other.end()


# ------------------------------------------------------------------- parts of a fetch


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_a_fetch_may_be_attached_in_parts(most: int) -> None:
    node = Node()
    image = [(6, 15, b"image of 16 byte")]
    node.compute(prompt(1), mm_hashes=image)
    node.clean()
    other = Node(node.stores)
    fetch = other.tiering.begin(prompt(1), mm_hashes=image)
    assert fetch is not None
    finished(fetch)
    assert other.tiering.attach(fetch, 0) == {}
    with pytest.raises(ValueError, match="most=-1"):
        other.tiering.attach(fetch, -1)
    parts = []
    while fetch.slots:
        assert other.tiering.begin(prompt(1), mm_hashes=image) is fetch  # shares what is left
        parts.append(sum(other.tiering.attach(fetch, most).values()) // SIZE)
    assert sum(parts) == 5
    assert max(parts) == min(most, 5)
    assert other.tiering.begin(prompt(1), mm_hashes=image) is None
    assert other.compute(prompt(1), mm_hashes=image) == 20
    other.end()


def test_a_part_that_left_meanwhile_ends_the_fetch(other: Node) -> None:
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    finished(fetch)
    assert other.tiering.attach(fetch, 2) == {"dict": 8}
    other.manager.clear_prefix_cache()
    assert other.tiering.attach(fetch, 2) == {}
    assert not fetch.slots
    assert other.staging.num_free == other.staging.num_slots
    assert other.fetch(prompt(1)) == 5
    other.end()


@pytest.mark.parametrize("is_cleared", [False, True])
def test_a_fetch_may_be_attached_before_it_is_done(
    monkeypatch: pytest.MonkeyPatch, is_cleared: bool
) -> None:
    node, tokens, rest = Node(num_blocks=64, slots=64), prompt(1, 40 * SIZE), threading.Event()
    node.compute(tokens)
    node.clean()
    (store,) = node.stores
    load = store.load

    def load_the_rest_late(keys: Any, into: Any, deadline: float) -> Outcomes:
        assert not store.num_loads or rest.wait(60)
        return load(keys, into, deadline)

    monkeypatch.setattr(store, "load", load_the_rest_late)
    other = Node(node.stores, num_blocks=64, slots=64, max_wait_s=60)
    store.gate.clear()
    fetch = other.tiering.begin(tokens)
    assert fetch is not None
    assert other.tiering.attach(fetch, early=True) == {}
    store.gate.set()
    while not fetch.slots:
        pass
    assert other.tiering.attach(fetch, 10, early=True) == {"dict": 10 * SIZE}
    assert other.tiering.begin(tokens) is fetch  # shares what is left
    if is_cleared:
        other.manager.clear_prefix_cache()
        assert other.tiering.attach(fetch, early=True) == {}
    rest.set()
    finished(fetch)
    assert other.tiering.attach(fetch) == ({} if is_cleared else {"dict": 29 * SIZE})
    assert other.staging.num_free == other.staging.num_slots
    assert other.compute(tokens) == (0 if is_cleared else 39 * SIZE)
    other.end()
