"""Published KV events: a router that follows them knows what the manager has cached."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, KVPagerError
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.kv_events.block_names import BlockNames
from kvpager.kv_events.settings import KVEvents
from kvpager.kv_events.translator import Translator
from tests.support.prefixes import A, B, C, cache, evict

pytest.importorskip("msgspec")
pytest.importorskip("zmq")
from kvpager.kv_events.publisher import Publisher, names_of
from tests.support.kv_router import Router, apply

LOCAL = "tcp://127.0.0.1:0"
Open = Callable[..., tuple[BlockManager, Publisher, Router]]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Return a function that makes a manager, its publisher and a router."""
    closing: list[Any] = []

    def make(num_blocks: int = 16, *, num_events: int = 1000, **settings: Any) -> Any:
        manager = BlockManager(num_blocks, 4, num_events=num_events)
        chosen = KVEvents(LOCAL, **{"replay_endpoint": LOCAL} | settings)
        publisher = Publisher(manager, chosen)
        router = Router(publisher, settings.get("topic", ""))
        closing.extend((publisher, router))
        return manager, publisher, router

    yield make
    for each in closing:
        each.close()
        assert getattr(each, "error", None) is None


def expected(manager: BlockManager, names: BlockNames | None = None) -> dict[Any, Any]:
    """Return the index of a router that gets all cached blocks in one batch."""
    names = names or names_of(KVEvents(LOCAL), manager)
    index: dict[Any, Any] = {}
    for message in Translator(names, windows=manager.windows).translate(manager.events.published()):
        apply(index, message)
    return index


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def heard(manager: BlockManager, router: Router, prompt: list[int]) -> list[bytes]:
    """Cache and drop a prompt until the router, whose connection takes a moment, hears of it."""
    for _ in range(400):
        cache(manager, prompt)
        manager.clear_prefix_cache()
        if (frames := router.hear(50)) is not None:
            return frames
    raise AssertionError("the router hears nothing")


def test_a_router_knows_the_cached_blocks(opened: Open) -> None:
    manager, _, router = opened()
    cache(manager, A + B)
    cache(manager, A + C, namespace="acme")
    router.catch_up()
    assert router.index == expected(manager)
    assert len(router.index) == 4


def test_a_block_that_left_is_forgotten(opened: Open) -> None:
    manager, _, router = opened(2)
    cache(manager, A + B)
    router.catch_up()
    evict(manager)
    router.catch_up()
    assert router.index == expected(manager)
    assert len(router.index) == 1


def test_a_subscriber_gets_topic_number_and_payload(opened: Open) -> None:
    manager, _, router = opened(topic="kv@pod@model")
    topic, first, payload = heard(manager, router, A)
    assert topic == b"kv@pod@model"
    assert len(first) == 8
    router.learn(first, payload)
    following = heard(manager, router, A)
    assert int.from_bytes(following[1], "big") == int.from_bytes(first, "big") + 1


def test_a_router_of_another_topic_hears_nothing_of_it(opened: Open) -> None:
    manager, publisher, router = opened(topic="kv@a")
    with Router(publisher, "kv@b") as other:
        heard(manager, router, A)
        assert other.hear(0) is None


def test_a_replay_has_only_the_batches_asked_for(opened: Open) -> None:
    manager, _, router = opened()
    router.catch_up()
    cache(manager, A)
    assert router.catch_up() == 1
    assert router.catch_up() == 0


def test_a_replay_of_maps_has_topics_as_vllm_sends_them(opened: Open) -> None:
    _, _, router = opened(topic="kv")
    (frames,) = router.ask(number(0))
    assert frames[:2] == [b"kv", number(0)]


def test_a_replay_of_arrays_has_none_as_vllm_sent_them(opened: Open) -> None:
    _, _, router = opened(topic="kv", encoding="arrays")
    (frames,) = router.ask(number(0))
    assert frames[:1] == [number(0)]


def test_a_router_far_behind_gets_all_cached_blocks(opened: Open) -> None:
    manager, _, router = opened(queue_size=3)
    for token in range(10):
        cache(manager, [token] * 4)
        router.catch_up()
    router.next_number, router.index = 2, {"stale": None}
    router.catch_up()
    assert router.index == expected(manager)
    assert len(router.index) == 10


def test_a_router_of_an_earlier_process_gets_all_cached_blocks(opened: Open) -> None:
    manager, _, router = opened()
    cache(manager, A)
    router.next_number, router.index = 10_000, {"stale": None}
    router.catch_up()
    assert router.index == expected(manager)


