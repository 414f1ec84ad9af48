"""Wait for threads that a test must not leave behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

PATIENCE = 60.0


def join_all(are_meant: Callable[[threading.Thread], bool]) -> None:
    """Wait until no such thread is alive. Raises: `AssertionError` after a minute."""
    deadline = time.monotonic() + PATIENCE
    while left := [thread for thread in threading.enumerate() if are_meant(thread)]:
        assert time.monotonic() < deadline, left
        for thread in left:
            with contextlib.suppress(RuntimeError):  # another thread is just starting it
                thread.join(PATIENCE)
