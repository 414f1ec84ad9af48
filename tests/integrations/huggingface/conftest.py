"""A model and a tier for tests of engines and patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def disk(tmp_path: Path) -> str:
    """The URL of a disk tier that was not used yet."""
    return f"disk:{tmp_path}/kv?capacity=32MiB"


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose tokens depend on every block of a prompt. Do not change it."""
    from tests.support.tiered_engines import llama

    return llama()
