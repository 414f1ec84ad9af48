"""Letting requests come when they are due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpager.bench.throughput.workload import Item, Workload


@dataclass(frozen=True, slots=True)
class Clock:
    """What tells the time, in seconds, and how to let it pass."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


MONOTONIC = Clock(now=time.monotonic)  # what `Engine` stamps its outputs with
PERFORMANCE = Clock()


def arrivals(workload: Workload, start: float, clock: Clock) -> Iterator[tuple[int, Item]]:
    """Number and request, each when it is due; one that is late comes at once. O(requests)."""
    for number, item in enumerate(workload.items):
        left = start + item.arrival - clock.now()
        if left > 0:
            clock.sleep(left)
        yield number, item
