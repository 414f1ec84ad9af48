"""Floors, fences and retention where they are easily broken: each was, once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.accounts import Account
from kvpager.blocks.eviction_queues import Queue
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.stats import BlockStatus
from tests.support.clones import clone_of
from tests.support.manager_state import handles_of, state_of


def cache(manager: BlockManager, tokens: range, namespace: str | None = None) -> None:
    manager.free(manager.allocate(list(tokens), namespace=namespace), publish=True)


def test_a_floor_is_kept_even_if_its_blocks_rank_lowest() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=4)
    cache(manager, range(16), "acme")  # idle for longest
    cache(manager, range(100, 116), "b")
    manager.allocate(12, namespace="b")
    assert manager.match_prefix(list(range(16)), namespace="acme") == 16
    manager.check()


def test_idle_blocks_before_held_ones_leave_one_by_one() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=4)
    sequence = manager.allocate(list(range(20)), namespace="acme")
    manager.commit(sequence)
    manager.drop_before(sequence, 16)
    manager.allocate(16, namespace="b")  # needs one block of acme's four idle ones
    assert manager.quotas.used("acme") == 4
    assert manager.match_prefix(list(range(20)), namespace="acme") == 12
    manager.check()


def test_the_deepest_deferred_run_is_evicted_first() -> None:
    manager = BlockManager(31, 4)
    front, left, right = list(range(40)), list(range(100, 140)), list(range(200, 240))
    pair = []
    for tail in (left, right):
        pair.append(manager.allocate(front + tail))
        manager.commit(pair[-1])
    manager.drop_before(pair, 76)  # the last block of each is held; the 28 before are idle
    manager.allocate(4 * manager.num_free_blocks + 4)
    assert manager.match_prefix(front) == 40
    assert manager.stats().total_evicted == 2  # one idle block, and the held one behind it
    manager.check()


def test_what_would_make_a_floor_a_lie_is_refused() -> None:
    manager = BlockManager(20, 4)
    tokens = list(range(20))
    first, duplicate = (manager.allocate(tokens, namespace="b") for _ in range(2))
    manager.commit([first, duplicate])
    manager.quotas.set("a", floor=10)
    manager.free(first)
    manager.allocate(20, namespace="b")
    with pytest.raises(ValueError, match="for the floors"):
        manager.pins.pin(duplicate)
    with pytest.raises(ValueError, match="for the floors"):
        manager.shrink(19)
    with pytest.raises(ValueError, match="11 blocks, but only 10 are available"):
        manager.quotas.set("c", floor=1)
    manager.check()
    manager.allocate(40, namespace="a")
    with pytest.raises(OutOfBlocks) as caught:
        manager.allocate(4, namespace="b")
    assert caught.value.missing == 1


def test_ids_of_speculative_tokens_that_a_fork_shares_are_refused() -> None:
    manager = BlockManager(8, 4)
    sequence = manager.allocate([])
    manager.append(sequence, 4, speculative=True)
    child = manager.fork(sequence)
    before = state_of(manager)
    with pytest.raises(ValueError, match="a fork shares these speculative tokens"):
        manager.accept(child, 4, [1, 2, 3, 4])
    after = state_of(manager)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    manager.accept(child, 4)
    manager.check()


def test_growing_does_not_forget_what_is_held_back() -> None:
    manager = BlockManager(8, 4, 8, fences=True)
    sequence = manager.allocate(8)
    plans = [manager.swap(sequence, tier) for tier in ("host", "device")]
    manager.grow(9)
    manager.free(sequence)
    manager.check()
    assert (manager.queries.block_statuses() == BlockStatus.KEPT).sum() == 4
    for plan in plans:
        manager.copies.complete(plan)
    assert manager.stats().num_free == 9


def test_blocks_cut_off_by_shrinking_are_kept_until_copied() -> None:
    manager = BlockManager(8, 4, fences=True)
    first = manager.allocate(20)
    manager.allocate(4)
    manager.free(first)
    plan = manager.shrink(4)
    with pytest.raises(ValueError, match="plan of `shrink` is unfinished"):
        manager.grow(8)
    manager.copies.complete(plan)
    manager.grow(8)
    manager.check()


def test_a_refused_quota_changes_nothing() -> None:
    manager = BlockManager(16, 4)
    for tail in ([1, 2, 3, 4], [5, 6, 7, 8]):
        manager.commit(manager.allocate([*range(8), *tail], namespace="n"))
    before = state_of(manager)
    with pytest.raises(ValueError, match="holds 4 blocks"):
        manager.quotas.set("n", ceiling=1)
    after = state_of(manager)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_handles_of_one_sequence_are_equal() -> None:
    manager = BlockManager(8, 4)
    live = [manager.allocate(4) for _ in range(3)]
    assert set(handles_of(manager).values()) == set(live)
    victims = manager.victims(live, 2)
    assert victims == live[:2]
    assert victims[0] is live[0]
    assert BlockManager(8, 4).allocate(4) != live[0]


@pytest.mark.parametrize(
    "ask",
    [
        lambda manager, sequence: manager.allocate(-1),
        lambda manager, sequence: manager.append(sequence, -1),
        lambda manager, sequence: manager.append([sequence], -1),
        lambda manager, sequence: manager.fork(sequence, 0),
        lambda manager, sequence: manager.fork(sequence, 2**31 - 1),
        lambda manager, sequence: manager.append(sequence, 2**31),
    ],
)
def test_counts_of_too_little_or_too_much_are_refused(ask) -> None:
    manager = BlockManager(8, 4)
    sequence = manager.allocate(3)
    before = state_of(manager)
    with pytest.raises(ValueError, match="expected at"):
        ask(manager, sequence)
    after = state_of(manager)
    assert all(np.array_equal(before[name], after[name]) for name in before)


# -------------------------------------------------------------------- many tenants


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the accounts and queues that are looked at."""
    looked = [0]
    for owner, name in ((Account, "floor_after"), (Queue, "first")):
        method = getattr(owner, name)

        def counted(*args: object, method: Callable = method) -> object:
            looked[0] += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counted)
    return looked


