"""Any history of operations, checked against plain lists: `tests.support.manager_state_machine`.

Hypothesis first tries the examples in tests/testing/regressions/hypothesis. They failed once, under
a mutant or a real bug. The folder is only read: new examples are saved in .hypothesis.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    MultiplexedDatabase,
    ReadOnlyDatabase,
)

from tests.support.manager_state_machine import PagedMemory

ROOT = Path(__file__).resolve().parents[2]
REGRESSIONS = DirectoryBasedExampleDatabase(
    ROOT / "tests" / "testing" / "regressions" / "hypothesis"
)
NEW = DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples")

FEW = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    database=MultiplexedDatabase(NEW, ReadOnlyDatabase(REGRESSIONS)),
)


class TestPagedMemory(PagedMemory.TestCase):
    settings = FEW


@pytest.mark.slow
class TestPagedMemoryAtLength(PagedMemory.TestCase):
    settings = settings(FEW, max_examples=400)
