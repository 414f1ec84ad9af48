"""What the benchmarks of kernels and generation share: turns, medians, lines, the machine.

Contenders take turns (A B C A B C ..), so that a machine whose speed drifts is slow for all of
them, and a ratio is the median of the ratios within the turns.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvpager.storage import memory

Work = Callable[[], object]
Times = dict[str, list[float]]

_CPU_CACHES = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


# -------------------------------------------------------------------- taking turns


def turns(
    works: Mapping[str, Work],
    repeats: int,
    *,
    seconds: float = 20.0,
    at_least: int = 3,
    clock: Callable[[Work], float] | None = None,
) -> Times:
    """Run every work once per turn, after one turn that is not counted. Seconds per run.

    Ends after `repeats` turns, or sooner when `seconds` have passed, but not before `at_least`.
    `clock` runs a work and says how long it took; by default the wall clock around it.
    """
    measure = clock or wall_clock
    times: Times = {name: [] for name in works}
    for work in works.values():
        work()
    start = time.perf_counter()
    for turn in range(repeats):
        for name, work in works.items():
            times[name].append(measure(work))
        if turn + 1 >= at_least and time.perf_counter() - start > seconds:
            break
    return times


def wall_clock(work: Work) -> float:
    """Return the seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(times: Times, names: Iterable[str]) -> str:
    """The quickest of `names` by its median."""
    return min(names, key=lambda name: statistics.median(times[name]))


def ratio(times: Times, name: str, over: str) -> float:
    """Return the time of `name` relative to `over`: the median over the turns."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of one or more positive numbers."""
    logs = [math.log(each) for each in ratios]
    return math.exp(sum(logs) / len(logs))


# -------------------------------------------------------------------- lines


class Lines:
    """Figures as JSON lines on stdout; kept too, for summaries and files."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def add(self, name: str, value: float, unit: str, **more: Any) -> None:
        """Print and keep one figure."""
        line = {"name": name, "value": rounded(value), "unit": unit, **more}
        self.kept.append(line)
        print(json.dumps(line), flush=True)


def rounded(value: float) -> float:
    """Round to one decimal, or to four significant digits where that is finer."""
    if not value or not math.isfinite(value):
        return value
    return round(value, max(1, 3 - math.floor(math.log10(abs(value)))))


def note(text: str) -> None:
    """Say something that is no figure, on stderr."""
    print(text, file=sys.stderr, flush=True)


def progress(items: list[Any], label: str) -> Iterable[Any]:
    """The items, with a bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, unit="case", file=sys.stderr, disable=None)


# -------------------------------------------------------------------- the machine


def describe(device_type: str = "cpu", **more: Any) -> dict[str, Any]:
    """Print, as the first line, the machine and which kernels run on it; returns that line."""
    from kvpager.kernels import backends

    backends.select("paged_attention", torch.device(device_type))  # some load when first needed
    running = backends.active()[device_type]
    kernels = {name: f"{entry.backend}: {entry.reason}" for name, entry in running.items()}
    line = {"machine": machine() | more, "kernels": kernels}
    print(json.dumps(line), flush=True)
    return line


def machine() -> dict[str, Any]:
    """Return what figures depend on, as plain data."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "python": platform.python_version(),
    }
    return found | {name: installed(name) for name in ("torch", "transformers", "triton")}


def installed(name: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.processor()


def cache_bytes(level: int) -> int:
    """Bytes of all caches of that level that this machine's CPUs have; 0 where it does not say."""
    found = {}
    for index in _CPU_CACHES.glob("cpu[0-9]*/cache/index*"):
        try:
            if (index / "level").read_text().strip() != str(level):
                continue
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
            shared = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        if size:
            found[shared] = int(size[1]) * _UNITS.get(size[2], 1)
    return sum(found.values())


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.search(r"MemAvailable:\s*(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0


class ReadBandwidth:
    """The quickest plain read of memory found: which form, and its bytes per second.

    No single instruction does it. Forms that compute as little as possible compete: sums and
    maxima of torch, and the C library's search for an absent byte. Each reads plain pages, and the
    huge pages that a `BlockStorage` asks for.
    """

    def __init__(self, num_bytes: int = 256 << 20, repeats: int = 5) -> None:
        # Kept: the C library's search knows its address only.
        plain = torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
        huge = memory.allocate(1, num_bytes, torch.uint8, "cpu").fill_(1)
        self._buffers = plain, huge
        works = self._forms(plain)
        works |= {f"{name}, huge pages": work for name, work in self._forms(huge[0]).items()}
        times = turns(works, repeats)
        self.num_bytes = num_bytes
        self.form = min(times, key=lambda name: min(times[name]))
        self.bytes_per_second = num_bytes / min(times[self.form])
        self.read = works[self.form]  # once more, to take turns with something else

    @staticmethod
    def _forms(buffer: torch.Tensor) -> dict[str, Work]:
        floats, integers = buffer.view(torch.float32), buffer.view(torch.int64)
        forms: dict[str, Work] = {
            "torch.sum of float32": floats.sum,
            "torch.amax of float32": floats.amax,
            "torch.sum of int64": integers.sum,
        }
        search = _memchr()
        if search is not None:
            parts = [
                (chunk.data_ptr(), len(chunk)) for chunk in buffer.chunk(torch.get_num_threads())
            ]
            forms["memchr"] = lambda: _in_threads([(search, start, 0, n) for start, n in parts])
        return forms


def _memchr() -> Any:
    try:
        function = ctypes.CDLL(None).memchr
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    function.restype = ctypes.c_void_p
    return function


def _in_threads(calls: list[tuple[Any, ...]]) -> None:
    # ctypes lets go of the interpreter lock for the time of a call.
    threads = [threading.Thread(target=call[0], args=call[1:]) for call in calls[1:]]
    for thread in threads:
        thread.start()
    calls[0][0](*calls[0][1:])
    for thread in threads:
        thread.join()
