"""A store is asked when it is likely to be faster than the model."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager.storage.tiers.costs import TransferCost
from kvpager.storage.tiers.protocol import Loaded
from tests.support.dict_store import DictStore
from tests.support.tier_node import Node, finished, prompt


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_estimate_is_latency_and_bytes_over_bandwidth() -> None:
    cost = TransferCost(Clock())
    assert (cost.load_s(1000), cost.latency_s, cost.bytes_per_s) == (0, 0, 0)
    cost.found(0.5)
    cost.loaded(1000, 2.0)
    assert cost.load_s(500) == pytest.approx(1.5)
    assert cost.bytes_per_s == pytest.approx(500)


def test_an_estimate_follows_a_store_that_becomes_slow() -> None:
    cost = TransferCost(Clock())
    cost.loaded(1000, 1.0)
    for _ in range(30):
        cost.loaded(1000, 10.0)
    assert cost.load_s(1000) == pytest.approx(10, rel=0.05)
    for _ in range(30):
        cost.loaded(1000, 1.0)
    assert cost.load_s(1000) == pytest.approx(1, rel=0.05)


def test_a_slow_store_is_tried_again_after_a_while() -> None:
    clock = Clock()
    cost = TransferCost(clock)
    assert cost.is_worth(1000, 0.1)
    cost.begin_load()
    cost.loaded(1000, 1.0)
    assert not cost.is_worth(1000, 0.1)
    assert cost.is_worth(1000, 1.1)
    clock.now = 30.0
    assert cost.is_worth(1000, 0.1)
    cost.begin_load()
    assert not cost.is_worth(1000, 0.1)  # one load finds out


def slow_and_fast() -> tuple[DictStore, DictStore, Node]:
    one = Node()
    one.compute(prompt(1))
    one.clean()
    (fast,) = one.stores
    slow = DictStore(0)
    slow.blocks = dict(fast.blocks)
    node = Node([slow, fast], recompute_s=lambda num_blocks: num_blocks, max_wait_s=60)
    node.tiering._loader.costs[0].loaded(node.storage.block_bytes, 1.1)
    return slow, fast, node


def test_a_slow_store_is_left_out() -> None:
    slow, fast, node = slow_and_fast()
    assert node.fetch(prompt(1)) == 5
    assert (slow.num_loads, fast.num_loads) == (0, 5)
    node.end()


def test_no_fetch_begins_if_the_model_is_faster_than_all_stores() -> None:
    slow, fast, node = slow_and_fast()
    node.tiering._loader.costs[1].found(6.0)
    assert node.tiering.begin(prompt(1)) is None
    assert node.tiering.stats().total_declined == 1
    assert (slow.num_loads, fast.num_loads) == (0, 0)
    node.end()


def test_a_store_with_few_of_the_blocks_is_judged_by_these() -> None:
    _, fast, node = slow_and_fast()
    fast.drop(list(fast.blocks)[:3])  # of blocks 4 3 2 1 0
    node.tiering._loader.costs[1].found(3.0)
    fetch = node.tiering.begin(prompt(1))
    assert fetch is not None  # 5 blocks would be worth it
    finished(fetch)
    assert node.tiering.attach(fetch) == {}
    assert fast.num_loads == 0
    node.end()


def test_blocks_that_were_too_late_to_be_tried_do_not_count_as_loaded() -> None:
    class Slow(DictStore):
        def load(self, keys: Any, into: Any, deadline: float) -> Any:
            outcomes = super().load(keys, into, deadline)
            outcomes[1:] = Loaded.LATE
            return outcomes

    one = Node()
    one.compute(prompt(1))
    one.clean()
    slow = Slow(one.storage.block_bytes)
    slow.blocks = one.stores[0].blocks
    node = Node([slow])
    (cost,) = node.tiering._loader.costs
    measured = list[int]()
    cost.loaded = lambda num_bytes, seconds: measured.append(num_bytes)
    assert node.fetch(prompt(1)) == 1
    assert measured == [2 * one.storage.block_bytes]  # the second was tried
    node.end()


def test_loads_are_measured() -> None:
    one = Node()
    one.compute(prompt(1))
    one.clean()
    other = Node(one.stores)
    other.fetch(prompt(1))
    (tier,) = other.tiering.stats().tiers
    assert tier.name == "dict"
    assert tier.bytes_per_s > 0
    assert tier.latency_s > 0
    other.end()
