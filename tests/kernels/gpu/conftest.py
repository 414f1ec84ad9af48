"""What several tests of the GPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpager.kernels import work_items


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use small tiles, so that short rows have several, and drop plans of other tests."""
    from kvpager.kernels.gpu import config, plans
    from kvpager.kernels.gpu.config import Tile

    rows = ((4, 512, Tile(16, 16, 1, 1), Tile(32, 32, 1, 1)),)
    monkeypatch.setattr(config, "_INTERPRETED", rows)
    monkeypatch.setattr(work_items, "PARTIAL_COST_TOKENS", 2)
    monkeypatch.delenv("KVPAGER_GPU_ATTENTION", raising=False)
    plans._caches.clear()
    yield
    plans._caches.clear()
