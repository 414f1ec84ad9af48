"""Any history of operations, checked against plain lists: see `kvpager.testing.machine`."""

from __future__ import annotations

from hypothesis import settings

from kvpager.testing.machine import PagedMemory

TestPagedMemory = PagedMemory.TestCase
TestPagedMemory.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
