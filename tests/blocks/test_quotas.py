"""Quotas by namespace, over one pool or several: `quotas["acme"] = 512`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.errors import OutOfQuota
from tests.support.interrupts import Moments, by_signal

BLOCK_BYTES = 1024


def quotas_of(*managers: BlockManager) -> NamespaceQuotas:
    pools = [(manager.quotas, BLOCK_BYTES) for manager in managers]
    lock = threading.RLock()
    return NamespaceQuotas(lambda: pools, lambda: lock)


@pytest.mark.parametrize("quota", [3, "3KiB", "3.9KiB"])
def test_a_quota_in_blocks_or_bytes_bounds_every_pool(quota: int | str) -> None:
    managers = [BlockManager(8, 4), BlockManager(8, 4)]
    quotas = quotas_of(*managers)
    quotas["acme"] = quota
    assert (dict(quotas), repr(quotas)) == ({"acme": quota}, repr({"acme": quota}))
    for manager in managers:
        manager.allocate(12, namespace="acme")
        with pytest.raises(OutOfQuota):
            manager.allocate(1, namespace="acme")
        manager.allocate(12, namespace="umbrella")


def test_a_quota_that_one_pool_refuses_changes_none() -> None:
    free, busy = BlockManager(8, 4), BlockManager(8, 4)
    quotas = quotas_of(free, busy)
    held = busy.allocate(20, namespace="acme")
    with pytest.raises(ValueError, match="holds 5 blocks"):
        quotas["acme"] = 4
    assert "acme" not in quotas
    assert free.quotas.ceiling("acme") is None
    quotas["acme"] = 6
    with pytest.raises(ValueError, match="holds 5 blocks"):
        quotas["acme"] = 4
    assert (quotas["acme"], free.quotas.ceiling("acme")) == (6, 6)
    busy.free(held)
    quotas["acme"] = 4
    assert busy.quotas.ceiling("acme") == 4


def test_a_quota_that_is_lifted_bounds_nothing() -> None:
    manager = BlockManager(8, 4)
    quotas = quotas_of(manager)
    quotas["acme"] = 2
    del quotas["acme"]
    assert manager.quotas.ceiling("acme") is None
    manager.allocate(32, namespace="acme")
    with pytest.raises(KeyError):
        del quotas["acme"]


def test_a_pool_that_comes_later_is_bounded_when_asked() -> None:
    quotas, manager = quotas_of(), BlockManager(8, 4)
    quotas["acme"] = "3KiB"
    quotas.enforce(manager.quotas, "acme", BLOCK_BYTES)
    quotas.enforce(manager.quotas, "umbrella", BLOCK_BYTES)
    assert (manager.quotas.ceiling("acme"), manager.quotas.ceiling("umbrella")) == (3, None)
    quotas.enforce(manager.quotas, "acme", 2 * BLOCK_BYTES)  # blocks got larger
    assert manager.quotas.ceiling("acme") == 1
    with pytest.raises(ValueError, match=r"quota='3KiB': one block takes 4\.0 KiB\. Raise the"):
        quotas.enforce(manager.quotas, "acme", 4 * BLOCK_BYTES)


@pytest.mark.parametrize(
    "change",
    [lambda quotas: quotas.update(acme=3), lambda quotas: quotas.pop("acme")],
    ids=["set", "delete"],
)
def test_an_interrupted_change_is_complete_or_has_changed_nothing(
    change: Callable[[NamespaceQuotas], object],
) -> None:
    managers = [BlockManager(8, 4), BlockManager(8, 4)]
    quotas = quotas_of(*managers)
    for number in itertools.count(1):
        quotas["acme"] = 5
        moments = Moments(number, by_signal)
        with suppress(KeyboardInterrupt), moments:
            change(quotas)
        ceilings = [manager.quotas.ceiling("acme") for manager in managers]
        assert ceilings == [quotas.get("acme")] * 2
        if moments.left > 0:  # it ended before that moment
            return
