"""Ends idle OpenMP workers, which slow down the workers of other threads.

Every thread that runs torch on a CPU has OpenMP workers of its own. If a process has more workers
than cores, GNU's OpenMP puts idle workers to sleep instead of letting them spin. Then each of a
model's hundreds of parallel regions has to wake them. On two cores, the workers of the thread that
made the model are enough: a decoding step of 64 rows took 55 ms with them and 40 ms without.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_OMP_PAUSE_SOFT = 1


def end_idle_workers() -> None:
    """End the OpenMP workers of the calling thread. O(workers).

    The next parallel region makes new workers. Does nothing unless GNU's OpenMP is loaded.
    """
    pause = _pause()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # torch ships its own copy of the library, so look for the loaded one.
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if "/libgomp" in line}
    if len(paths) != 1:
        return None
    pause: Callable[[int], int] | None
    pause = getattr(ctypes.CDLL(paths.pop()), "omp_pause_resource_all", None)  # OpenMP 5.0
    return pause
