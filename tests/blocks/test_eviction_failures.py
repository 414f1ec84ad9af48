"""A caller's eviction policy or clock that fails: the change it is asked in comes to its end."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.blocks.policies import LRU, POLICIES, Priority
from kvpager.blocks.policies.base import EvictionPolicy
from tests.support.block_histories import History
from tests.support.block_scenarios import committed
from tests.support.clock import Clock
from tests.support.manager_state import handles_of, state_of

NUM_BLOCKS = 24
METHODS = ("admit", "touch", "release", "rank", "forget", "reranked", "retain", "resize")


class Failing(LRU):
    """Raises `error` at call `number` of a method, or returns `answer` in place of a rank."""

    def __init__(self, method: str, number: int, error: BaseException) -> None:
        super().__init__(NUM_BLOCKS)
        self.left = number
        self.num_calls_since = 0
        for name in METHODS:
            setattr(self, name, self._watched(name, method, error, getattr(self, name)))

    def _watched(self, name: str, method: str, error: BaseException, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.num_calls_since += self.left <= 0
            if name == method:
                self.left -= 1
                if not self.left:
                    raise error
            return real(*arguments)

        return call


def play(policy: EvictionPolicy, seed: int, steps: int = 120) -> BlockManager:
    manager = BlockManager(NUM_BLOCKS, 4, 12, eviction=policy, num_events=1000)
    if seed % 2:
        manager.quotas.set("a", floor=4, ceiling=12)
        manager.quotas.set("b", ceiling=10)
    history, chance = History(manager, Clock()), random.Random(seed)
    for step in range(steps):
        history.step(chance)
        manager.check()
        if step % 60 == 30 and not any(plan.ticket for plan in history.work):
            manager.grow(manager.num_blocks + 4)
    return manager


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_a_policy_that_raises_is_replaced_and_harms_nothing(method, kind, caplog) -> None:
    was_hit = False
    for number in (1, 12):
        error = kind("mine")
        policy = Failing(method, number, error)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "kvpager"):
            manager = play(policy, seed=number)
        if policy.left > 0:
            continue
        was_hit = True
        assert policy.num_calls_since == 0
        assert f"Failing failed in {method}" in caplog.text
        assert repr(error) in repr(caplog.records[0].exc_info)
        manager.free(list(handles_of(manager).values()))
        manager.clear_prefix_cache()
        manager.check()
    assert was_hit or method in ("reranked", "retain", "resize")


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    "answer",
    [
        lambda blocks: np.full(len(blocks), np.nan),
        lambda blocks: np.zeros(len(blocks) + 1),
        lambda blocks: ["first"] * len(blocks),
        lambda blocks: None,
        lambda blocks: 0.0,
    ],
)
def test_a_policy_whose_ranks_are_none_is_replaced(answer: Callable[..., Any], caplog) -> None:
    policy: Any = LRU(NUM_BLOCKS)
    policy_class = type("Odd", (LRU,), {"rank": lambda self, blocks: answer(blocks)})
    policy = policy_class(NUM_BLOCKS)
    play(policy, seed=3)
    assert "Odd failed in rank" in caplog.text


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("answer", [[NUM_BLOCKS * 9], [-1], ["a"], None, 7, [[0]]])
def test_a_policy_whose_reranked_blocks_are_none_is_replaced(answer: Any, caplog) -> None:
    policy_class = type("Odd", (LRU,), {"reranked": lambda self, count: answer})
    for seed in range(20):  # some histories evict nothing
        play(policy_class(NUM_BLOCKS), seed=seed)
        if caplog.text:
            break
    assert "Odd failed in reranked" in caplog.text


def test_blocks_leave_least_recently_used_first_after_a_failure() -> None:
    class Newest(LRU):
        works = True

        def rank(self, blocks: Any) -> Any:
            if not self.works:
                raise ZeroDivisionError
            return -super().rank(blocks)

    policy = Newest(6)
    manager = BlockManager(6, 4, eviction=policy)
    for first in (0, 100, 200):
        manager.free(committed(manager, range(first, first + 8)))
    policy.works = False
    manager.free(manager.allocate(4))  # evicts a block by the old ranks, and finds the new ones
    manager.check()
    manager.free(manager.allocate(12))
    assert [manager.match_prefix(range(first, first + 8)) for first in (0, 100, 200)] == [0, 8, 4]


def test_a_log_handler_that_raises_harms_nothing() -> None:
    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise ZeroDivisionError

    logger, handler = logging.getLogger("kvpager"), Handler()
    logger.addHandler(handler)
    try:
        play(Failing("rank", 4, ZeroDivisionError()), seed=2)
    finally:
        logger.removeHandler(handler)


# -------------------------------------------------------------------- clocks


class Broken(Clock):
    works = True

    def __call__(self) -> float:
        if not self.works:
            raise ZeroDivisionError("no time")
        return super().__call__()


def retained(clock: Clock) -> tuple[BlockManager, Any]:
    manager = BlockManager(8, 4, eviction=Priority(8, clock))
    manager.free(committed(manager, range(16)))
    return manager, manager.allocate(range(8))


def test_a_clock_that_fails_in_retain_changes_nothing() -> None:
    clock = Broken()
    manager, sequence = retained(clock)
    before = state_of(manager)
    clock.works = False
    with pytest.raises(ZeroDivisionError, match="no time"):
        manager.pins.retain(sequence, 80, 5.0)
    manager.check()
    after = state_of(manager)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    clock.works = True
    manager.pins.retain(sequence, 80, 5.0)


def test_a_failing_clock_keeps_retained_blocks(caplog) -> None:
    clock = Broken()
    manager, sequence = retained(clock)
    manager.pins.retain(sequence, 80, 5.0)
    manager.free(sequence)
    clock.now, clock.works = 10.0, False
    manager.free(manager.allocate(24))
    manager.check()
    assert "clock of the eviction policy failed" in caplog.text
    assert manager.match_prefix(range(16)) == 8
    clock.works = True
    manager.free(manager.allocate(28))
    manager.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_of_kvpager_are_asked_directly(policy: str) -> None:
    assert type(BlockManager(8, 4, eviction=policy)._state.evictor.policy) is POLICIES[policy]
