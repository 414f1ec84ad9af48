"""Simulated serving: random traffic through a scheduler and a miniature model.

    report = simulate(seed=7, requests=40)
    print(report)                                  # the scenario, counts and the failure, if any

    python -m tests.support.serving_simulation --requests 1e5 --processes 2

A seed decides everything: pool, host tier, policy, budgets, costs and traffic. The traffic has
arrivals, shared prefixes, namespaces, parallel samples, beams, deadlines, cancellations and steps
that fail. The model's KV is one integer per slot. The model reads all past tokens of a row through
its block table, and the next token depends on all of them. A lost, repeated or foreign token
therefore changes all later tokens. The expected tokens are computed from the request alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

from kvpager._text import counted
from kvpager.errors import QueueFull
from kvpager.plans import Reason, StepPlan
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler
from kvpager.testing.simulator import in_processes
from tests.support.serving_model import Model, SchedulerError, has_beams, reference
from tests.support.serving_traffic import (
    Arrival,
    Scenario,
    draw_arrivals,
    draw_scenario,
    make_scheduler,
)

MakeScheduler = Callable[[Scenario, Callable[[], float]], Scheduler]

REQUESTS_PER_SEED = 40
_STUCK_STEPS = 5_000  # steps in which no request ends: the scheduler is stuck


@dataclass(frozen=True)
class Report:
    """The result of a seed; `failure` is None if the scheduler made no error."""

    seed: int
    scenario: Scenario
    num_requests: int
    counts: Counter[str] = field(default_factory=Counter)
    failure: str | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        failure = self.failure or "nothing wrong"
        return f"seed {self.seed}: {self.scenario}\n  {counts}\n  {failure}"


def simulate(
    seed: int, requests: int = REQUESTS_PER_SEED, *, make: MakeScheduler = make_scheduler
) -> Report:
    """Serve `requests` requests drawn from `seed`. O(requests * steps each * rows).

    `make(scenario, clock)` makes the scheduler.
    """
    random = Random(seed)
    scenario = draw_scenario(random)
    arrivals = draw_arrivals(random, scenario, requests)
    simulation = Simulation(random, scenario, arrivals, make)
    failure = None
    try:
        simulation.run()
    except Exception as error:
        failure = f"step {simulation.num_steps}: {type(error).__name__}: {error}"
    return Report(seed, scenario, requests, simulation.counts, failure)


class Simulation:
    """Runs one scenario."""

    def __init__(
        self, random: Random, scenario: Scenario, arrivals: list[Arrival], make: MakeScheduler
    ) -> None:
        self.random = random
        self.scenario = scenario
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival.at, reverse=True)
        self.num_steps = 0
        self.scheduler = make(scenario, lambda: float(self.num_steps))
        self.model = Model(self.scheduler.manager)
        self.counts: Counter[str] = Counter()
        self.live: dict[str, Arrival] = {}
        self.reasons: dict[str, set[Reason]] = {}  # expected because of a call
        self._last_end = 0

    def run(self) -> None:
        """Run until all requests have ended."""
        while self.arrivals or self.scheduler.has_work:
            self.num_steps += 1
            self._submit()
            self._stop_some()
            plan = self.scheduler.plan()
            if plan is not None:
                self._check_ended(plan)
                self._run_step(plan)
            if self.num_steps % 8 == 0 or self.scenario.num_blocks < 16:
                self.scheduler.check()
            if self.num_steps - self._last_end > _STUCK_STEPS:
                raise SchedulerError(
                    f"no request ends any more; live: {self.scheduler.request_ids}"
                )
        self._finish()

    # ---------------------------------------------------------------- requests

    def _submit(self) -> None:
        while self.arrivals and self.arrivals[-1].at <= self.num_steps:
            arrival = self.arrivals[-1]
            name = str(arrival.request.request_id)
            try:
                self.scheduler.submit(arrival.request)
            except QueueFull:
                self.counts["full"] += 1
                arrival.at = self.num_steps + 10
                self.arrivals.sort(key=lambda one: one.at, reverse=True)
                continue
            except ValueError:
                if self.scenario.can_serve(arrival.request):
                    raise
                self.counts["refused"] += 1
            else:
                if not self.scenario.can_serve(arrival.request):
                    raise SchedulerError(
                        f"{name} was accepted, but exceeds the pool or the budgets"
                    )
                self.live[name] = arrival
                self.reasons[name] = set()
                self.model.begin(arrival.request)
                self._last_end = self.num_steps
            self.arrivals.pop()

    def _stop_some(self) -> None:
        for name, arrival in self.live.items():
            if arrival.stop_at is not None and arrival.stop_at <= self.num_steps:
                arrival.stop_at = None
                self._stop(name, arrival.reason)

    def _stop(self, name: str, reason: Reason) -> None:
        stop = self.scheduler.cancel if reason is Reason.CANCELLED else self.scheduler.finish
        if stop(name):
            self.reasons[name] = {reason}
            self.model.stopped.add(name)
            self.counts["stopped"] += 1
        if stop(name):
            raise SchedulerError(f"{name} was stopped twice")

    # ---------------------------------------------------------------- a step

    def _check_ended(self, plan: StepPlan) -> None:
        """Check which requests ended, and why."""
        self.model.forget(plan.freed)
        for name, reason in plan.ended:
            arrival = self.live.pop(str(name), None)
            if arrival is None:
                raise SchedulerError(f"{name} ended twice, or was never live")
            deadline = arrival.request.deadline
            if self.reasons[str(name)]:
                allowed = self.reasons[str(name)]
            elif deadline is not None and deadline <= self.num_steps:
                allowed = {Reason.EXPIRED, Reason.FINISHED}
            else:
                allowed = {Reason.FINISHED}
            if reason not in allowed:
                raise SchedulerError(f"{name} ended as {reason.name}, expected {allowed}")
            if reason is Reason.FINISHED and str(name) not in self.model.stopped:
                self._compare(arrival.request)
            self.model.end(str(name))
            self.counts[reason.name.lower()] += 1
            self._last_end = self.num_steps

    def _compare(self, request: Request) -> None:
        found, expected = self.model.outputs[str(request.request_id)], reference(request)
        if not has_beams(request):
            found, expected = sorted(found), sorted(expected)
        if found != expected:
            raise SchedulerError(f"{request.request_id}: generated {found}, expected {expected}")

    def _run_step(self, plan: StepPlan) -> None:
        self.counts["swaps"] += len(plan.swaps)
        self.counts["copies"] += len(plan.copies)
        if not len(plan):
            self.model.apply(plan)
            return
        self.counts["steps"] += 1
        self.scenario.check_size(plan)
        stops = [name for name, one in self.live.items() if one.stops_within == self.num_steps % 7]
        if stops and self.random.random() < 0.3:  # while the step is computed
            self._stop(stops[0], Reason.CANCELLED)
        if self.random.random() < self.scenario.failures:
            self._fail(plan)
            return
        parents, tokens = self.model.step(plan)
        numbers = self.scheduler.complete(plan, parents, tokens)
        self.model.complete(plan, parents, tokens, numbers)

    def _fail(self, plan: StepPlan) -> None:
        """Run a part of the step, then abort it."""
        self.counts["aborts"] += 1
        self.model.fail_step(plan, self.random.randrange(4))
        names = self.scheduler.abort(plan)
        if set(names) != set(plan.request_ids) or len(set(names)) != len(names):
            raise SchedulerError(f"aborting a step of {plan.request_ids} ended {names}")
        for name in names:
            self.reasons[str(name)] = {Reason.FAILED}

    def _finish(self) -> None:
        scheduler = self.scheduler
        scheduler.check()
        if self.live or self.model.rows:
            raise SchedulerError(f"never ended: {list(self.live)}, samples {list(self.model.rows)}")
        if scheduler.plan() is not None or scheduler.request_ids:
            raise SchedulerError("every request has ended, but the scheduler has work")
        if scheduler.manager.num_held_blocks:
            raise SchedulerError(f"{scheduler.manager.num_held_blocks} blocks are still held")
        stats = scheduler.stats()
        self.counts["swapped"] += stats.total_preempted_by_swap
        self.counts["recomputed"] += stats.total_preempted_by_recompute
        self.counts["reused"] += stats.total_reused_tokens


# -------------------------------------------------------------------- many seeds


@dataclass
class Summary:
    """The results of many seeds."""

    num_requests: int = 0
    num_seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Report] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        return (
            f"{self.num_requests:,} requests from {counted(self.num_seeds, 'seed')}, "
            f"{len(self.failures)} failed: {counts}"
        )


def run(requests: int, seed: int = 0, processes: int = 1, failures_max: int = 3) -> Summary:
    """Serve `requests` requests, with a new seed and scenario every 40, from `seed` on.

    Prints every failure. O(requests).
    """
    summary = Summary()
    seeds = range(seed, seed + -(-requests // REQUESTS_PER_SEED))
    for report in in_processes(processes, simulate, seeds):
        summary.num_requests += report.num_requests
        summary.num_seeds += 1
        summary.counts += report.counts
        if report.failure is not None:
            print(report, flush=True)
            summary.failures.append(report)
            if len(summary.failures) >= failures_max:
                break
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0 if no seed failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.serving_simulation", description=__doc__
    )
    parser.add_argument("--requests", type=float, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    begin = perf_counter()
    summary = run(int(options.requests), options.seed, options.processes)
    print(f"{summary}; {perf_counter() - begin:.0f} s")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
