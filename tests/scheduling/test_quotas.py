"""Requests of namespaces with quotas: all of them end, within their quotas."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable
from dataclasses import replace

import numpy as np
import pytest

from kvpager import BlockManager, Scheduler, StepPlan
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.plans import Reason
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.queue import Fair
from tests.support.scheduling import BLOCK_SIZE, ids, request


def scheduler_of(source: random.Random, kind: str) -> Scheduler:
    num_blocks, num_host_blocks = source.choice([24, 40, 80]), source.choice([0, 6, 80])
    manager: BlockManager | GroupedManager
    if kind == "groups":
        chunk = source.choice([None, 8])
        windows = (None, 8)
        manager = GroupedManager(windows, num_blocks, BLOCK_SIZE, num_host_blocks, max_chunk=chunk)
    else:
        manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks)
    return Scheduler(
        manager,
        costs=PreemptionCosts(seconds_per_block=source.choice([0.0, math.inf])),
        policy=source.choice(["fifo", "priority", "fair"]),
        prefix_cache=source.random() < 0.7,
        max_batch_tokens=source.choice([8, 64]),
        watermark=source.choice([0.0, 0.1]),
    )


def submit_some(scheduler: Scheduler, source: random.Random) -> dict[Hashable, int]:
    """Submit requests that can run; return the number of samples of each."""
    samples: dict[Hashable, int] = {}
    for name in range(25):
        count = source.choice([1, 1, 1, 2, 3])
        asked = request(
            name,
            new=source.randint(1, 18),
            prompt=ids(source.randint(1, 14), source.choice([0, 0, 50])),
            namespace=source.choice(["a", "b", "c", None]),
            tenant=source.choice("xyz"),
            n=count,
        )
        if not isinstance(scheduler._table.policy, Fair):
            asked = replace(asked, tenant=None)
        try:
            scheduler.submit(asked)
        except ValueError as error:
            assert "may need" in str(error)  # noqa: PT017
        else:
            samples[name] = count
    return samples


@pytest.mark.mostly_slow(quick=6)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["blocks", "groups"])
def test_random_requests_under_quotas_all_end(kind: str, seed: int) -> None:
    source = random.Random(seed)
    scheduler = scheduler_of(source, kind)
    quotas = scheduler.manager.quotas
    ceilings = {"a": source.randint(6, 12), "b": source.randint(6, 20)}
    for namespace, ceiling in ceilings.items():
        quotas.set(namespace, ceiling=ceiling)
    samples = submit_some(scheduler, source)
    begun: set[Hashable] = set()
    ended: dict[Hashable, Reason] = {}

    def continuations(plan: StepPlan) -> list[int]:
        rows = []
        for row in plan.needs_logits.nonzero()[0].tolist():
            name = plan.request_ids[row]
            rows += [row] * (1 if name in begun else samples[name])
            begun.add(name)
        return rows

    for _ in range(3000):
        if not scheduler.has_work:
            break
        plan = scheduler.plan()
        assert plan is not None, scheduler.request_ids
        if len(plan):
            rows = continuations(plan)
            scheduler.complete(plan, np.array(rows, np.int64), 7 + np.arange(len(rows)))
        scheduler.check()
        for namespace, ceiling in ceilings.items():
            assert quotas.used(namespace) <= ceiling  # type: ignore[attr-defined]
        ended.update(plan.ended)
    assert ended == dict.fromkeys(samples, Reason.FINISHED)
