"""A tenant's lookups never find another tenant's blocks, in the stores of one machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpager.integrations.nixl import NixlStore
from kvpager.integrations.nixl import store as nixl
from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.host import HostStore
from tests.support.fake_nixl import FakeAgent
from tests.support.tenants import LAYOUT, NUM_KEPT, check_tenants

CAPACITY = NUM_KEPT * (2 * 4096 + 64)
STORES: dict[str, Callable[[Path], Any]] = {
    "host": lambda folder: HostStore(CAPACITY, layout=LAYOUT),
    "disk": lambda folder: DiskStore(folder, CAPACITY, layout=LAYOUT, admit="always"),
    "nixl": lambda folder: NixlStore(folder, CAPACITY, layout=LAYOUT),
}


@pytest.mark.parametrize(
    "lookups", [400, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
@pytest.mark.parametrize("kind", STORES)
def test_no_lookup_of_another_tenant_hits(
    kind: str, lookups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "open_agent", lambda backend, options: FakeAgent())
    with contextlib.closing(STORES[kind](tmp_path / "kv")) as store:
        check_tenants(store, lookups)
