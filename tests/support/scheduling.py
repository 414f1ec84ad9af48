"""Helpers for scheduler tests: requests in one line, and steps with a simple sampler."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from zlib import crc32

import numpy as np

from kvpager import BlockManager, Request, Scheduler, StepPlan
from kvpager.plans import Reason

BLOCK_SIZE = 4


def make(
    num_blocks: int = 64, num_host_blocks: int = 0, block_size: int = BLOCK_SIZE, **options: Any
) -> Scheduler:
    """Return a scheduler over a new manager; the watermark is 0 by default."""
    manager = BlockManager(num_blocks, block_size, num_host_blocks)
    return Scheduler(manager, **{"watermark": 0.0, **options})


def ids(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def request(name: Hashable, length: int = 3, new: int = 4, **options: Any) -> Request:
    """Return a request with a unique prompt of `length` tokens, or with `prompt`."""
    prompt = options.pop("prompt", None)
    if prompt is None:
        prompt = ids(length, 1000 * (crc32(repr(name).encode()) % 100_003))
    return Request(request_id=name, prompt=prompt, max_new_tokens=new, **options)


def complete(scheduler: Scheduler, plan: StepPlan, times: int = 1, token: int = 7) -> np.ndarray:
    """Continue every row that needs logits `times` times."""
    rows = np.repeat(plan.needs_logits.nonzero()[0], times)
    found = scheduler.complete(plan, rows, token + np.arange(len(rows)))
    scheduler.check()
    return found


def step(scheduler: Scheduler) -> StepPlan:
    """Plan a step and continue every row once. Fails if there is nothing to do."""
    plan = scheduler.plan()
    assert plan is not None
    scheduler.check()
    if len(plan):
        complete(scheduler, plan)
    return plan


def run(
    scheduler: Scheduler, each: Callable[[StepPlan], object] = len, steps_max: int = 2_000
) -> dict[Hashable, Reason]:
    """Run to the end; return the reason of each request, in the order of their ends."""
    ended: dict[Hashable, Reason] = {}
    for _ in range(steps_max):
        if not scheduler.has_work:
            return ended
        plan = step(scheduler)
        each(plan)
        for name, reason in plan.ended:
            assert name not in ended
            ended[name] = reason
    raise AssertionError(f"after {steps_max} steps there are still {scheduler.request_ids}")


def rows(plan: StepPlan) -> dict[Hashable, int]:
    """Return the number of tokens that a step computes for each request."""
    counts: dict[Hashable, int] = {}
    for name, count in zip(plan.request_ids, plan.num_scheduled.tolist(), strict=True):
        counts[name] = counts.get(name, 0) + count
    return counts
