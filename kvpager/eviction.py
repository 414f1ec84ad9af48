"""Which cached block leaves first when room is needed.

A policy is told what happens to blocks and gives each a rank; the lowest rank among the tips of
the prefix trees leaves. A rank changes only when its block is named in a call (`fallen` names
those that fell by themselves), so that the order can be kept in a heap.

    admit ──▶ touch ──▶ touch ──▶ retire ──▶ (touch ──▶ retire)* ──▶ forget
    offered   reused    reused    nobody     reused again            evicted, or withdrawn
                                  holds it

`lru`, `lfu` and `fifo` are what their names say. `priority` ranks by what `retain` said, then by
last use.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpager.fingerprints import moved

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
UInt64 = NDArray[np.uint64]
Arrays = dict[str, NDArray[np.generic]]
T = TypeVar("T")

PRIORITY_MAX = 100
PRIORITY_DEFAULT = 50
# A rank is a float64, exact up to 2**53: the low bits order by time, the high ones by merit.
_TICKS = 2.0**44
_MERIT_MAX = 2**8
_OUTDATED_MAX = 64


class EvictionPolicy(Protocol):
    """What the prefix index asks of a policy. Blocks of a call are distinct, int32 [n]."""

    needs_fingerprints: bool

    def admit(self, blocks: Int32, fingerprints: UInt64) -> None:
        """`blocks` are offered from now on; uint64 [n] or empty, see `kvpager.fingerprints`."""

    def touch(self, blocks: Int32) -> None:
        """Another sequence uses `blocks`."""

    def retire(self, blocks: Int32) -> None:
        """No table holds `blocks` any more."""

    def rank(self, blocks: Int32) -> Float64:
        """The rank of each block, float64 [n]."""

    def forget(self, blocks: Int32) -> None:
        """`blocks` are offered no longer."""

    def fallen(self) -> Int32:
        """Blocks whose rank fell since the last call although no call named them."""

    def retain(self, blocks: Int32, priority: int, ttl_s: float | None) -> bool:
        """Keep `blocks` by `priority`, for `ttl_s` seconds; False where the policy cannot."""

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size, and its blocks to their new places."""

    def state(self) -> Arrays:
        """All it knows, as plain arrays."""

    def restore(self, state: Arrays) -> None:
        """Know what `state` says, and nothing else."""


class BlockPolicy:
    """A policy that keeps a few numbers for each block. Every call is O(blocks named)."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {}
    needs_fingerprints = False

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.now = 0  # ticks once for each call: logical time
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, np.zeros(num_blocks, dtype))

    def tick(self) -> int:
        """A moment later than all before. O(1)."""
        self.now += 1
        return self.now

    def admit(self, blocks: Int32, fingerprints: UInt64) -> None:  # noqa: D102
        pass

    def touch(self, blocks: Int32) -> None:  # noqa: D102
        pass

    def retire(self, blocks: Int32) -> None:  # noqa: D102
        pass

    def forget(self, blocks: Int32) -> None:  # noqa: D102
        pass

    def fallen(self) -> Int32:  # noqa: D102
        return _NONE

    def retain(self, blocks: Int32, priority: int, ttl_s: float | None) -> bool:  # noqa: D102
        return False

    def resize(self, num_blocks: int, places: Int32) -> None:  # noqa: D102
        self.num_blocks = num_blocks
        for name in self.COLUMNS:
            setattr(self, name, moved(getattr(self, name), num_blocks, places))

    def state(self) -> Arrays:  # noqa: D102
        columns = {name: getattr(self, name).copy() for name in self.COLUMNS}
        return {"now": np.array(self.now), **columns}

    def restore(self, state: Arrays) -> None:  # noqa: D102
        self.now = int(np.asarray(state["now"]))
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, _column(state[name], self.num_blocks, dtype))


class LRU(BlockPolicy):
    """Least recently used: the block leaves that nobody has held for longest."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {"last_used": np.int64}
    last_used: Int64

    def retire(self, blocks: Int32) -> None:  # noqa: D102
        self.last_used[blocks] = self.tick()

    def rank(self, blocks: Int32) -> Float64:  # noqa: D102
        return self.last_used[blocks].astype(np.float64)


class FIFO(BlockPolicy):
    """First in, first out: the block leaves that was offered first."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {"admitted": np.int64}
    admitted: Int64

    def admit(self, blocks: Int32, fingerprints: UInt64) -> None:  # noqa: D102
        self.admitted[blocks] = self.tick()

    def rank(self, blocks: Int32) -> Float64:  # noqa: D102
        return self.admitted[blocks].astype(np.float64)


class LFU(LRU):
    """Least frequently used; among equals, least recently used."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {**LRU.COLUMNS, "uses": np.int32}
    uses: Int32

    def admit(self, blocks: Int32, fingerprints: UInt64) -> None:  # noqa: D102
        self.uses[blocks] = 1

    def touch(self, blocks: Int32) -> None:  # noqa: D102
        self.uses[blocks] = np.minimum(self.uses[blocks] + 1, _MERIT_MAX)

    def rank(self, blocks: Int32) -> Float64:  # noqa: D102
        ranks: Float64 = self.uses[blocks] * _TICKS + self.last_used[blocks]
        return ranks