@pytest.mark.parametrize("floor", [0, 1, 8])
def test_a_call_costs_the_same_however_many_tenants_have_quotas(monkeypatch, floor: int) -> None:
    looked = looks(monkeypatch)

    def costs(num_tenants: int) -> dict[str, int]:
        manager = BlockManager(2000, 4)
        found = {}

        def cost(name: str, call: Callable[[], object]) -> object:
            looked[0] = 0
            result = call()
            found[name] = looked[0]
            return result

        for tenant in range(num_tenants):
            manager.quotas.set(f"t{tenant}", floor=floor, ceiling=1000)
        for tenant in range(0, num_tenants, 2):
            cache(manager, range(12), f"t{tenant}")
        for number in range(2000 // 40):  # the pool is full of the cached prompts of one tenant
            cache(manager, range(1000 * number, 1000 * number + 160), "t0" if number < 20 else "x")
        sequence = cost("allocate", lambda: manager.allocate(range(40), namespace="t1"))
        cost("append", lambda: manager.append(sequence, 40))
        cost("commit", lambda: manager.commit(sequence))
        cost("free", lambda: manager.free(sequence))
        cost("change", lambda: manager.quotas.set("t1", floor=floor, ceiling=900))
        cost("drop", lambda: manager.quotas.drop("t1"))
        cost("set", lambda: manager.quotas.set("t1", floor=floor, ceiling=900))
        manager.check()
        assert manager.queries.num_evicted_blocks
        return found

    few, many = costs(6), costs(60)
    assert all(many[name] <= few[name] + 8 for name in few), (few, many)


def test_a_lowered_floor_makes_blocks_evictable_again() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("kept", floor=4)
    cache(manager, range(16), "kept")
    cache(manager, range(100, 116), "b")
    manager.free(manager.allocate(16, namespace="b"))  # looks past what is kept
    with pytest.raises(OutOfBlocks):
        manager.allocate(20, namespace="b")
    manager.quotas.set("kept", floor=1)
    manager.check()
    manager.allocate(28, namespace="b")
    manager.check()
    assert manager.quotas.used("kept") == 1
    manager.quotas.drop("kept")
    manager.check()
    manager.allocate(4)
    manager.check()


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("seed", range(6))
def test_quotas_that_come_and_go_are_those_of_a_recount(seed: int) -> None:
    """Blocks leave in the same order as in a manager that counts from the start."""
    random = np.random.default_rng(seed)
    manager = BlockManager(24, 2, num_host_blocks=8)
    names = [None, "a", "b", "c", "d"]
    sequences: list[SequenceHandle] = []
    for _ in range(150):
        name = names[random.integers(len(names))]
        with contextlib.suppress(OutOfBlocks, ValueError):
            match int(random.integers(6)):
                case 0:
                    ceiling = int(random.integers(4, 24))
                    manager.quotas.set(name, floor=int(random.integers(0, 5)), ceiling=ceiling)
                case 1:
                    manager.quotas.drop(name)
                case 2 if sequences:
                    manager.free(sequences.pop(random.integers(len(sequences))), publish=True)
                case 3 if sequences:
                    manager.append(sequences[0], random.integers(0, 3, 3))
                case _:
                    ids = random.integers(0, 2, random.integers(1, 12))
                    sequences.append(manager.allocate(ids, namespace=name))
                    manager.commit(sequences[-1])
        manager.check()
    recounted = clone_of(manager)
    recounted._state.recount(recounted._state.accounts.limits)
    for one in (manager, recounted):
        one.free(list(handles_of(one).values()))
    for _ in range(12):
        with contextlib.suppress(OutOfBlocks):
            for one in (manager, recounted):
                one.free(one.allocate(6, namespace="a"))
        found, expected = state_of(manager), state_of(recounted)
        assert all(np.array_equal(found[key], expected[key]) for key in found)
