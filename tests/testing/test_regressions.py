"""Histories that once failed, from the simulator and from reviews: none fails again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpager.testing.histories import replay
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.setups import Setup, make_block_manager
from kvpager.testing.simulator import OPERATIONS

REGRESSIONS = json.loads((Path(__file__).parent / "regressions" / "histories.json").read_text())


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: case["name"])
def test_a_fixed_failure_stays_fixed(case: dict) -> None:
    setup = Setup(**{**case["setup"], "namespaces": tuple(case["setup"]["namespaces"])})
    history = [(name, tuple(arguments)) for name, arguments in case["history"]]
    assert all(name in OPERATIONS for name, _ in history)
    assert replay(history, OPERATIONS, ManagerHarness(setup, make_block_manager(setup))) is None