def test_lost_events_are_made_good(opened: Open) -> None:
    manager, _, router = opened(num_events=2, interval_s=1.0)
    for token in range(8):
        cache(manager, [token] * 4)
    router.catch_up()
    assert router.index == expected(manager)
    assert len(router.index) == 8


def test_replays_are_kept_within_their_memory(opened: Open) -> None:
    manager, publisher, router = opened(64, replay_memory=1000)
    for token in range(40):
        cache(manager, [token] * 4)
        router.ask(number(2**40))
    kept = list(publisher._sent.since(0))
    assert sum(len(payload) for _, payload in kept) <= 1000


def test_a_bad_request_for_a_replay_is_ignored(opened: Open) -> None:
    _, _, router = opened()
    for frames in ([b""], [b"", b"1234567"], [b"", b"x" * 9], [b"", number(0), b""]):
        router._replay.send_multipart(frames)
    assert router.catch_up() == 1


def test_a_router_that_never_reads_holds_nothing_up(opened: Open) -> None:
    """Its queue is full after a few batches. The publisher and other routers go on."""
    manager, publisher, router = opened(64, queue_size=2)
    with Router(publisher) as slow:
        for token in range(200):
            for _ in range(5):
                slow._replay.send_multipart([b"", number(0)])
            cache(manager, [token] * 4)
        router.next_number = 2**40
        router.catch_up()
        assert router.index == expected(manager)


def test_closing_clears_what_routers_know(opened: Open) -> None:
    manager, publisher, router = opened()
    heard(manager, router, A)
    publisher.close()
    batches = []
    while (frames := router.hear(2000)) is not None:
        batches.append(frames)
        if b"AllBlocksCleared" in frames[2]:
            break
    assert b"AllBlocksCleared" in batches[-1][2]


def test_closing_twice_is_fine_and_ends_the_thread(opened: Open) -> None:
    _, publisher, _ = opened()
    publisher.close()
    publisher.close()
    assert not [each for each in threading.enumerate() if each is publisher._thread]


def test_an_address_in_use_is_an_error(opened: Open) -> None:
    _, publisher, _ = opened()
    with pytest.raises(OSError, match="Choose another address"):
        Publisher(BlockManager(4, 4, num_events=10), publisher.endpoint)


def test_a_manager_without_events_is_refused() -> None:
    with pytest.raises(ValueError, match="Pass num_events"):
        Publisher(BlockManager(4, 4), LOCAL)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_fork_leaves_the_publisher_alone(opened: Open) -> None:
    manager, publisher, router = opened()
    child = multiprocessing.get_context("fork").Process(target=publisher.close)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    cache(manager, A)
    router.catch_up()
    assert router.index == expected(manager)


def make_blocks() -> BlockManager:
    return BlockManager(24, 4, eviction="lifetime", num_events=50)


def make_groups() -> BlockManager:
    return GroupedManager((8, None, 4), 72, 4, num_events=10_000)


@pytest.mark.parametrize("block_hashes", ["kvpager", "sha256"])
@pytest.mark.parametrize("make", [make_blocks, make_groups])
def test_a_router_knows_the_cache_after_a_thousand_operations(
    make: Callable[[], BlockManager], block_hashes: Any
) -> None:
    random, manager, live = np.random.default_rng(7), make(), list[Any]()
    chosen = KVEvents(LOCAL, replay_endpoint=LOCAL, block_hashes=block_hashes, queue_size=40)
    with Publisher(manager, chosen) as publisher, Router(publisher) as router:
        for step in range(1000):
            try:
                change(manager, live, random)
            except KVPagerError:
                manager.free([live.pop()] if live else [])
            if not random.integers(20) or step == 999:
                router.catch_up()
                assert router.index == expected(manager, publisher._translator._names)
        assert manager.queries.num_evicted_blocks > 100


def change(manager: BlockManager, live: list[Any], random: np.random.Generator) -> None:
    """Do something at random."""
    choice = random.integers(8)
    if choice <= 2:
        ids = random.integers(0, 2, random.integers(1, 24)).tolist()
        images = [(0, 2, b"x")] if len(ids) > 4 and not random.integers(3) else []
        name, lora = [None, "a"][random.integers(2)], [None, "x"][random.integers(2)]
        live.append(manager.allocate(ids, namespace=name, lora=lora, mm_hashes=images))
        manager.commit(live[-1])
    elif choice == 3 and live:
        manager.append(live, [[1]] * len(live))
        manager.commit(live)
    elif choice == 4 and live:
        live.append(manager.fork(live[random.integers(len(live))]))
    elif choice == 5:
        manager.shrink(manager.num_blocks - 1)
    elif choice == 6:
        manager.grow(manager.num_blocks + 1)
    elif live:
        manager.free(live.pop(random.integers(len(live))))
