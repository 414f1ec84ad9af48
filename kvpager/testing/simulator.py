"""A seeded simulator: random histories of operations, each result compared with plain lists.

    report = simulate(seed=7, operations=10_000)
    print(report)                       # on a failure: the seed, and a shrunk history to read

A seed decides everything: pool and block sizes, alphabet, namespaces, eviction policy, how often
each operation comes, and the operations. In this it follows TigerBeetle's simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from random import Random
from time import perf_counter
from typing import Any

from kvpager._text import counted
from kvpager.testing.histories import (
    Failure,
    History,
    Scale,
    describe,
    failure_of,
    replay,
    shrink,
    supported,
)
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.memory import MakeMemory, TokenMemory
from kvpager.testing.operations import SEQUENCE_OPERATIONS
from kvpager.testing.pool_operations import POOL_OPERATIONS
from kvpager.testing.setups import MakeManager, Setup, draw_setup, make_block_manager

OPERATIONS = SEQUENCE_OPERATIONS | POOL_OPERATIONS
OPERATIONS_PER_SEED = 5_000
_FAILURES_MAX = 3
_LINES_MAX = 60  # a history that did not shrink may be longer


@dataclass(frozen=True)
class Report:
    """The result of a seed; `failure` is None if no property was violated.

    `history` is the shortest failing history found, empty without a failure. `counts` has the
    number of each operation, of refused calls, and of prefix hits.
    """

    seed: int
    setup: Setup
    num_operations: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None
    history: History = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if no property was violated."""
        return self.failure is None

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.setup}"
        if self.failure is None:
            return f"{head}\n  {self.num_operations} operations, no property violated"
        lines = describe(self.history, OPERATIONS)
        num_left_out = max(len(lines) - _LINES_MAX, 0)
        shown = lines[-_LINES_MAX:]
        if num_left_out:
            shown = [f"... {num_left_out} earlier operations not shown", *shown]
        return "\n".join(
            [
                head,
                f"  {self.failure.property}: {self.failure.message}",
                f"  after {self.num_operations} operations; {len(lines)} of them are enough:",
                *(f"    {line}" for line in shown),
            ]
        )


def simulate(
    seed: int,
    operations: int,
    *,
    make_manager: MakeManager = make_block_manager,
    make_memory: MakeMemory = TokenMemory,
    shrinking: bool = True,
) -> Report:
    """Run `operations` operations drawn from `seed`. O(operations), more if it shrinks.

    Args:
        seed: the same seed gives the same report, except `seconds`.
        operations: the number of operations.
        make_manager: makes the manager from a `Setup`; `BlockManager` by default.
        make_memory: makes the token slots, from the arguments of `TokenMemory`.
        shrinking: shrink a failing history.
    """
    random = Random(seed)
    setup = draw_setup(random)

    def make_harness(check_every: int | None = None) -> ManagerHarness:
        manager = make_manager(setup)
        return ManagerHarness(setup, manager, check_every=check_every, make_memory=make_memory)

    harness = make_harness()
    history: History = []
    begin = perf_counter()
    failure = _drive(random, harness, operations, history)
    seconds = perf_counter() - begin
    num_done = len(history)
    if failure is None:
        history = []
    elif shrinking:
        failure, history = _shrunk(failure, history, make_harness)
    return Report(seed, setup, num_done, seconds, harness.counts, failure, history)


def _drive(
    random: Random, harness: ManagerHarness, operations: int, history: History
) -> Failure | None:
    """Draw and run operations, recorded in `history`; return the failure or None."""
    table = supported(OPERATIONS, harness.manager)
    scale = Scale(harness.setup.alphabet, harness.setup.longest)
    names = list(table)
    # Weights differ by run: some never free, others hardly commit.
    weights = [one.weight * random.choice((0, 0.3, 1, 1, 3)) for one in table.values()]
    weights[names.index("allocate")] = table["allocate"].weight
    try:
        for name in random.choices(names, weights, k=operations):
            operation = table[name]
            scale.num_live = len(harness.rows)
            arguments = operation.draw(random, scale)
            history.append((name, arguments))
            harness.apply(operation, arguments)
        harness.finish()
    except Exception as error:
        return failure_of(error, max(len(history) - 1, 0))
    return None


def _shrunk(
    failure: Failure, history: History, make_harness: Callable[[int], ManagerHarness]
) -> tuple[Failure, History]:
    def failure_of(history: History) -> Failure | None:
        # Check everything after every operation, to find the earliest failure.
        return replay(history, OPERATIONS, make_harness(1))

    early = failure_of(history) or failure
    history = history[: early.at + 1]

    def fails(history: History) -> bool:
        found = failure_of(history)
        return found is not None and found.property == early.property

    if not fails(history):
        return failure, history  # the failure does not repeat
    history = shrink(history, fails)
    return failure_of(history) or early, history


@dataclass
class Summary:
    """The results of many seeds."""

    num_operations: int = 0
    num_seeds: int = 0
    seconds: float = 0.0  # of all processes together
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Report] = field(default_factory=list)

    def add(self, report: Report) -> None:
        """Add a report. O(kinds of operations)."""
        self.num_operations += report.num_operations
        self.num_seeds += 1
        self.seconds += report.seconds
        self.counts += report.counts
        if not report.ok:
            self.failures.append(report)

    def __str__(self) -> str:
        speed = self.num_operations / self.seconds if self.seconds else 0.0
        return (
            f"{self.num_operations:,} operations from {counted(self.num_seeds, 'seed')}, "
            f"{len(self.failures)} failed; {speed:,.0f} operations/s in each process"
        )


def run(
    operations: int,
    seed: int,
    processes: int = 1,
    progress: Callable[[int], object] = lambda count: None,
    *,
    make_manager: MakeManager = make_block_manager,
) -> Summary:
    """Simulate `operations` operations, a new seed every 5,000, from `seed` on.

    Args:
        operations: the total number.
        seed: the first seed.
        processes: the result does not depend on their number.
        progress: called with the number of operations just done, such as `tqdm(...).update`.
        make_manager: makes the manager from a `Setup`; a module-level function if processes > 1.

    Prints every failure, with its seed and a shrunk history, up to three. O(operations).
    """
    summary = Summary()
    for report in _reports(operations, seed, processes, make_manager):
        summary.add(report)
        progress(report.num_operations)
        if not report.ok:
            print(report, flush=True)
            if len(summary.failures) == _FAILURES_MAX:
                break
    return summary


def _reports(
    operations: int, seed: int, processes: int, make_manager: MakeManager
) -> Iterator[Report]:
    starts = range(0, operations, OPERATIONS_PER_SEED)
    lengths = [min(OPERATIONS_PER_SEED, operations - start) for start in starts]
    seeds = range(seed, seed + len(lengths))
    one = partial(simulate, make_manager=make_manager)
    return in_processes(processes, one, seeds, lengths)


def in_processes(
    processes: int, function: Callable[..., Any], *jobs: Iterable[Any]
) -> Iterator[Any]:
    """Yield what `function` returns for the arguments in `jobs`, as `map` does, in order."""
    if processes <= 1:
        yield from map(function, *jobs)
        return
    # A fork is unsafe if the caller has threads, such as those of torch.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, *jobs)
        finally:
            pool.shutdown(cancel_futures=True)
