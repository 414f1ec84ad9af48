"""Sizes of memory as texts that people read and write."""

from __future__ import annotations

import math
import re

from kvpager import _validate as arguments

_BYTES_MAX = 1 << 60
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}


def parse_memory(memory: int | str | None, name: str = "memory") -> int | None:
    """`"4GiB"`, `"500 MB"` or a number of bytes, as bytes; None stays None (no bound)."""
    if memory is None:
        return None
    if arguments.is_int(memory):
        return arguments.count(name, int(memory), at_least=1, at_most=_BYTES_MAX)
    if not isinstance(memory, str):
        raise TypeError(f"{name} {memory!r}: expected bytes or a text such as '4GiB'")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", memory.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{name} {memory!r}: expected a size such as '4GiB', '500MB' or 10**9")
    num_bytes = int(float(match[1]) * _UNITS[match[2]])
    return arguments.count(name, num_bytes, at_least=1, at_most=_BYTES_MAX)


def size(num_bytes: float, *, round_up: bool = False) -> str:
    """Return `1536` as `1.5 KiB`, or no less than the bytes given with `round_up`. O(1)."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or abs(value) >= 100 else 1
    if round_up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {unit}"
