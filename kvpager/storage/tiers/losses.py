"""The keys that a store stopped to offer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_REMEMBERED_MAX = 1 << 16


class Losses:
    """Reports lost keys to all who follow. Any thread may call any method."""

    def __init__(self) -> None:
        self._followers: list[deque[bytes]] = []

    def follow(self) -> deque[bytes]:
        """Return a queue of the keys lost from now on. Take them from the left. O(1).

        The queue keeps the last 65,536 keys.
        """
        self._followers.append(queue := deque[bytes](maxlen=_REMEMBERED_MAX))
        return queue

    def add(self, keys: Iterable[bytes]) -> None:
        """Report keys. O(keys)."""
        lost = list(keys)
        for queue in self._followers:
            queue.extend(lost)
