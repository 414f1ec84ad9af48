"""What scheduling costs: a plan and its completion, one thread, medians, a JSON line each.

    python benchmarks/scheduler.py                # every figure
    python benchmarks/scheduler.py --rows 64      # 64 rows

`decode`: all rows decode, and nothing else happens. `churn`: in every step one row ends and a
prompt of 512 tokens begins. `waiting`: as `decode`, with 10,000 requests that wait for room.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# As a file of its own, too: `python benchmarks/scheduler.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvpager import BlockManager, Request, Scheduler, StepPlan

LENGTH = 1024
NUMBERS = itertools.count()


def request(length: int, new: int, policy: str = "fifo") -> Request:
    number = next(NUMBERS)
    prompt = np.random.default_rng(number).integers(0, 32_000, length, dtype=np.int32)
    tenant = str(number % 8) if policy == "fair" else None
    return Request(request_id=number, prompt=prompt, max_new_tokens=new, tenant=tenant)


def go_on(scheduler: Scheduler, plan: StepPlan) -> None:
    rows = plan.needs_logits.nonzero()[0]
    scheduler.complete(plan, rows, np.full(len(rows), 7, np.int32))


def decoding(rows: int, policy: str, *, prefix_cache: bool, steps: int, new: int = 0) -> Scheduler:
    """A scheduler all of whose rows decode."""
    # Room for every row to its end, and no more: what waits has to wait.
    manager = BlockManager(rows * (LENGTH + 16 + (new + steps + 100)) // 16 + 2 * rows, 16)
    scheduler = Scheduler(
        manager,
        max_batch_tokens=8192,
        max_num_seqs=rows,
        policy=policy,
        prefix_cache=prefix_cache,
    )
    for row in range(rows):
        # With `new`, rows end one after the other.
        new_tokens = steps + 100 if not new else 40 + row
        scheduler.submit(request(LENGTH + row % 16, new_tokens, policy))
    while scheduler.num_waiting or scheduler.stats().total_steps < 2:
        advance(scheduler)
    for _ in range(20):
        advance(scheduler)
    return scheduler


def advance(scheduler: Scheduler) -> None:
    plan = scheduler.plan()
    if plan is not None and len(plan):
        go_on(scheduler, plan)


def timed(scheduler: Scheduler, steps: int, *, replace: int = 0) -> tuple[float, float]:
    """Median seconds of `plan` and of `complete`; for each request that ended, another one."""
    plans, completions = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        plan = scheduler.plan()
        middle = time.perf_counter()
        assert plan is not None
        go_on(scheduler, plan)
        completions.append(time.perf_counter() - middle)
        plans.append(middle - begin)
        for _ in plan.ended if replace else ():
            scheduler.submit(request(512, replace))
    return statistics.median(plans), statistics.median(completions)


def figures(rows: int, steps: int) -> Iterator[tuple[str, float]]:
    for policy in ("fifo", "priority", "fair"):
        scheduler = decoding(rows, policy, prefix_cache=True, steps=steps)
        for part, seconds in zip(("plan", "complete"), timed(scheduler, steps), strict=True):
            yield f"decode_{policy}_{rows}_{part}_us", seconds * 1e6
    scheduler = decoding(rows, "fifo", prefix_cache=False, steps=steps)
    for part, seconds in zip(("plan", "complete"), timed(scheduler, steps), strict=True):
        yield f"decode_without_prefix_cache_{rows}_{part}_us", seconds * 1e6
    scheduler = decoding(rows, "fifo", prefix_cache=True, steps=steps, new=rows)
    for part, seconds in zip(
        ("plan", "complete"), timed(scheduler, steps, replace=rows), strict=True
    ):
        yield f"churn_{rows}_{part}_us", seconds * 1e6
    for policy in ("fifo", "fair"):
        scheduler = decoding(rows, policy, prefix_cache=True, steps=steps)
        for _ in range(10_000):
            scheduler.submit(request(64, 8, policy))
        for part, seconds in zip(("plan", "complete"), timed(scheduler, steps), strict=True):
            yield f"waiting_{policy}_{rows}_{part}_us", seconds * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps({"machine": {"machine": platform.machine(), **versions}}), flush=True)
    for name, value in figures(options.rows, options.steps):
        print(json.dumps({"name": name, "value": round(value, 1), "unit": "us"}), flush=True)


if __name__ == "__main__":
    main()
