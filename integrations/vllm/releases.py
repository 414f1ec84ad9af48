"""The releases of vLLM that kvpager supports. Its interfaces change between releases."""

from __future__ import annotations

import re

OLDEST, BELOW = (0, 32), (0, 34)


def check_release(version: str, *, below: tuple[int, int] = BELOW) -> None:
    """Raise `ImportError` for a release of vLLM that kvpager was not written for. O(1)."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) < below:
        wanted = "vllm>={}.{},<{}.{}".format(*OLDEST, *below)
        raise ImportError(f"vllm {version}: kvpager needs another release. Install '{wanted}'.")
