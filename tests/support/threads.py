"""Wait for threads that a test must not leave behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from kvpager.storage.tiers.follower import TierFollower

PATIENCE = 60.0


def join_all(are_meant: Callable[[threading.Thread], bool]) -> None:
    """Wait until no such thread is alive. Raises: `AssertionError` after a minute."""
    deadline = time.monotonic() + PATIENCE
    while left := [thread for thread in threading.enumerate() if are_meant(thread)]:
        assert time.monotonic() < deadline, left
        for thread in left:
            with contextlib.suppress(RuntimeError):  # another thread is just starting it
                thread.join(PATIENCE)


def wait_for_stores(follower: TierFollower) -> None:
    """Wait until the loads and saves of a follower have ended, and their reports."""
    all_loaders = threading.Barrier(3)
    for _ in range(2):
        follower._loader._threads.submit(all_loaders.wait, PATIENCE)
    all_loaders.wait(PATIENCE)
    follower._saver._thread.submit(lambda: None).result(PATIENCE)
