"""After any history, a recording replays to exactly the state of the manager."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from kvpager.testing.histories import Operation, supported
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.setups import Setup, make_block_manager
from kvpager.testing.simulator import OPERATIONS
from kvpager.testing.strategies import machine_of
from tests.blocks.test_group_histories import WINDOWS, Groups
from tests.support.manager_state_machine import SETUPS
from tests.support.recorded import Recorded


class RecordedHarness(ManagerHarness):
    """Records a step after every second operation, so that a step has several."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, make_block_manager(setup), check_every=100)
        self.recorded = Recorded(self.manager)
        self.num_applied = 0

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        super().apply(operation, arguments)
        self.num_applied += 1
        if self.num_applied % 2:
            self.recorded.step()


SMALLEST = Setup(1, 1, 4, 1, 1, 1, namespaces=(None,), eviction="lru", check_every=1)
TABLE = supported(OPERATIONS, make_block_manager(SMALLEST))
RecordedMemory = machine_of("RecordedMemory", TABLE, RecordedHarness, setup=SETUPS)


class RecordedGroups(Groups):
    @initialize(
        windows=st.sampled_from(WINDOWS),
        num_blocks=st.integers(4, 40),
        block_size=st.sampled_from((1, 2, 4)),
        num_host_blocks=st.integers(0, 20),
        max_chunk=st.sampled_from((None, 1, 3, 8)),
        eviction=st.just("lru"),
    )
    def start(self, **settings: Any) -> None:
        super().start(**settings)
        self.recorded = Recorded(self.manager)

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "recorded"):
            self.recorded.step()


FEW = settings(max_examples=40, stateful_step_count=40, deadline=None)


class TestRecordedMemory(RecordedMemory.TestCase):
    settings = FEW


class TestRecordedGroups(RecordedGroups.TestCase):
    settings = FEW


@pytest.mark.slow
class TestRecordedMemoryAtLength(RecordedMemory.TestCase):
    settings = settings(FEW, max_examples=600)


@pytest.mark.slow
class TestRecordedGroupsAtLength(RecordedGroups.TestCase):
    settings = settings(FEW, max_examples=400)
