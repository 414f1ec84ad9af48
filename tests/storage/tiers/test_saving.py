"""A block counts as saved when a store has answered that it has it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.tier_node import Node, finished, prompt


@pytest.mark.parametrize("answer", [Saved.REFUSED, Saved.LATE, None])
def test_a_block_that_no_store_took_is_dirty_and_offered_once_a_use(answer: Saved | None) -> None:
    node = Node(num_blocks=8)
    (store,) = node.stores
    store.fails, store.answer = answer is None, answer or Saved.SAVED
    node.compute(prompt(1))
    assert node.clean() == 5
    assert node.clean() == 0
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 5
    node.manager.clear_prefix_cache()
    assert node.manager.cached.num_dropped_dirty == 5
    node.end()


@pytest.mark.parametrize("finish_by", [None, 60.0])
def test_saves_share_one_deadline_once_the_tiering_closes(finish_by: float | None) -> None:
    class Noting(DictStore):
        def save(self, keys: Any, blocks: Any, deadline: float) -> Any:
            deadlines.append(deadline)
            return super().save(keys, blocks, deadline)

    deadlines: list[float] = []
    node = Node([Noting(0)], num_blocks=64, max_wait_s=100.0)
    store = node.stores[0]
    store.gate.clear()
    for seed in range(5):
        node.compute(prompt(seed))
        assert node.tiering.clean() == 5
    while not deadlines:  # the thread waits in the first save
        pass
    if finish_by is not None:
        node.tiering.finish_by(finish_by)
    shutdown = node.tiering._saver._thread.shutdown
    node.tiering._saver._thread.shutdown = lambda: (store.gate.set(), shutdown())
    node.end()
    assert len(set(deadlines[1:])) == 1
    assert len(deadlines) == 5
    if finish_by is not None:
        assert deadlines[-1] == finish_by


def test_a_saved_block_is_evicted_without_a_loss() -> None:
    node = Node()
    node.compute(prompt(1))
    assert node.clean() == 5
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 0  # its store has it
    node.manager.clear_prefix_cache()
    assert node.manager.cached.num_dropped_dirty == 0
    node.end()


def test_a_block_that_a_store_lost_is_offered_again_after_its_use() -> None:
    node = Node()
    (store,) = node.stores
    node.compute(prompt(1))
    node.clean()
    store.capacity = 4
    node.compute(prompt(2, 9))
    assert node.clean() == 2  # pushes three others out
    store.capacity = None
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 3
    node.end()


class Silent(DictStore):
    """A store that does not report its losses."""

    def __init__(self) -> None:
        super().__init__(0)
        del self.losses


def test_blocks_are_offered_again_to_a_server_that_lost_them() -> None:
    node = Node([Silent()], num_blocks=64)
    (store,) = node.stores
    node.compute(prompt(1))
    assert node.clean() == 5
    store.blocks.clear()
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 0  # it was not asked
    longer = [*prompt(1), *prompt(2)]
    assert node.fetch(longer) == 0
    assert node.compute(longer) == 20
    assert node.clean() == 10
    assert len(store.blocks) == 10
    node.end()


def test_a_server_that_lost_a_beginning_still_serves_the_rest() -> None:
    node = Node([Silent()], num_blocks=64)
    (store,) = node.stores
    longer = [*prompt(1), *prompt(2)]
    node.compute(longer)
    node.clean()
    other = Node([store], num_blocks=64)
    other.compute(prompt(1))
    del store.blocks[list(store.blocks)[5]]  # of blocks 9 8 7 6 5 4 3 2 1 0
    assert other.fetch(longer) == 5
    other.end()


def test_a_server_that_is_bypassed_lost_nothing() -> None:
    class Away(Silent):
        bypassed = False

        def find(self, keys: Any) -> int:
            return 0 if self.bypassed else super().find(keys)

    away = Away()
    node = Node([away], num_blocks=64)
    node.compute(prompt(1))
    node.clean()
    away.bypassed = True
    longer = [*prompt(1), *prompt(2)]
    assert node.fetch(longer) == 0
    away.bypassed = False
    assert node.compute(longer) == 20
    assert node.clean() == 5
    node.end()


def test_a_block_that_a_load_misses_is_offered_again() -> None:
    node = Node(num_blocks=64)
    (store,) = node.stores
    node.compute(prompt(1))
    node.clean()
    other = Node(node.stores, num_blocks=64)
    store.lost = set(store.blocks)
    may_load = threading.Event()
    for _ in range(2):
        other.tiering._loader._threads.submit(may_load.wait, 60)
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    other.compute(prompt(1))  # meanwhile
    assert other.clean() == 5
    may_load.set()
    finished(fetch)
    other.tiering.cancel(fetch)
    other.compute(prompt(1))
    assert other.clean() == 5
    other.end()


def test_a_store_with_too_little_room_is_not_offered_blocks_without_end() -> None:
    node = Node()
    (store,) = node.stores
    store.capacity = 2
    node.compute(prompt(1))
    assert node.clean() == 5
    assert store.num_saves == 5
    node.manager.clear_prefix_cache()
    assert node.manager.cached.num_dropped_dirty == 3
    node.end()


def test_an_answer_that_comes_after_the_block_changed_marks_nothing() -> None:
    node = Node(num_blocks=6)
    (store,) = node.stores
    node.compute(prompt(1))
    store.gate.clear()
    assert node.tiering.clean() == 5
    node.compute(prompt(2))  # in the same blocks
    store.gate.set()
    node.settle()
    assert node.manager.cached.num_dropped_dirty == 5  # not waited for
    assert node.clean() == 5
    node.end()


def test_a_refusing_store_does_not_hide_that_another_has_the_block() -> None:
    stores = [DictStore(0), DictStore(0)]
    stores[0].answer = Saved.REFUSED
    node = Node(stores)
    node.compute(prompt(1))
    node.clean()
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 0
    node.manager.clear_prefix_cache()
    assert node.manager.cached.num_dropped_dirty == 0
    node.end()


def test_a_store_that_is_bypassed_is_offered_nothing() -> None:
    class Away(DictStore):
        bypassed = True

    away = Away(0)
    node = Node([away])
    node.compute(prompt(1))
    assert node.clean() == 0  # no block is copied for it
    away.bypassed = False
    assert node.compute(prompt(1)) == 20
    assert node.clean() == 5
    assert len(away.blocks) == 5
    node.end()


def test_a_private_store_gets_blocks_shortly_before_they_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Private(DictStore):
        is_private = True

    monkeypatch.setattr("kvpager.storage.tiers.tiering._AHEAD_MIN", 6)
    node = Node([Private(0)])
    for seed in range(2):
        node.compute(prompt(seed))
    assert node.clean() == 0  # 6 blocks are free
    assert not node.tiering.has_news
    node.compute(prompt(2))
    assert node.clean() == 5
    for seed in range(3, 20):
        node.compute(prompt(seed))
        assert node.tiering.has_news
        node.clean()
    assert node.manager.cached.num_dropped_dirty == 0
    assert node.fetch(prompt(0)) == 5
    node.end()


def test_a_shared_store_gets_blocks_as_soon_as_they_are_idle() -> None:
    class Private(DictStore):
        is_private = True

    node = Node([Private(0), DictStore(0)], num_blocks=600)
    node.compute(prompt(1))
    assert node.clean() == 5
    node.end()
