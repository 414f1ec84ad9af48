"""A disk that is full, or fails at any call, costs an engine blocks, and no token."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.layout import BlockLayout
from tests.support.failing_calls import failing_calls
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, PROMPT, TieredEngine

PROMPTS = [[seed, *PROMPT[:30]] for seed in range(4)]
FOR_EVER = 1 << 30


def opened(folder: Path) -> DiskStore:
    """Open a store for 18 blocks: fewer than the prompts have."""
    layout = BlockLayout("toy", BLOCK_BYTES)
    return DiskStore(folder, 18 * (2 * 4096 + 64), layout=layout, admit="always")


def served(folder: Path, failing: int, error: int, number: int) -> int:
    """Ask prompts twice, over a store that evicts, while calls fail. Return how many were made."""
    with failing_calls(1 << 40, error):
        store = opened(folder)
    with failing_calls(failing, error, number=number) as calls:
        with TieredEngine([store], 14, max_wait_s=60) as engine:  # type: ignore[list-item]
            for prompt in PROMPTS * 2:
                assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
                engine.saved()
        num_calls = next(calls)
    with TieredEngine([opened(folder)], 14, max_wait_s=60) as engine:  # type: ignore[list-item]
        for prompt in PROMPTS:  # what is left is right
            assert engine.ask(prompt).result(60).token_ids == expected(prompt, 8)
    return num_calls


@pytest.mark.parametrize(
    ("error", "number", "every"),
    [
        pytest.param(errno.EIO, FOR_EVER, 80, id="some"),
        pytest.param(errno.EIO, 1, 12, id="error-once", marks=pytest.mark.slow),
        pytest.param(errno.EIO, FOR_EVER, 12, id="errors", marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, 1, 12, id="full-once", marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, FOR_EVER, 12, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_at_any_call_changes_no_token(
    tmp_path: Path, error: int, number: int, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    num_calls = served(tmp_path / "none", -1, error, number=0)
    assert num_calls > 60
    for failing in range(0, num_calls, every):
        served(tmp_path / str(failing), failing, error, number)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
