"""The releases of SGLang that kvpager supports. Its storage interface changes between releases."""

from __future__ import annotations

import re

OLDEST, BELOW = (0, 5, 23), (0, 5, 24)


def check_release(version: str) -> None:
    """Raise `ImportError` for a release of SGLang that kvpager was not written for. O(1)."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) < BELOW:
        wanted = "sglang>={}.{}.{},<{}.{}.{}".format(*OLDEST, *BELOW)
        raise ImportError(f"sglang {version}: kvpager needs another release. Install '{wanted}'.")
