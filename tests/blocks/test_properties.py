"""Any history of operations, checked against plain lists: see `kvpager.testing.machine`.

Examples that once failed - with a planted bug, or for real - are kept in
tests/testing/regressions/hypothesis and tried first. They are only read here; new ones land in
.hypothesis.
"""

from __future__ import annotations

from pathlib import Path

from hypothesis import settings
from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    MultiplexedDatabase,
    ReadOnlyDatabase,
)

from kvpager.testing.machine import PagedMemory

ROOT = Path(__file__).resolve().parents[2]
FOUND = DirectoryBasedExampleDatabase(ROOT / "tests" / "testing" / "regressions" / "hypothesis")
NEW = DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples")

TestPagedMemory = PagedMemory.TestCase
TestPagedMemory.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    database=MultiplexedDatabase(NEW, ReadOnlyDatabase(FOUND)),
)
