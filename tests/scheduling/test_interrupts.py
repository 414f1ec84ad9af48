"""Interrupts and failing clocks: a call of a scheduler completes or changes nothing."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from typing import Any

import pytest

from kvpager import BlockManager, KVPagerError, Request, Scheduler
from tests.support.interrupts import Interrupt, Moments, by_force, by_signal
from tests.support.manager_state import state_of
from tests.support.scheduling import ids

NUM_STEPS = 14


class Traffic:
    """Requests that end, expire, are cancelled, preempted and forked, step by step."""

    def __init__(self) -> None:
        self.manager = BlockManager(14, 4, 8)
        self.scheduler = Scheduler(
            self.manager, max_batch_tokens=16, max_num_seqs=6, clock=lambda: self.now
        )
        self.now = 0.0
        self.step = 0

    def advance(self) -> None:
        """Submit, compute and cancel once; repeat what an interrupt cut short."""
        scheduler, name = self.scheduler, self.step
        with contextlib.suppress(ValueError):  # the id is in use: the interrupt came later
            scheduler.submit(
                Request(
                    request_id=name,
                    prompt=ids(9 + name % 3, first=100 * (name % 2)),
                    max_new_tokens=6,
                    n=1 + name % 2,
                    deadline=self.now + 3.5 if name % 4 == 3 else None,
                )
            )
        plan = scheduler.step or scheduler.plan()
        if plan is not None and len(plan):
            rows = plan.needs_logits.nonzero()[0].tolist()
            scheduler.complete(plan, rows, [7] * len(rows))
        scheduler.cancel(name - 5)
        self.step += 1
        self.now += 1.0


def traffic(steps: int) -> Traffic:
    made = Traffic()
    for _ in range(steps):
        made.advance()
    return made


def interrupt(made: Traffic, moment: Moments) -> bool:
    """Interrupt a step at `moment`; return True if the step reached it."""
    with contextlib.suppress(KeyboardInterrupt, Interrupt), moment:
        made.advance()
    return moment.was_hit


def num_moments(step: int) -> int:
    moment = Moments(sys.maxsize, by_signal)
    interrupt(traffic(step), moment)
    return sys.maxsize - moment.left


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_an_interrupted_scheduler_is_consistent_and_continues(step: int) -> None:
    total = num_moments(step)
    for number in random.Random(step).sample(range(1, total), 6):
        made = traffic(step)
        interrupt(made, Moments(number, by_signal))
        made.scheduler.check()
        for _ in range(12):
            made.advance()
            made.scheduler.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("step", range(0, NUM_STEPS, 3))
def test_a_forced_exception_leaves_a_consistent_or_broken_scheduler(step: int) -> None:
    total = num_moments(step)
    for number in random.Random(step).sample(range(1, total), 6):
        made = traffic(step)
        interrupt(made, Moments(number, by_force))
        try:
            made.advance()
        except KVPagerError as refusal:
            message = str(refusal)
        else:
            message = ""
            made.scheduler.check()
        assert not message or "an error interrupted a change" in message


def test_a_failing_clock_changes_nothing() -> None:
    made = traffic(4)
    clock: Any = made.scheduler.clock

    def fails() -> float:
        raise ZeroDivisionError("no time")

    before = state_of(made.manager)
    made.scheduler.clock = fails
    with pytest.raises(ZeroDivisionError, match="no time"):
        made.scheduler.submit(Request(request_id="late", prompt=ids(5), max_new_tokens=2))
    with pytest.raises(ZeroDivisionError, match="no time"):
        made.scheduler.plan()
    made.scheduler.check()
    after = state_of(made.manager)
    assert all((before[name] == after[name]).all() for name in before)
    made.scheduler.clock = clock
    made.scheduler.submit(Request(request_id="late", prompt=ids(5), max_new_tokens=2))
    made.advance()
    made.scheduler.check()
