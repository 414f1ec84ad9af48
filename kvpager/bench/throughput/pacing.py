"""Yield requests when they are due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpager.bench.throughput.workload import Item, Workload


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock in seconds, and the function that waits."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


MONOTONIC = Clock(now=time.monotonic)  # the clock of `Output` times
PERFORMANCE = Clock()


def arrivals(workload: Workload, start: float, clock: Clock) -> Iterator[tuple[int, Item]]:
    """Yield number and request when each is due, late requests at once. O(requests)."""
    for number, item in enumerate(workload.items):
        left = start + item.arrival - clock.now()
        if left > 0:
            clock.sleep(left)
        yield number, item
