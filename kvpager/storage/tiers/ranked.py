"""Slots in the order of their ranks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

_OUTDATED_MAX = 64


class Ranked:
    """Slots by rank, lowest first; equal ranks in the order of pushes.

    A push gives each slot the next number. Slots of one push with equal ranks are a *run*, one
    entry of the heap: its rank, the number of its first slot, a number above that of its last slot,
    and the slots, last first. `Ranked` skips entries of slots that were pushed again or forgotten.

    A held slot is passed over, and leaves in its place after `release`.
    """

    def __init__(self, num_slots: int) -> None:
        self._numbers = [0] * num_slots  # of the last push; 0: not queued
        self._heap: list[tuple[float, int, int, list[int]]] = []
        self._passed: dict[int, tuple[float, int]] = {}  # held slots: rank and number
        self._next = 1
        self._num_slots = 0
        self._num_entries = 0  # slots in the heap, with outdated ones

    def __len__(self) -> int:
        return self._num_slots

    def __contains__(self, slot: int) -> bool:
        return self._numbers[slot] > 0

    def queued(self, slots: Iterable[int]) -> list[int]:
        """Return those slots that are queued. O(slots)."""
        numbers = self._numbers
        return [slot for slot in slots if numbers[slot]]

    def push(self, ranks: Sequence[float], slots: Sequence[int]) -> None:
        """Add distinct slots, or change their ranks. O(slots + runs * log runs)."""
        self.forget(slots)
        self._num_slots += len(slots)
        first, start = self._next, 0
        self._next += len(slots)
        for number, slot in enumerate(slots, first):
            self._numbers[slot] = number
        for stop in range(1, len(slots) + 1):
            if stop == len(slots) or ranks[stop] != ranks[start]:
                self._add(ranks[start], first + start, first + stop, list(slots[start:stop])[::-1])
                start = stop
        if self._num_entries > 2 * self._num_slots + _OUTDATED_MAX:
            self._drop_outdated()

    def forget(self, slots: Iterable[int]) -> None:
        """Remove slots, if they are queued. O(slots)."""
        numbers = self._numbers
        for slot in slots:
            if numbers[slot]:
                numbers[slot] = 0
                self._num_slots -= 1

    def pop(self, is_held: Callable[[int], bool] | None) -> int | None:
        """Remove and return the first slot that is not held. O(log runs) amortized.

        Returns None if all slots are held.
        """
        numbers, heap = self._numbers, self._heap
        while heap:
            rank, number, end, slots = heap[0]
            slot = slots.pop()
            before = len(slots) + 1
            while slots and not number < numbers[slots[-1]] < end:
                slots.pop()
            self._num_entries -= before - len(slots)
            if slots:
                # Still the first: no other entry has a number between those of a run.
                heap[0] = (rank, numbers[slots[-1]], end, slots)
            else:
                heapq.heappop(heap)
            if numbers[slot] != number:
                continue
            if is_held is not None and is_held(slot):
                self._passed[slot] = rank, number
                continue
            numbers[slot] = 0
            self._num_slots -= 1
            return slot
        return None

    def release(self, slots: Iterable[int]) -> None:
        """Put slots that are no longer held back in their places. O(log runs) a slot."""
        for slot in slots:
            if slot in self._passed:
                rank, number = self._passed.pop(slot)
                self._add(rank, number, number + 1, [slot])

    def release_all(self) -> None:
        """Put all slots that were passed over back in their places. O(n log n)."""
        self.release(list(self._passed))

    def in_order(self) -> list[int]:
        """Return all slots, first to last, as if none were held. O(n log n)."""
        self.release_all()
        numbers = self._numbers
        places = [
            (rank, numbers[slot], slot)
            for rank, first, end, slots in self._heap
            for slot in slots
            if first <= numbers[slot] < end
        ]
        return [slot for _, _, slot in sorted(places)]

    def _add(self, rank: float, first: int, end: int, slots: list[int]) -> None:
        self._num_entries += len(slots)
        heapq.heappush(self._heap, (rank, first, end, slots))

    def _drop_outdated(self) -> None:
        runs, self._heap, self._num_entries = self._heap, [], 0
        for rank, first, end, slots in runs:
            left = [slot for slot in slots if first <= self._numbers[slot] < end]
            if left:
                self._heap.append((rank, self._numbers[left[-1]], end, left))
                self._num_entries += len(left)
        heapq.heapify(self._heap)
