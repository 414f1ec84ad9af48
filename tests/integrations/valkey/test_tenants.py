"""A tenant's lookups never find another tenant's blocks."""

from __future__ import annotations

import pytest

from tests.support.tenants import CALL, LAYOUT, check_tenants
from tests.support.valkey_blocks import open_store
from tests.support.valkey_servers import Server


@pytest.mark.parametrize(
    "lookups", [2 * CALL, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_no_lookup_of_another_tenant_hits(server: Server, lookups: int) -> None:
    check_tenants(open_store(server.unix_url, LAYOUT), lookups)
