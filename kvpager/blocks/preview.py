"""Which cached blocks would leave next, without evicting one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.eviction import Evictor
from kvpager.blocks.radix import Node
from kvpager.plans import NO_BLOCKS, Int32


class _Place(NamedTuple):
    """A leaf node in the order of eviction, and how many of its blocks are left."""

    rank: float
    number: int  # orders leaves of equal rank
    node: Node
    num_left: int


def leaving(
    evictor: Evictor,
    count: int,
    wanted: Callable[[Int32], NDArray[np.bool_]],
    look_ahead: int,
) -> tuple[Int32, bool]:
    """Return the first `count` wanted blocks in the order in which blocks would be evicted.

    Looks at the next `look_ahead` blocks: idle blocks at the ends of leaf nodes, and idle blocks
    before them. Also returns True if it looked at `look_ahead` blocks, and False if it stopped
    earlier. Does not consider quotas. O(blocks looked at * log blocks).
    """
    order, found, num_found = _Order(evictor), list[Int32](), 0
    num_gone: dict[Node, int] = {}  # children that have left
    while num_found < count and look_ahead > 0 and (place := order.pop()) is not None:
        node, end = place.node, place.num_left
        tail = node.blocks[max(end - look_ahead, 0) : end][::-1]
        ranks = evictor.policy.rank(tail.astype(np.intp))
        next_to_evict = (ranks <= order.next_rank) & evictor.idle(tail)
        next_to_evict[0] = True
        gone = tail if next_to_evict.all() else tail[: int(next_to_evict.argmin())]
        found.append(gone[wanted(gone)])
        num_found += len(found[-1])
        look_ahead, end = look_ahead - len(gone), end - len(gone)
        if end:
            order.push(node, end)
        elif (parent := node.parent) is not None and parent.parent is not None:
            num_gone[parent] = num_gone.get(parent, 0) + 1
            if num_gone[parent] == len(parent.children):
                order.push(parent, len(parent.blocks))
    return np.concatenate([NO_BLOCKS, *found]).astype(np.int32)[:count], look_ahead <= 0


class _Order:
    """Leaf nodes in the order of eviction: those that are queued, and those that follow."""

    def __init__(self, evictor: Evictor) -> None:
        self._evictor = evictor
        queued: Iterable[tuple[float, int, Node]] = heapq.merge(
            *(queue.in_order() for queue in evictor.queues())
        )
        self._queued = (
            _Place(rank, number, node, len(node.blocks))
            for rank, number, node in queued
            if evictor.is_idle_leaf(node)
        )
        self._first = next(self._queued, None)
        self._pushed: list[_Place] = []
        self._count = 0

    @property
    def next_rank(self) -> float:
        """The rank of the first leaf, or infinity. O(1)."""
        places = [place for place in (self._first, *self._pushed[:1]) if place is not None]
        return min((place.rank for place in places), default=np.inf)

    def push(self, node: Node, num_left: int) -> None:
        """Add what is left of a run, if its last block is idle. O(log n)."""
        last = node.blocks[num_left - 1 : num_left].astype(np.intp)
        if self._evictor.idle(last)[0]:
            self._count += 1
            rank = float(self._evictor.policy.rank(last)[0])
            heapq.heappush(self._pushed, _Place(rank, self._count, node, num_left))

    def pop(self) -> _Place | None:
        """Remove and return the first leaf. Queued leaves go before others of equal rank."""
        first, pushed = self._first, self._pushed
        if pushed and (first is None or pushed[0].rank < first.rank):
            return heapq.heappop(pushed)
        self._first = next(self._queued, None)
        return first
