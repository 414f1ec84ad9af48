"""Which cached blocks leave when room is needed, and in which order.

Idle leaves are evicted, lowest rank first, block by block from the end of a run: a longer prefix is
less likely to be shared. Idle blocks before held blocks are deferred: they are evicted last, with
all blocks that follow them. Each account of `kvpager.blocks.accounts` has its own queue.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.event_log import EventLog
from kvpager.blocks.eviction_queues import Queue, Queues
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.pool import Blocks
from kvpager.blocks.radix import Forest, Node
from kvpager.errors import BrokenInvariant
from kvpager.plans import NO_BLOCKS

_OWN_QUEUE = -1  # of a namespace without a quota, while its blocks are evicted


class Evictor:
    """Keeps the eviction order of idle cached blocks, and evicts them.

    Writes the queues, `end` and `children` of the nodes that leave, and, by `uncache`, which
    blocks the pool marks as cached.
    """

    def __init__(self, forest: Forest, policy: EvictionPolicy, log: EventLog | None = None) -> None:
        self.policy = policy
        self._forest = forest
        self._pool = forest.pool
        # By account number, see `kvpager.blocks.accounts`. Namespaces without a quota share 0.
        self._queues: Queues[Node] = Queues()
        self._queue_of: dict[str | None, int] = {}
        self._log = log
        if isinstance(policy, FailSafe):
            requeue = weakref.WeakMethod(self.requeue)
            policy.when_it_fails(lambda: _call(requeue()))

    # ---------------------------------------------------------------- idle blocks are queued

    def release(self, blocks: Blocks) -> None:
        """Make published blocks evictable: no table holds them any more. O(blocks)."""
        if len(blocks):
            self.policy.release(blocks)
            self.enqueue(blocks)

    def enqueue(self, blocks: Blocks) -> None:
        """Queue the nodes of these idle blocks. O(blocks)."""
        numbers = self._forest.node_of.take(blocks)
        begins = numbers[1:] != numbers[:-1]  # blocks of a run are neighbours
        if np.count_nonzero(begins):
            numbers = numbers[np.concatenate([[True], begins])]
        else:
            numbers = numbers[:1]
        for number in numbers.tolist():
            node = self._forest.nodes[number]
            assert node is not None
            self.enqueue_node(node)

    def enqueue_idle(self, blocks: Blocks) -> None:
        """Queue the idle blocks among `blocks` again: their rank changed. O(blocks)."""
        self.enqueue(blocks[self.idle(blocks)])
        self._pool.idled = None

    def enqueue_node(self, node: Node) -> None:
        """Queue a node, or defer it. O(log nodes)."""
        if node.children or not self._is_idle(tail := int(node.blocks[-1])):
            node.queue.defer(node)
        else:
            node.queue.push(self._rank(tail), node)

    def _is_idle(self, block: int) -> bool:
        return not (self._pool.refs[block] or self._pool.holds[block])

    def is_idle_leaf(self, node: Node) -> bool:
        """Return True for a leaf whose last block can be evicted. O(1)."""
        return node.end > node.start and not node.children and self._is_idle(int(node.blocks[-1]))

    def idle(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Return which of these cached blocks no table holds, bool [n]. O(blocks)."""
        idle: NDArray[np.bool_] = self._pool.refs.take(blocks) == 0
        if self._pool.num_holds:
            idle &= self._pool.holds.take(blocks) == 0
        return idle

    def _rank(self, block: int) -> float:
        return float(self.policy.rank(np.array([block], np.intp))[0])

    def _next(self, queue: Queue[Node]) -> tuple[float, Node] | None:
        """Return the first idle leaf. Amortised O(log n): outdated entries are dropped."""
        while (entry := queue.first()) is not None:
            rank, node = entry
            if self.is_idle_leaf(node):
                return rank, node
            queue.drop_first()
        return None

    # ---------------------------------------------------------------- evict

    def evict(self, count: int, allowance: Callable[[int], int] | None = None) -> int:
        """Evict `count` idle blocks, from each queue at most its allowance. O(count log n).

        The queues must allow `count` blocks. Idle leaves go first, lowest rank first. Then idle
        blocks inside a run go, with all blocks after them; these may be more than `count`.
        Return the number of blocks removed from the index. Blocks that no table holds become free.

        `allowance` returns how many blocks of a queue may be evicted; None: all. A queue without
        an allowance is skipped until `relist` names it.
        """
        self.refresh(count)
        if allowance is None:
            self.relist(self._queues)
        gone = list[Blocks]()
        room = dict[int, int]()

        def left(number: int) -> int:
            if number not in room:
                room[number] = count if allowance is None else allowance(number)
            return room[number]

        while count > 0:
            number, node, limit = self._lowest(left)
            most = min(count, left(number))
            if node is not None:
                blocks, num_idle = self._trim(node, most, limit)
            else:
                blocks, num_idle = self._cut(self._queues[number], most)
            count -= num_idle
            room[number] -= num_idle
            gone.append(blocks)
        return self._forget(gone)

    def relist(self, numbers: Iterable[int]) -> None:
        """Consider these queues again: they may have an allowance now. O(numbers)."""
        for number in numbers:
            self._queues.relist(number)

    def evict_from(self, number: int, count: int) -> int:
        """Evict `count` idle blocks of one queue, which has that many. As `evict`."""
        self.refresh(count)
        queue, gone = self._queues[number], list[Blocks]()
        while count > 0:
            entry = self._next(queue)
            if entry is not None:
                blocks, num_idle = self._trim(entry[1], count, np.inf)
            else:
                blocks, num_idle = self._cut(queue, count)
            gone.append(blocks)
            count -= num_idle
        return self._forget(gone)

    def evict_namespace(self, namespace: str | None) -> int:
        """Evict all idle blocks of a namespace. O(its nodes log n). As `evict`."""
        has_queue = namespace in self._queue_of
        if not has_queue:
            self.add_queue(namespace, _OWN_QUEUE)
        try:
            runs = list(self._forest.owned_by(namespace))
            num_idle = sum(int(np.count_nonzero(self.idle(run))) for run in runs)
            return self.evict_from(self._queue_of[namespace], num_idle)
        finally:
            if not has_queue:
                self.drop_queue(namespace)

    def _forget(self, gone: list[Blocks]) -> int:
        blocks = gone[0] if len(gone) == 1 else np.concatenate([NO_BLOCKS, *gone])
        self._pool.uncache(blocks)
        self.policy.forget(blocks)
        if self._log is not None and len(blocks):
            ids = blocks.astype(np.int32)
            self._log.add("evicted", blocks=ids)
            self._log.add("removed", blocks=ids)
        return len(blocks)

    def _lowest(self, left: Callable[[int], int]) -> tuple[int, Node | None, float]:
        """Return the queue whose first leaf ranks lowest, that leaf, and the next queue's rank.

        If no queue has a leaf, return a queue with deferred nodes.
        """
        best = self._queues.lowest(self._next, left)
        if best is not None:
            return best
        for number, queue in self._queues.items():
            if queue.deferred and left(number) > 0:
                return number, None, np.inf
        raise BrokenInvariant("prefix index: fewer blocks are evictable than the pool counts")

    def refresh(self, count: int) -> None:
        """Queue the blocks again whose rank changed without a call. O(blocks)."""
        blocks = self.policy.reranked(count)
        if len(blocks):
            self.enqueue_idle(blocks[self._pool.cached[blocks]])

    def _trim(self, node: Node, count: int, limit: float) -> tuple[Blocks, int]:
        """Cut up to `count` blocks off a leaf's tail while they are idle and rank lowest."""
        queue = node.queue
        queue.drop_first()
        tail = None
        if count > 1 and node.end - node.start > 1:
            after = self._next(queue)
            limit = min(limit, after[0]) if after else limit
            tail = node.blocks[-count:][::-1].astype(np.intp)
            leave = self.policy.rank(tail) <= limit
            leave &= self.idle(tail)
            leave[0] = True
            count = len(tail) if np.count_nonzero(leave) == len(tail) else int(leave.argmin())
        blocks = node.blocks[-1:].copy() if tail is None else tail[:count]
        self._shorten(node, node.end - len(blocks))
        return blocks, len(blocks)

    def _cut(self, queue: Queue[Node], count: int) -> tuple[Blocks, int]:
        """Cut up to `count` idle blocks before held blocks, with all that follow. O(nodes below).

        Cut the deepest run with idle blocks, so that the blocks before it stay.
        """
        node = queue.first_deferred()
        if not self.idle(node.blocks).any():
            return NO_BLOCKS, 0
        below = list(self._forest.below(node))
        deepest = max(
            (other for other in below if self.idle(other.blocks).any()),
            key=lambda other: other.start,
            default=node,
        )
        if deepest is not node:
            queue.defer(node)
            queue.deferred.pop(deepest, None)
            node, below = deepest, list(self._forest.below(deepest))
        idle = self.idle(node.blocks).nonzero()[0]
        first = int(idle[-min(count, len(idle))])
        gone = [node.blocks[first:].copy(), *(other.blocks.copy() for other in below)]
        for other in below:
            self._forest.bury(other)
        node.children = {}
        self._shorten(node, node.start + first)
        blocks = np.concatenate(gone)
        return blocks, int(np.count_nonzero(self.idle(blocks)))

    def _shorten(self, node: Node, end: int) -> None:
        """End a run earlier. An empty run leaves the tree, and its parent may become a leaf."""
        node.end, node.sealed = end, True
        if end > node.start:
            self.enqueue_node(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[self._forest.key(node.first, node.tag)]
        self._forest.bury(node)
        if parent.parent is not None:
            if not parent.children and self._is_idle(int(parent.blocks[-1])):
                self.enqueue_node(parent)
        elif not parent.children and self._forest.roots.get(parent.tree) is parent:
            # Tenants come and go: an empty tree must not stay behind.
            self._forest.drop_root(parent)

    # ---------------------------------------------------------------- queues

    def queues(self) -> list[Queue[Node]]:
        """Return the queues of all accounts. O(accounts)."""
        return list(self._queues.values())

    def queue(self, namespace: str | None) -> Queue[Node]:
        """Return the queue of a namespace's blocks. O(1)."""
        return self._queues[self._queue_of.get(namespace, 0)]

    def requeue(self) -> None:
        """Queue all nodes again, by their current ranks. O(n log n)."""
        for queue in self._queues.values():
            queue.clear()
        self._pool.idled = None
        for node in self._forest.walk():
            if node.parent is not None:
                self.enqueue_node(node)

    def set_queues(self, numbers: dict[str | None, int]) -> None:
        """Give each of these namespaces its own queue; the others share queue 0. O(nodes)."""
        self._queues, self._queue_of = Queues(), {}
        for namespace, number in numbers.items():
            self._queue_of[namespace] = number
            self._queues.add(number)
        for namespace in self._forest.namespaces():
            self._queue_again(namespace)

    def add_queue(self, namespace: str | None, number: int) -> None:
        """Give a namespace its own queue. O(its nodes)."""
        self._queue_of[namespace] = number
        self._queues.add(number)
        self._queue_again(namespace)

    def drop_queue(self, namespace: str | None) -> None:
        """Move a namespace's nodes to the queue of namespaces without a quota. O(its nodes)."""
        number = self._queue_of.pop(namespace)
        self._queue_again(namespace)
        del self._queues[number]

    def _queue_again(self, namespace: str | None) -> None:
        queue = self.queue(namespace)
        for root in self._forest.roots_of(namespace):
            root.queue = queue
            for node in self._forest.below(root):
                node.queue.forget(node)
                node.queue = queue
                self.enqueue_node(node)

    def check(self, is_open: Callable[[int], bool]) -> None:
        """Raise `BrokenInvariant` unless each idle block can be evicted. O(blocks).

        `is_open` returns True for a queue whose blocks are evictable.
        """
        self._queues.check(is_open)
        for node in self._forest.walk():
            if node.parent is not None:
                self._check_node(node)

    def _check_node(self, node: Node) -> None:
        idle = self.idle(node.blocks)
        if idle.any() and node not in node.queue.deferred:
            # Ask for the rank first: a policy that fails here changes all ranks.
            expected = self._rank(int(node.blocks[-1]))
            rank = node.queue.ranks.get(node, (None, 0))[0]
            if node.children or not idle[-1] or rank != expected:
                raise BrokenInvariant(
                    f"prefix index: idle block {node.blocks[-1]} is not queued for eviction"
                )


def _call(method: Callable[[], None] | None) -> None:
    if method is not None:
        method()
