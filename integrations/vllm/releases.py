"""The releases of vLLM that kvpager supports. Its offloading interface changes between releases."""

from __future__ import annotations

import re

OLDEST, BELOW = (0, 32), (0, 34)


def check_release(version: str) -> None:
    """Raise `ImportError` for a release of vLLM that kvpager was not written for. O(1)."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) < BELOW:
        wanted = "vllm>={}.{},<{}.{}".format(*OLDEST, *BELOW)
        raise ImportError(f"vllm {version}: kvpager needs another release. Install '{wanted}'.")
