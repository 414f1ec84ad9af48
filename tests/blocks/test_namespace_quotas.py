"""Quotas: the most and the least blocks of a namespace."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.quotas import Quota
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfQuota
from tests.support.clones import clone_of
from tests.support.prefixes import A, B, C, cache, committed


def room(manager: BlockManager, namespace: str | None) -> int:
    """Return how many blocks a namespace could get now."""
    clone = clone_of(manager)
    num_blocks = 0
    with suppress(OutOfBlocks):
        while True:
            clone.allocate(1, namespace=namespace)
            clone.check()
            num_blocks += 1
    return num_blocks


def test_a_namespace_gets_no_more_than_its_ceiling() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    manager.allocate(12, namespace="acme")
    with pytest.raises(OutOfBlocks, match=r"namespace 'acme' may have 3 blocks\. Free or swap"):
        manager.allocate(1, namespace="acme")
    assert manager.quotas.used("acme") == 3
    assert room(manager, "other") == room(manager, None) == 5
    manager.check()


def test_a_quota_error_names_the_namespace_in_a_full_pool() -> None:
    manager = BlockManager(4, 4)
    manager.quotas.set("acme", ceiling=2)
    held = manager.allocate(8, namespace="acme")
    manager.allocate(8)
    for call in (
        lambda: manager.append(held, 4),
        lambda: manager.allocate(4, namespace="acme"),
        lambda: manager.allocate(4, namespace="acme", reserve=1),
    ):
        with pytest.raises(OutOfQuota, match="'acme' may have 2 blocks") as caught:
            call()
        copied = copy.copy(caught.value)
        assert copied.namespace == caught.value.namespace == "acme"
        assert (str(copied), copied.missing) == (str(caught.value), caught.value.missing)
    with pytest.raises(OutOfBlocks) as refused:
        manager.allocate(4)
    assert not isinstance(refused.value, OutOfQuota)


def test_at_its_ceiling_a_namespace_evicts_its_own_blocks_first() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    cache(manager, A, "other")  # the least recently used of all
    cache(manager, A + B, "acme")
    manager.allocate(8, namespace="acme")
    manager.check()
    assert manager.match_prefix(A, namespace="other") == 4
    assert manager.match_prefix(A + B, namespace="acme") == 4
    assert manager.quotas.used("acme") == 3


def test_nobody_else_can_take_a_floor() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=3)
    assert room(manager, "other") == room(manager, None) == 5
    assert room(manager, "acme") == 8
    manager.allocate(20)
    with pytest.raises(OutOfBlocks, match="floors of other namespaces reserve the rest"):
        manager.allocate(1, namespace="other")
    manager.allocate(12, namespace="acme")
    manager.check()


def test_what_is_cached_within_a_floor_nobody_else_evicts() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2)
    cache(manager, A + B + C, "acme")
    assert room(manager, "other") == 6
    manager.free(manager.allocate(24, namespace="other"))
    manager.check()
    assert manager.match_prefix(A + B + C, namespace="acme") == 8


def test_a_floor_that_is_held_guards_nothing_more() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2)
    cache(manager, A, "acme")
    manager.allocate(8, namespace="acme")
    assert room(manager, "other") == 6
    manager.allocate(24, namespace="other")
    manager.check()
    assert manager.match_prefix(A, namespace="acme") == 0


def test_sharing_a_cached_prefix_cannot_undercut_anothers_floor() -> None:
    manager = BlockManager(4, 4)
    cache(manager, A + B, "other")
    manager.allocate(8, namespace="other")
    manager.quotas.set("acme", floor=2)
    with pytest.raises(OutOfBlocks, match="floors of other namespaces reserve the rest"):
        manager.allocate([*A, *B, 1], namespace="other")
    assert room(manager, "acme") == 2


def test_no_namespace_is_a_namespace_of_its_own() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set(None, ceiling=2)
    assert room(manager, None) == 2
    assert room(manager, "None") == 8


def test_forks_count_once_and_their_copies_too() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    parent = manager.allocate(6, namespace="acme")
    child, third = manager.fork(parent, 2)
    assert manager.quotas.used("acme") == 2
    manager.append(child, 1)
    assert manager.quotas.used("acme") == 3
    with pytest.raises(OutOfBlocks, match="namespace 'acme' may have 3 blocks"):
        manager.append(third, 1)
    manager.check()


def test_swapped_blocks_do_not_count_until_they_are_back() -> None:
    manager = BlockManager(8, 4, 8)
    manager.quotas.set("acme", ceiling=3)
    sequence = manager.allocate(12, namespace="acme")
    manager.swap(sequence, "host")
    assert manager.quotas.used("acme") == 0
    other = manager.allocate(4, namespace="acme")
    with pytest.raises(OutOfBlocks, match="namespace 'acme' may have 3 blocks"):
        manager.swap(sequence, "device")
    manager.free(other)
    manager.swap(sequence, "device")
    assert manager.quotas.used("acme") == 3
    manager.check()


def test_cached_and_kept_blocks_count() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=3)
    sequence = committed(manager, A + B, "acme")
    ticket = manager.pins.pin(sequence)
    manager.free(sequence)
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 1
    manager.pins.unpin(ticket)
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 3


def test_a_batch_over_several_namespaces_charges_each() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("a", ceiling=3)
    manager.quotas.set("b", ceiling=2)
    mixed = [manager.allocate(4, namespace=name) for name in ("a", "b", None, "a")]
    with pytest.raises(OutOfBlocks, match="namespace 'a' may have 3 blocks"):
        manager.append(mixed, 1)
    assert [len(sequence) for sequence in mixed] == [4, 4, 4, 4]
    manager.append(mixed[:3], 1)
    assert (manager.quotas.used("a"), manager.quotas.used("b")) == (3, 2)
    manager.check()


def test_a_quota_can_be_read_replaced_and_dropped() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=1, ceiling=2)
    assert manager.quotas.get("acme") == Quota(1, 2)
    manager.quotas.set("acme", floor=3)
    assert manager.quotas.get("acme") == Quota(3, None)
    manager.quotas.drop("acme")
    assert room(manager, "other") == 8
    manager.check()


def test_an_unknown_namespace_has_no_quota_to_read_or_drop() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=1)
    for use in (manager.quotas.get, manager.quotas.drop, manager.quotas.used):
        for name in ("other", None):
            with pytest.raises(ValueError, match=r"it has no quota. Call quotas\.set"):
                use(name)
    assert manager.quotas.get("acme") == Quota(1)


def test_floors_that_exceed_the_pool_are_refused_and_change_nothing() -> None:
    manager = BlockManager(8, 4, null_block=True)
    manager.quotas.set("a", floor=4)
    with pytest.raises(ValueError, match="8 blocks, but only 7 are available"):
        manager.quotas.set("b", floor=4)
    with pytest.raises(ValueError, match="it has no quota"):
        manager.quotas.get("b")
    manager.quotas.set("a", floor=7)  # its own old floor does not count


@pytest.mark.parametrize(
    "limits", [{"floor": -1}, {"ceiling": 0}, {"floor": 3, "ceiling": 2}, {"floor": 1.5}]
)
def test_a_quota_that_makes_no_sense_is_refused(limits: dict[str, int]) -> None:
    manager = BlockManager(8, 4)
    with pytest.raises((ValueError, TypeError), match=r"floor|ceiling"):
        manager.quotas.set("acme", **limits)


def test_lowering_a_ceiling_evicts_the_namespaces_own_cached_blocks() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A, "other")
    cache(manager, A + B + C, "acme")
    manager.quotas.set("acme", ceiling=1)
    manager.check()
    assert manager.quotas.used("acme") == 1
    assert manager.match_prefix(A + B + C, namespace="acme") == 4
    assert manager.match_prefix(A, namespace="other") == 4


def test_a_ceiling_below_the_held_blocks_is_refused() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A + B, "acme")
    held = manager.allocate(8, namespace="acme")
    before = manager.stats()
    with pytest.raises(ValueError, match="ceiling=1: namespace 'acme' holds 2 blocks"):
        manager.quotas.set("acme", ceiling=1)
    assert manager.stats() == before
    assert manager.match_prefix(A + B, namespace="acme") == 8
    with pytest.raises(ValueError, match="it has no quota"):
        manager.quotas.get("acme")
    manager.free(held)
    manager.check()


def test_quotas_follow_the_pool_when_it_changes_its_size() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2, ceiling=4)
    sequence = committed(manager, A + B, "acme")
    manager.grow(10)
    manager.check()
    assert manager.quotas.used("acme") == 2
    manager.shrink(6)
    manager.check()
    assert manager.quotas.used("acme") == 2
    assert room(manager, "acme") == 2
    manager.free(sequence)


def test_dropping_what_is_cached_reaches_every_namespace() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", floor=2, ceiling=6)
    cache(manager, A + B, "acme")
    cache(manager, C, "other")
    assert manager.clear_prefix_cache() == 3
    assert manager.quotas.used("acme") == 0
    manager.check()


def test_shrinking_evicts_from_namespaces_with_a_quota_too() -> None:
    manager = BlockManager(8, 4)
    manager.quotas.set("acme", ceiling=6)
    cache(manager, A + B + C, "acme")
    manager.shrink(2)
    manager.check()
    assert manager.quotas.used("acme") == 2
    assert manager.match_prefix(A + B + C, namespace="acme") == 8


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("seed", range(6))
def test_quotas_hold_through_any_history(seed: int) -> None:
    random = np.random.default_rng(seed)
    manager = BlockManager(24, 4, 12)
    manager.quotas.set("a", floor=5)
    manager.quotas.set("b", floor=2, ceiling=8)
    manager.quotas.set(None, ceiling=10)
    live: dict[SequenceHandle, str | None] = {}
    swapped: set[SequenceHandle] = set()
    for _ in range(250):
        here = [s for s in live if s not in swapped]
        choice = random.integers(6)
        try:
            if choice <= 1:
                name = [None, "a", "b", "c"][random.integers(4)]
                ids = random.integers(0, 2, random.integers(1, 20)).tolist()
                live[committed(manager, ids, name)] = name
            elif choice == 2 and here:
                manager.append(here, [[0]] * len(here))
                manager.commit(here)
            elif choice == 3 and here:
                parent = here[random.integers(len(here))]
                live[manager.fork(parent)] = live[parent]
            elif choice == 4 and live:
                one = list(live)[random.integers(len(live))]
                manager.swap(one, "device" if one in swapped else "host")
                swapped ^= {one}
            elif live:
                one = list(live)[random.integers(len(live))]
                manager.free(one)
                swapped.discard(one)
                del live[one]
        except OutOfBlocks:
            pass
        manager.check()
        held = {name: set[int]() for name in (None, "a", "b", "c")}
        for sequence, name in live.items():
            held[name].update(b for b in manager.block_tables(sequence)[0].tolist() if b >= 0)
        assert manager.quotas.used("b") <= 8
        assert manager.quotas.used(None) <= 10
        assert len(held["c"]) + len(held[None]) <= 24 - max(5, len(held["a"])) - 2
    assert room(manager, "a") >= 5 - len(held["a"])


def test_a_manager_takes_quotas_as_engines_and_patches_do() -> None:
    manager = BlockManager(8, 4)
    manager.quotas["acme"] = 3
    assert "acme" in manager.quotas
    assert manager.quotas["acme"] == 3
    with pytest.raises(OutOfQuota):
        manager.allocate(16, namespace="acme")
    manager.quotas.set("acme", floor=2, ceiling=3)
    manager.quotas["acme"] = 4
    assert manager.quotas.get("acme") == Quota(2, 4)
    del manager.quotas["acme"]
    assert "acme" not in manager.quotas
    with pytest.raises(KeyError, match="acme"):
        manager.quotas["acme"]
    with pytest.raises(KeyError, match="acme"):
        del manager.quotas["acme"]


@pytest.mark.parametrize(
    ("namespace", "quota", "error", "message"),
    [
        ("acme", "2GiB", TypeError, r"quota='2GiB': a manager counts blocks and knows no bytes\."),
        ("acme", 0, ValueError, "quota=0: expected at least 1"),
        ("acme", None, TypeError, "quota=None: expected an int"),
        (3, 3, TypeError, "namespace=3: expected a str or None"),
    ],
)
def test_a_quota_that_a_manager_cannot_take_is_refused(
    namespace: Any, quota: Any, error: type[Exception], message: str
) -> None:
    manager = BlockManager(8, 4)
    with pytest.raises(error, match=message):
        manager.quotas[namespace] = quota
    assert namespace not in manager.quotas
