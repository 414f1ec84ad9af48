"""Histories that once broke a law, found by the simulator and the reviews; none may again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpager.testing.histories import replay
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.operations_more import OPERATIONS
from kvpager.testing.setups import Setup, make_block_manager

FOUND = json.loads((Path(__file__).parent / "regressions" / "histories.json").read_text())


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found["name"])
def test_a_found_failure_stays_fixed(found: dict) -> None:
    setup = Setup(**{**found["setup"], "namespaces": tuple(found["setup"]["namespaces"])})
    history = [(name, tuple(arguments)) for name, arguments in found["history"]]
    assert all(name in OPERATIONS for name, _ in history)
    assert replay(history, OPERATIONS, ManagerHarness(setup, make_block_manager(setup))) is None
