"""The queues of cached blocks, from which eviction takes the lowest rank of all accounts."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from kvpager.errors import BrokenInvariant

T = TypeVar("T")

_OUTDATED_MAX = 64


class Queue(Generic[T]):
    """Nodes in eviction order, and deferred nodes, which are evicted when no other is left.

    `push` of a queued node changes its rank; its outdated heap entry is dropped later.
    """

    def __init__(self, note: Callable[[Queue[T], float], None]) -> None:
        """Make an empty queue that calls `note` for each node that ranks below `listed`."""
        self.listed = np.inf  # at most the first rank; inf: `Queues` skips this queue
        self._note = note
        self.ranks: dict[T, tuple[float, int]] = {}
        self.deferred: OrderedDict[T, None] = OrderedDict()
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0

    def push(self, rank: float, node: T) -> None:
        """Queue `node` by `rank`; equal ranks leave in the order of pushes. O(log n)."""
        self.deferred.pop(node, None)
        if node in self.ranks and self.ranks[node][0] == rank:
            return
        self._count += 1
        self.ranks[node] = (rank, self._count)
        heapq.heappush(self._heap, (rank, self._count, node))
        if rank < self.listed:
            self._note(self, rank)
        if len(self._heap) > 2 * len(self.ranks) + _OUTDATED_MAX:
            self._heap = [(*place, node) for node, place in self.ranks.items()]
            heapq.heapify(self._heap)

    def first(self) -> tuple[float, T] | None:
        """Return the lowest rank and its node. Amortised O(log n)."""
        while self._heap:
            rank, count, node = self._heap[0]
            if self.ranks.get(node) == (rank, count):
                return rank, node
            heapq.heappop(self._heap)
        return None

    def in_order(self) -> Iterator[tuple[float, int, T]]:
        """Yield (rank, number, node) from the lowest rank on, and change nothing. O(log n) each."""
        heap, ahead = self._heap, [(self._heap[0], 0)] if self._heap else []
        while ahead:
            entry, at = heapq.heappop(ahead)
            for below in (2 * at + 1, 2 * at + 2):
                if below < len(heap):
                    heapq.heappush(ahead, (heap[below], below))
            rank, count, node = entry
            if self.ranks.get(node) == (rank, count):
                yield entry

    def drop_first(self) -> None:
        """Remove the node that `first` returned. O(log n)."""
        _, _, node = heapq.heappop(self._heap)
        del self.ranks[node]

    def defer(self, node: T) -> None:
        """Defer `node`: it has idle blocks, but held blocks follow them. O(1)."""
        self.deferred[node] = None

    def first_deferred(self) -> T:
        """Remove and return the node that was deferred first. O(1)."""
        return self.deferred.popitem(last=False)[0]

    def clear(self) -> None:
        """Forget all nodes. O(n)."""
        self.listed = np.inf
        self.ranks.clear()
        self.deferred.clear()
        self._heap.clear()

    def forget(self, node: T) -> None:
        """Remove `node`. O(1)."""
        self.ranks.pop(node, None)
        self.deferred.pop(node, None)


class Queues(dict[int, Queue[T]]):
    """The queues of all accounts by number, in the order of their first nodes' ranks.

    A heap lists each queue by a lower bound of its first node's rank. A node that ranks lower lists
    its queue again; an outdated bound is corrected when it reaches the top of the heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fronts: list[tuple[float, int]] = []
        self.add(0)

    def add(self, number: int) -> None:
        """Add an empty queue. O(1)."""
        self[number] = Queue(partial(self._note, number))

    def _note(self, number: int, queue: Queue[T], rank: float) -> None:
        queue.listed = rank
        heapq.heappush(self._fronts, (rank, number))
        if len(self._fronts) > 2 * len(self) + _OUTDATED_MAX:
            self._fronts = [
                (queue.listed, number) for number, queue in self.items() if queue.listed < np.inf
            ]
            heapq.heapify(self._fronts)

    def relist(self, number: int) -> None:
        """List a queue again after it was empty or had no allowance. Amortised O(log n)."""
        queue = self[number]
        first = queue.first()
        if first is not None and first[0] < queue.listed:
            self._note(number, queue, first[0])

    def lowest(
        self, first: Callable[[Queue[T]], tuple[float, T] | None], left: Callable[[int], int]
    ) -> tuple[int, T, float] | None:
        """Return the queue whose first node ranks lowest, that node, and the next queue's rank.

        Amortised O(log queues). `first` returns a queue's first node, `left` how many of its blocks
        may be evicted. A queue without a node or an allowance is skipped until it is listed again.
        """
        best = self._top(first, left)
        if best is None:
            return None
        number, (_, node) = best
        top = heapq.heappop(self._fronts)
        after = self._top(first, left)
        heapq.heappush(self._fronts, top)
        return number, node, np.inf if after is None else after[1][0]

    def _top(
        self, first: Callable[[Queue[T]], tuple[float, T] | None], left: Callable[[int], int]
    ) -> tuple[int, tuple[float, T]] | None:
        fronts = self._fronts
        while fronts:
            rank, number = fronts[0]
            queue = self.get(number)
            if queue is None or queue.listed != rank:
                heapq.heappop(fronts)
                continue
            entry = first(queue)
            if entry is None or left(number) <= 0:
                heapq.heappop(fronts)
                queue.listed = np.inf
            elif entry[0] > rank:
                queue.listed = entry[0]
                heapq.heapreplace(fronts, (entry[0], number))
            else:
                return number, entry
        return None

    def check(self, is_open: Callable[[int], bool]) -> None:
        """Raise `BrokenInvariant` unless each queue with evictable blocks is listed. O(queues)."""
        for number, queue in self.items():
            first = queue.first()
            if first is not None and is_open(number) and queue.listed > first[0]:
                raise BrokenInvariant(f"eviction: queue {number} is not listed by its first node")
            if queue.listed < np.inf and (queue.listed, number) not in self._fronts:
                raise BrokenInvariant(f"eviction: queue {number} is not where it is listed")
