"""What a tiering promises about the blocks of namespaces: quotas, ages, pins, oblivion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvpager import OutOfBlocks
from kvpager.storage.tiers.namespaces import Limit, NamespaceKeys
from tests.support.dict_store import DictStore
from tests.support.tier_node import SIZE, Node, finished, prompt


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saved(node: Node, seed: int, **key: Any) -> None:
    node.compute(prompt(seed), **key)
    node.clean()


def dropped(tracked: NamespaceKeys, store: int = 0) -> list[bytes]:
    surplus = tracked.surplus(store)
    tracked.dropped(store, surplus)
    return list(surplus)


# ------------------------------------------------------------------- the keys of a namespace


def test_keys_over_a_quota_are_the_oldest() -> None:
    tracked = NamespaceKeys(2)
    tracked.set_limit("a", Limit(num_blocks=2))
    tracked.add(0, "a", [b"1", b"2"])
    tracked.add(1, "a", [b"1", b"2"])
    tracked.add(0, "b", [b"7", b"8", b"9"])
    assert dropped(tracked) == []
    tracked.add(0, "a", [b"2", b"3", b"4"])
    assert dropped(tracked) == [b"1", b"2"]
    assert (dropped(tracked, 0), dropped(tracked, 1)) == ([], [])
    assert list(tracked.of(0, "a")) == [b"3", b"4"]
    tracked.dropped(0, tracked.of(0, "a"))
    assert list(tracked.of(0, "a")) == []
    assert list(tracked.of(0, "b")) == [b"7", b"8", b"9"]


def test_keys_are_too_old_after_their_first_save() -> None:
    clock = Clock()
    tracked = NamespaceKeys(1, clock)
    tracked.set_limit("a", Limit(ttl_s=10))
    tracked.add(0, "a", [b"1"])
    clock.now = 5
    tracked.add(0, "a", [b"1", b"2"])
    clock.now = 9.9
    assert dropped(tracked) == []
    clock.now = 10
    assert list(tracked.surplus(0)) == [b"1"]
    assert dropped(tracked) == [b"1"]  # until it was dropped
    clock.now = 15
    assert dropped(tracked) == [b"2"]


def test_a_key_that_was_saved_during_its_drop_stays() -> None:
    clock = Clock()
    tracked = NamespaceKeys(1, clock)
    tracked.set_limit("a", Limit(ttl_s=10))
    tracked.add(0, "a", [b"1", b"2"])
    clock.now = 10
    surplus = tracked.surplus(0)
    tracked.add(0, "a", [b"1"], is_new=True)
    tracked.dropped(0, surplus)
    assert list(tracked.of(0, "a")) == [b"1"]
    assert dropped(tracked) == []


def test_lost_keys_do_not_count() -> None:
    tracked = NamespaceKeys(1)
    tracked.set_limit("a", Limit(num_blocks=2))
    tracked.add(0, "a", [b"1", b"2"])
    tracked.remove(0, [b"1", b"unknown"])
    tracked.add(0, "a", [b"3"])
    assert dropped(tracked) == []


def test_a_key_of_two_namespaces_belongs_to_the_first() -> None:
    tracked = NamespaceKeys(1)
    tracked.add(0, "a", [b"1"])
    tracked.add(0, "b", [b"1"])
    assert list(tracked.of(0, "b")) == []
    assert list(tracked.of(0, "a")) == [b"1"]


# ------------------------------------------------------------------- limits


def test_a_namespace_over_its_quota_loses_its_oldest_blocks() -> None:
    node = Node(num_blocks=64)
    (store,) = node.stores
    node.tiering.limit("a", capacity=7 * node.storage.block_bytes)
    saved(node, 9, namespace="b")
    for seed in range(4):
        saved(node, seed, namespace="a")
    assert len(store.blocks) == 5 + 7
    other = Node(node.stores, num_blocks=64)
    assert other.fetch(prompt(3), namespace="a") == 5
    assert other.fetch(prompt(0), namespace="a") == 0
    assert other.fetch(prompt(9), namespace="b") == 5
    other.end()


def test_blocks_that_are_too_old_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    clock = Clock()
    node.tiering._tracked._clock = clock
    node.tiering.limit("a", ttl_s=60)
    saved(node, 1, namespace="a")
    node.manager.clear_prefix_cache()
    clock.now = 59.0
    assert node.fetch(prompt(1), namespace="a") == 5
    node.manager.clear_prefix_cache()
    clock.now = 60.0
    assert node.fetch(prompt(1), namespace="a") == 0
    assert not node.stores[0].blocks
    node.end()


def test_blocks_that_are_too_old_are_not_loaded_if_their_drop_fails() -> None:
    node = Node()
    (store,) = node.stores
    clock = node.tiering._tracked._clock = Clock()
    node.tiering.limit("a", ttl_s=60)
    saved(node, 1, namespace="a")
    node.manager.clear_prefix_cache()
    clock.now, store.drop_fails = 61.0, True
    assert node.fetch(prompt(1), namespace="a") == 0
    store.drop_fails = False
    assert node.fetch(prompt(1), namespace="a") == 0
    assert not store.blocks
    node.end()


def test_a_block_that_left_a_store_by_its_age_is_offered_again() -> None:
    class Silent(DictStore):
        losses: Any = property(lambda _: None, lambda *_: None)

        def drop(self, keys: Sequence[bytes]) -> bool:
            for key in keys:
                self.blocks.pop(key, None)
            return True

    node = Node([Silent(Node().storage.block_bytes)])
    clock = node.tiering._tracked._clock = Clock()
    node.tiering.limit("a", ttl_s=60)
    saved(node, 1, namespace="a")
    clock.now = 61.0
    assert node.fetch(prompt(2), namespace="a") == 0
    assert not node.stores[0].blocks
    assert node.compute(prompt(1), namespace="a") == 20
    assert node.clean() == 5
    assert len(node.stores[0].blocks) == 5
    node.end()


@pytest.mark.parametrize(
    ("namespace", "limits"),
    [(None, {}), (3, {}), ("a", {"capacity": "lots"}), ("a", {"ttl_s": -1}), ("a", {"ttl_s": "x"})],
)
def test_bad_limits_are_refused(namespace: Any, limits: dict[str, Any]) -> None:
    node = Node()
    with pytest.raises((ValueError, TypeError), match=r"namespace|capacity|ttl_s"):
        node.tiering.limit(namespace, **limits)
    node.end()


# ------------------------------------------------------------------- forget


def test_a_forgotten_namespace_is_nowhere() -> None:
    stores = [DictStore(0), DictStore(0)]
    node = Node(stores, num_blocks=32)
    for name in ("a", "b"):
        saved(node, 1, namespace=name)
    assert node.tiering.forget("a").result(60) == 10
    assert [len(store.blocks) for store in stores] == [5, 5]
    node.manager.check()
    assert node.fetch(prompt(1), namespace="a") == 0
    assert node.compute(prompt(1), namespace="a") == 0
    assert node.compute(prompt(1), namespace="b") == 20
    assert node.clean() == 5  # computed again, so saved again
    node.end()


def test_a_namespace_is_forgotten_as_often_as_it_is_saved() -> None:
    node = Node()
    (store,) = node.stores
    for _ in range(3):
        saved(node, 1, namespace="a")
        assert len(store.blocks) == 5
        assert node.compute(prompt(1), namespace="a") == 20
        assert node.clean() == 0  # the store has it
        assert node.tiering.forget("a").result(60) == 5
        assert not store.blocks
    node.end()


@pytest.mark.parametrize("failure", [False, OSError("away")])
def test_blocks_that_a_store_failed_to_drop_are_forgotten_later(failure: Any) -> None:
    class Failing(DictStore):
        def drop(self, keys: Sequence[bytes]) -> bool:
            if self.drop_fails and failure:
                raise failure
            return super().drop(keys)

    store = Failing(Node().storage.block_bytes)
    node = Node([store])
    saved(node, 1, namespace="a")
    store.drop_fails = True
    assert node.tiering.forget("a").result(60) == 0
    store.drop_fails = False
    assert node.tiering.forget("a").result(60) == 5
    assert not store.blocks
    node.end()


def test_a_fetch_of_a_forgotten_namespace_adds_nothing() -> None:
    one = Node()
    saved(one, 1, namespace="a")
    node = Node(one.stores)
    fetch = node.tiering.begin(prompt(1), namespace="a")
    assert fetch is not None
    finished(fetch)
    assert node.tiering.forget("a").result(60) == 5  # loaded, so known
    assert node.tiering.attach(fetch) == {}
    assert not node.stores[0].blocks
    assert node.staging.num_free == node.staging.num_slots
    node.end()


def test_all_fetches_of_a_forgotten_namespace_add_nothing() -> None:
    one = Node(num_blocks=64)
    one.compute(prompt(1, 33), namespace="a")
    one.clean()
    node = Node(one.stores, num_blocks=64)
    fetches = []
    for length in (4, 17):  # the first blocks are computed while others are fetched
        node.compute(prompt(1, length), namespace="a")
        fetch = node.tiering.begin(prompt(1, 33), namespace="a")
        assert fetch is not None
        finished(fetch)
        fetches.append(fetch)
    held = node.manager.allocate(prompt(1, 17), namespace="a")
    node.tiering.attach(fetches[0], 4 - fetches[0].first)
    assert fetches[0].first == fetches[1].first
    node.tiering.forget("a").result(60)
    assert [node.tiering.attach(fetch) for fetch in fetches] == [{}, {}]
    node.manager.free(held)
    node.end()


def test_a_namespace_is_forgotten_while_the_interpreter_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node()
    saved(node, 1, namespace="a")
    with monkeypatch.context() as ending:
        for executor in (node.tiering._saver._thread, node.tiering._loader._threads):
            ending.setattr(executor, "submit", ended)
        assert node.fetch(prompt(2)) == 0
        assert node.tiering.forget("a").result(60) == 5
    node.end()


def ended(*_: Any) -> None:
    raise RuntimeError("cannot schedule new futures after interpreter shutdown")


def test_a_namespace_with_a_quota_on_the_device_is_forgotten_too() -> None:
    node = Node(num_blocks=32)
    node.manager.quotas.set("a", ceiling=20)
    saved(node, 1, namespace="a")
    held = node.manager.allocate([*prompt(1)[:9]], namespace="a")
    node.tiering.forget("a").result(60)
    node.manager.check()
    assert node.manager.match_prefix(prompt(1), namespace="a") <= 8  # blocks that are held stay
    node.manager.free(held)
    node.tiering.forget("a").result(60)
    node.manager.check()
    assert node.manager.match_prefix(prompt(1), namespace="a") == 0
    node.end()


def test_a_forgotten_namespace_needs_a_name() -> None:
    node = Node()
    forget: Any = node.tiering.forget
    with pytest.raises(TypeError, match="namespace=None: expected a name"):
        forget(None)
    node.end()


# ------------------------------------------------------------------- warm, retain


def test_warmed_prompts_are_cached_without_a_request() -> None:
    one = Node(num_blocks=64)
    for seed in range(3):
        saved(one, seed, namespace="a")
    node = Node(one.stores, num_blocks=64, max_wait_s=0.0)
    prompts = [prompt(seed) for seed in range(4)]
    assert node.tiering.warm(prompts, namespace="a") == 3 * 20
    assert node.tiering.warm(prompts, namespace="a") == 0
    assert [node.compute(each, namespace="a") for each in prompts] == [20, 20, 20, 0]
    node.end()


def test_a_retained_prompt_stays_on_the_device() -> None:
    node = Node(num_blocks=8)
    node.compute(prompt(1))
    with node.tiering.retain(prompt(1)) as retained:
        assert retained.num_tokens == 20
        with pytest.raises(OutOfBlocks):
            node.manager.allocate(4 * SIZE)
        assert node.clean() == 0
    retained.release()
    assert node.tiering.has_news
    assert node.clean() == 5
    node.end()


def test_the_end_of_a_tiering_releases_retained_prompts() -> None:
    node = Node(num_blocks=8)
    node.compute(prompt(1))
    retained = node.tiering.retain(prompt(1))
    node.end()
    assert retained.num_tokens == 0
    retained.release()