class Priority(LRU):
    """By priority, 0 to 100, lowest first; among equals, least recently used.

    A block begins at 50 and keeps what `retain` gives it for a time to live, in seconds, or for as
    long as it is offered; when the time is over it is the first to leave. Retention by priority
    and time is TensorRT-LLM's.
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        **LRU.COLUMNS,
        "priority": np.int32,
        "expires": np.float64,
    }
    priority: Int32
    expires: Float64

    def __init__(self, num_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(num_blocks)
        self._clock = clock
        self._due: list[tuple[float, int]] = []

    def admit(self, blocks: Int32, fingerprints: UInt64) -> None:  # noqa: D102
        self.priority[blocks] = PRIORITY_DEFAULT
        self.expires[blocks] = np.inf

    def retain(self, blocks: Int32, priority: int, ttl_s: float | None) -> bool:  # noqa: D102
        self.priority[blocks] = priority
        expires = np.inf if ttl_s is None else self._clock() + ttl_s
        self.expires[blocks] = expires
        if ttl_s is not None:
            for block in blocks.tolist():
                heapq.heappush(self._due, (expires, block))
        return True

    def fallen(self) -> Int32:  # noqa: D102
        if not self._due or self._due[0][0] > (now := self._clock()):
            return _NONE
        over = []
        while self._due and self._due[0][0] <= now:
            expires, block = heapq.heappop(self._due)
            if self.expires[block] == expires:
                self.priority[block] = -1
                self.expires[block] = np.inf
                over.append(block)
        return np.array(over, np.int32)

    def forget(self, blocks: Int32) -> None:  # noqa: D102
        self.expires[blocks] = np.inf

    def rank(self, blocks: Int32) -> Float64:  # noqa: D102
        ranks: Float64 = self.priority[blocks] * _TICKS + self.last_used[blocks]
        return ranks

    def resize(self, num_blocks: int, places: Int32) -> None:  # noqa: D102
        super().resize(num_blocks, places)
        self._await()

    def state(self) -> Arrays:  # noqa: D102
        # Seconds left: another process has another clock.
        return {**super().state(), "expires": self.expires - self._clock()}

    def restore(self, state: Arrays) -> None:  # noqa: D102
        super().restore(state)
        self.expires += self._clock()
        self._await()

    def _await(self) -> None:
        dated = np.flatnonzero(np.isfinite(self.expires) & (self.expires > 0))
        self._due = list(zip(self.expires[dated].tolist(), dated.tolist(), strict=True))
        heapq.heapify(self._due)


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "priority": Priority,
}


def make_policy(name: str, num_blocks: int) -> EvictionPolicy:
    """The policy called `name`. Raises `ValueError` for another name than those of `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"eviction {name!r}: expected one of {', '.join(POLICIES)}")
    return POLICIES[name](num_blocks)


class Queue(Generic[T]):
    """Nodes in the order in which they may leave, and those put aside until nothing else is left.

    `push` again moves a node; what the heap still says about it is outdated and dropped later.
    """

    def __init__(self) -> None:
        self.ranks: dict[T, tuple[float, int]] = {}
        self.aside: dict[T, None] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0

    def push(self, rank: float, node: T) -> None:
        """`node` leaves when its rank is the lowest; among equals, the first pushed. O(log n)."""
        self.aside.pop(node, None)
        if node in self.ranks and self.ranks[node][0] == rank:
            return
        self._count += 1
        self.ranks[node] = (rank, self._count)
        heapq.heappush(self._heap, (rank, self._count, node))
        if len(self._heap) > 2 * len(self.ranks) + _OUTDATED_MAX:
            self._heap = [(*place, node) for node, place in self.ranks.items()]
            heapq.heapify(self._heap)

    def first(self) -> tuple[float, T] | None:
        """The node with the lowest rank. Amortised O(log n)."""
        while self._heap:
            rank, count, node = self._heap[0]
            if self.ranks.get(node) == (rank, count):
                return rank, node
            heapq.heappop(self._heap)
        return None

    def drop_first(self) -> None:
        """Take what `first` returned out. O(log n)."""
        _, _, node = heapq.heappop(self._heap)
        del self.ranks[node]

    def put_aside(self, node: T) -> None:
        """`node` cannot leave by itself, but some of its blocks are idle. O(1)."""
        self.aside[node] = None

    def aside_first(self) -> T:
        """Take out the node that was put aside first. O(1)."""
        node = next(iter(self.aside))
        del self.aside[node]
        return node

    def forget(self, node: T) -> None:
        """`node` is gone. O(1)."""
        self.ranks.pop(node, None)
        self.aside.pop(node, None)


def _column(
    values: NDArray[np.generic], num_blocks: int, dtype: type[np.generic]
) -> NDArray[np.generic]:
    if values.shape != (num_blocks,) or values.dtype != dtype:
        raise ValueError(f"eviction state: {values.dtype} {values.shape} for {num_blocks} blocks")
    return values.copy()


_NONE: Int32 = np.empty(0, np.int32)
