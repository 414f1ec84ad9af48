"""OpenMP's idle workers, which slow those of other threads down.

Every thread that runs torch on a CPU has OpenMP workers of its own. GNU's OpenMP counts all of the
process: once there are more than cores, workers no longer wait for work awake but sleep, and each
of a model's hundreds of parallel regions has to wake them. With two cores, one thread that did
something parallel before (making a model does) and an engine's thread are enough: a decoding step
of 64 rows then took 55 ms, and 40 without the idle workers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_OMP_PAUSE_SOFT = 1


def end_idle_workers() -> None:
    """End the calling thread's OpenMP workers; its next parallel region makes new ones. O(workers).

    Does nothing where OpenMP is not GNU's, or not loaded yet.
    """
    pause = _pause()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # torch brings its own copy along: the one that is loaded counts.
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if "/libgomp" in line}
    if len(paths) != 1:
        return None
    pause: Callable[[int], int] | None
    pause = getattr(ctypes.CDLL(paths.pop()), "omp_pause_resource_all", None)  # OpenMP 5.0
    return pause
