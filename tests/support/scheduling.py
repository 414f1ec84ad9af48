"""What the scheduler's tests share: requests in one line, and steps with a simple sampler."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from zlib import crc32

import numpy as np

from kvpager import BlockManager, Request, Scheduler, StepPlan
from kvpager.plans import Reason

BLOCK_SIZE = 4


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    num_blocks: int = 64, num_host_blocks: int = 0, block_size: int = BLOCK_SIZE, **options: Any
) -> Scheduler:
    """A scheduler with a manager of its own, without a watermark unless one is asked for."""
    manager = BlockManager(num_blocks, block_size, num_host_blocks)
    return Scheduler(manager, **{"watermark": 0.0, **options})


def ids(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def request(name: Hashable, length: int = 3, new: int = 4, **options: Any) -> Request:
    """A request whose prompt is unlike all others', unless `prompt` is given."""
    prompt = options.pop("prompt", None)
    if prompt is None:
        prompt = ids(length, 1000 * (crc32(repr(name).encode()) % 100_003))
    return Request(request_id=name, prompt=prompt, max_new_tokens=new, **options)


def complete(scheduler: Scheduler, plan: StepPlan, times: int = 1, token: int = 7) -> np.ndarray:
    """Every row that chooses goes on so many times."""
    rows = np.repeat(plan.needs_logits.nonzero()[0], times)
    found = scheduler.complete(plan, rows, token + np.arange(len(rows)))
    scheduler.check()
    return found


def step(scheduler: Scheduler) -> StepPlan:
    """Plan, and let every row go on once. There must be something to compute."""
    plan = scheduler.plan()
    assert plan is not None
    scheduler.check()
    if len(plan):
        complete(scheduler, plan)
    return plan


def run(
    scheduler: Scheduler, each: Callable[[StepPlan], object] = len, steps_max: int = 2_000
) -> dict[Hashable, Reason]:
    """Until nothing is left; how each request ended, in the order of their ends."""
    ended: dict[Hashable, Reason] = {}
    for _ in range(steps_max):
        if not scheduler.has_work:
            return ended
        plan = step(scheduler)
        each(plan)
        for name, reason in plan.ended:
            assert name not in ended
            ended[name] = reason
    raise AssertionError(f"after {steps_max} steps there are still {scheduler.names}")


def rows(plan: StepPlan) -> dict[Hashable, int]:
    """How many tokens of each request a step has."""
    counts: dict[Hashable, int] = {}
    for name, count in zip(plan.request_ids, plan.num_scheduled.tolist(), strict=True):
        counts[name] = counts.get(name, 0) + count
    return counts
