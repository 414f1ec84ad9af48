"""Memory that runs out within a call: the call changes nothing, and works when it is repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from kvpager.blocks.pool import BlockPool
from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import AppendPlan, CopyPlan
from tests.support.block_scenarios import SCENARIOS
from tests.support.manager_state import differences, state_of


class Fault:
    """Raises `MemoryError` at the `number`th call of what it is put around, before doing it."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.was_hit = False

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.was_hit = True
                raise MemoryError("injected")
            return real(*args, **named)

        return call


def inject(patch: pytest.MonkeyPatch, target: str, fault: Fault) -> None:
    if target == "take":
        for name in ("take", "take_one"):
            patch.setattr(BlockPool, name, fault.around(getattr(BlockPool, name)))
    elif target == "CopyPlan":
        for module in ("blocks.swap", "blocks.resize"):
            patch.setattr(f"kvpager.{module}.CopyPlan", fault.around(CopyPlan))
    else:  # the library asks for instances of these, too
        kind = {"AppendPlan": AppendPlan, "SequenceHandle": SequenceHandle}[target]
        patch.setattr(kind, "__init__", fault.around(kind.__init__))


@pytest.mark.parametrize("target", ["take", "CopyPlan", "AppendPlan", "SequenceHandle"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_memory_that_runs_out_changes_nothing(scenario, target, monkeypatch) -> None:
    for number in range(1, 50):
        manager, operation = scenario()
        before, fault = state_of(manager), Fault(number)
        with monkeypatch.context() as patch:
            inject(patch, target, fault)
            with contextlib.suppress(MemoryError):
                operation()
        if not fault.was_hit:
            break
        assert differences(state_of(manager), before) == []
        manager.check()
        operation()
        manager.check()
    else:
        pytest.fail("the operation never came through")
