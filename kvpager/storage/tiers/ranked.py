"""Slots in the order of their ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

_OUTDATED_MAX = 64


class Ranked:
    """Slots by rank, lowest first; equal ranks in the order of pushes. All O(log n)."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, int]] = []  # with outdated entries
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    def push(self, rank: float, slot: int) -> None:
        """Add a slot, or change its rank."""
        self._count += 1
        self._places[slot] = (rank, self._count)
        heapq.heappush(self._heap, (rank, self._count, slot))
        if len(self._heap) > 2 * len(self._places) + _OUTDATED_MAX:
            self._heap = [(*place, slot) for slot, place in self._places.items()]
            heapq.heapify(self._heap)

    def forget(self, slots: Iterable[int]) -> None:
        """Remove slots, if they are queued."""
        for slot in slots:
            self._places.pop(slot, None)

    def pop(self) -> int:
        """Remove and return the first slot."""
        while True:
            rank, count, slot = heapq.heappop(self._heap)
            if self._places.get(slot) == (rank, count):
                del self._places[slot]
                return slot

    def in_order(self) -> list[int]:
        """Return all slots, first to last. O(n log n)."""
        return sorted(self._places, key=self._places.__getitem__)
