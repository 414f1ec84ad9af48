"""Two thousand requests of the serving simulator; `make simulate` is the long run."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import Scheduler
from tests.support import serving_simulation
from tests.support.scheduling import request
from tests.support.serving_model import reference
from tests.support.serving_traffic import Scenario, make_scheduler


@pytest.mark.slow
def test_every_request_ends_once_with_its_own_tokens() -> None:
    summary = serving_simulation.run(2_000, seed=0)
    assert not summary.failures, "\n".join(map(str, summary.failures))
    assert summary.num_requests == 2_000
    # The run must contain rare events.
    for name in ("swapped", "recomputed", "aborts", "copies", "swaps", "reused", "expired"):
        assert summary.counts[name] > 10, name


def test_a_seed_determines_the_run() -> None:
    assert str(serving_simulation.simulate(11)) == str(serving_simulation.simulate(11))


class LosesAToken(Scheduler):
    """Changes the last token of every sixth step."""

    num_completed = 0

    def complete(self, plan, parents, tokens):  # type: ignore[no-untyped-def]
        self.num_completed += 1
        if self.num_completed % 6 == 0 and len(tokens):
            tokens = np.array(tokens)
            tokens[-1] = (tokens[-1] + 1) % 90
        return super().complete(plan, parents, tokens)


class OmitsAnEnd(Scheduler):
    """Does not report the end of the first request."""

    has_omitted = False

    def plan(self):  # type: ignore[no-untyped-def]
        plan = super().plan()
        if plan is not None and plan.ended and not self.has_omitted:
            self.has_omitted = True
            plan.ended.pop()
        return plan


@pytest.mark.parametrize("broken", [LosesAToken, OmitsAnEnd])
def test_a_broken_scheduler_is_detected(broken: type[Scheduler]) -> None:
    def make(scenario: Scenario, clock):  # type: ignore[no-untyped-def]
        scheduler = make_scheduler(scenario, clock)
        scheduler.__class__ = broken
        return scheduler

    assert any(serving_simulation.simulate(seed, make=make).failure for seed in range(6))


def test_the_command_line_reports_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_simulation.main(["--requests", "80", "--seed", "3"]) == 0
    assert "80 requests from 2 seeds, 0 failed" in capsys.readouterr().out


def test_the_reference_depends_on_the_request_alone() -> None:
    beams = request("a", 6, new=5, n=3)
    rows = reference(beams)
    assert rows == reference(beams)
    assert all(len(row) <= 5 for row in rows)
    assert len(reference(request("b", 6, new=1, n=4))) == 4
