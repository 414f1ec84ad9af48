"""Format counts and sizes of memory for people."""

from __future__ import annotations

import math
from collections.abc import Iterable


def counted(count: int, thing: str) -> str:
    """Return `1 layer`, or `2 layers`. O(1)."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def listed(names: Iterable[str]) -> str:
    """Return `'a', 'b'`, the names that an argument may have. O(names)."""
    return ", ".join(map(repr, names))


def size(num_bytes: float, *, round_up: bool = False) -> str:
    """Return `1.5 KiB` for 1536; with `round_up`, never less than the bytes. O(1)."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or abs(value) >= 100 else 1
    if round_up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {unit}"


def change(now: int, before: int) -> str:
    """Return the change from `before` to `now`: `41% less`, `7% more`, `the same`. O(1)."""
    percent = round(100 * (now - before) / max(before, 1))
    if not percent:
        return "the same"
    return f"{abs(percent)}% {'more' if percent > 0 else 'less'}"
