"""Which token prefixes already have their blocks in the pool.

A compressed radix tree per namespace and adapter. A node is a run of whole blocks with no fork in
it; its children differ in their first block:

    root ── [system prompt, 40 blocks] ─┬─ [question A, 3]
                                        └─ [question B, 7] ── ...

Tokens are compared themselves, run by run in one vector operation, so no hash can collide; other
trees are never looked at, so no tenant can hit another's blocks. Sharing prefixes through a radix
tree is SGLang's RadixAttention (Zheng et al., 2024); reusing part of the next block is
TensorRT-LLM's. The token ids stand with the blocks in the pool: what is offered cannot differ
from what is held.

A sequence remembers its place as (node, blocks published). When a run is split, the node it knows
becomes the lower half, and the place is found again by walking up. A run that lost its tail is
sealed: it never grows again, so a place beyond its end is known to be gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.contents import NO_CONTENTS, Contents, Tag
from kvpager.blocks.events import Event, EventLog
from kvpager.blocks.eviction import EvictionPolicy, Queue, Queues
from kvpager.blocks.fingerprints import Arrivals, moved
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.pool import BlockPool, Blocks
from kvpager.blocks.radix import Match, Node, TreeKey, key_of
from kvpager.errors import BrokenInvariant

Int32 = NDArray[np.int32]
# How many runs are looked at for one whose first block matches in part: of prompts that all begin
# alike there may be thousands, and the latest are the likeliest.
_PARTIAL_CANDIDATES_MAX = 16
_NO_BLOCKS: Int32 = np.empty(0, np.int32)


class PrefixIndex:
    """Committed full blocks by their tokens, and the order in which idle ones may leave."""

    def __init__(
        self, pool: BlockPool, policy: EvictionPolicy, log: EventLog | None = None
    ) -> None:
        self.block_size = pool.ids.shape[1]
        self.policy = policy
        self.roots: dict[TreeKey, Node] = {}
        self.nodes: list[Node | None] = []  # by number
        self.node_of: Int32 = np.full(pool.num_blocks, -1, np.int32)
        # By the numbers of `kvpager.blocks.quotas`: 0 is that of all namespaces without a quota.
        self._queues: Queues[Node] = Queues()
        self._queue_of: dict[str | None, int] = {}
        self._trees_of: dict[str | None, dict[TreeKey, Node]] = {}
        self._log = log
        self.pool = pool
        if isinstance(policy, FailSafe):
            requeue = weakref.WeakMethod(self.requeue)
            policy.when_it_fails(lambda: _call(requeue()))
        self.arrivals = Arrivals(pool)
        self._free_numbers: list[int] = []

    # ---------------------------------------------------------------- look up

    def match(self, tree: TreeKey, tokens: Int32, contents: Contents = NO_CONTENTS) -> Match:
        """The longest prefix of `tokens` that is known in `tree`. O(tokens)."""
        root = self.roots.get(tree)
        if root is None:
            return Match(None, _NO_BLOCKS)
        num_full = len(tokens) // self.block_size
        wanted = tokens[: num_full * self.block_size].reshape(num_full, self.block_size)
        node, position, found = self._walk(
            root, 0, wanted, contents.stretches(self.block_size, 0, num_full)
        )
        if len(found) < 2:
            blocks = found[0] if found else _NO_BLOCKS
        else:
            blocks = np.concatenate(found)
        rest = tokens[position * self.block_size : (position + 1) * self.block_size]
        if not len(rest):
            return Match(node, blocks)
        tag = contents.tag(self.block_size, position)
        return Match(node, blocks, *self._partial(node, position, rest, tag))

    def _walk(
        self, node: Node, position: int, wanted: Int32, tags: list[tuple[int, Tag]]
    ) -> tuple[Node, int, list[Int32]]:
        """From block `position`, inside or at the end of `node`, as far as `wanted` agrees."""
        found: list[Int32] = []
        begin, segment = position, 0
        while position - begin < len(wanted):
            stop, tag = tags[segment]
            if position == node.end:
                child = node.children.get(key_of(wanted[position - begin], tag))
                if child is None:
                    break
                node = child
            elif node.tag != tag:
                break
            run = node.blocks[position - node.start : stop - node.start]
            first = position - begin
            same = self.pool.ids.take(run, axis=0) == wanted[first : first + len(run)]
            agreed = int(same.argmin()) // self.block_size  # 0 where all are equal, too
            if not agreed and np.count_nonzero(same) == same.size:
                agreed = len(run)
            found.append(run[:agreed])
            position += agreed
            segment += position == stop
            if agreed < len(run):
                break
        return node, position, found

    def _partial(self, node: Node, position: int, rest: Int32, tag: Tag) -> tuple[int, int]:
        """The block after `position` that agrees longest with `rest`, and how many tokens do."""
        if position < node.end:
            candidates = [int(node.blocks[position - node.start])] if node.tag == tag else []
        else:
            token = int(rest[0])
            latest = islice(reversed(node.children.values()), _PARTIAL_CANDIDATES_MAX)
            likely = [child for child in latest if child.token == token]
            candidates = [child.first for child in likely if child.tag == tag]
        if not candidates:
            return -1, 0
        same = self.pool.ids.take(candidates, axis=0)[:, : len(rest)] == rest
        agreed = np.where(same.all(axis=1), len(rest), same.argmin(axis=1))
        best = int(agreed.argmax())
        return candidates[best], int(agreed[best])

    # ---------------------------------------------------------------- publish

    def root(self, tree: TreeKey) -> Node:
        """Where the prefixes of `tree` begin; made on first use. O(1)."""
        root = self.roots.get(tree)
        return self._new_root(tree) if root is None else root

    def _new_root(self, tree: TreeKey) -> Node:
        root = self._new_node(None, 0, _NO_BLOCKS)
        root.tree, root.queue = tree, self._queues[self._queue_of.get(tree[0], 0)]
        self.roots[tree] = self._trees_of.setdefault(tree[0], {})[tree] = root
        return root

    def locate(self, node: Node | None, position: int) -> Node | None:
        """The node in which the place (node, position > 0) is now; None if it is gone. O(depth)."""
        while node is not None and position <= node.start:
            node = node.parent
        return node if node is not None and position <= node.end else None

    def path(self, node: Node, position: int) -> Int32:
        """The first `position` blocks on the way to `node`, where that place is. O(depth)."""
        runs = [node.blocks[: position - node.start]]
        while (parent := node.parent) is not None:
            runs.append(parent.blocks)
            node = parent
        return np.concatenate(runs[::-1])

    def publish(
        self, node: Node, position: int, blocks: Blocks, contents: Contents
    ) -> tuple[Node, bool]:
        """Offer full `blocks` after place (node, position). O(tokens).

        Where equal blocks are offered already, those stay. Returns the node of the last block,
        and whether any is not the sequence's own. `settle` must follow.
        """
        end, is_twin = position + len(blocks), False
        first, tags = position, contents.stretches(self.block_size, position, end)
        if position < node.end or self._key(int(blocks[0]), tags[0][1]) in node.children:
            wanted = self.pool.ids.take(blocks, axis=0)
            node, position, found = self._walk(node, position, wanted, tags)
            if position > first:
                offered = np.concatenate(found)
                is_twin = not np.array_equal(offered, blocks[: position - first])
                self.settle()
                self.policy.touch(offered)
                if is_twin:  # used, and idle again
                    self.retire(offered[self._idle(offered)])
        if position < end:
            if position < node.end:
                node = self._split(node, position)
            for stop, tag in tags:
                if stop > position:
                    if position > first and len(tags) > 1:
                        self.settle()  # the run before it needs its fingerprints
                    node = self._attach(
                        node, position, blocks[position - first : stop - first], tag
                    )
                    position = stop
        return node, is_twin

    def _attach(self, node: Node, position: int, blocks: Blocks, tag: Tag) -> Node:
        before = int(node.blocks[-1]) if position else -1
        self.arrivals.add(blocks, position, before, node.tree)
        if (
            position and node in node.queue.ranks
        ):  # an idle tip, and now its blocks stand before held ones
            node.queue.forget(node)
            node.queue.put_aside(node)
        if self._log is not None:
            self._log.add("stored", **self._event(node.tree, tag, before, blocks))
        if position and not (node.children or node.sealed) and node.tag == tag:
            node.extend(blocks)
        else:
            parent, node = node, self._new_node(node, position, blocks.astype(np.int32))
            node.tag = tag
            parent.children[self._key(int(blocks[0]), tag)] = node
        self.node_of[blocks.astype(np.intp)] = node.number
        return node

    def settle(self) -> None:
        """Tell pool and policy about the blocks published since. O(blocks)."""
        if self.arrivals:
            blocks, fingerprints, depths = self.arrivals.drain(self.policy.needs_fingerprints)
            self.pool.cache(blocks)
            self.policy.admit(blocks, fingerprints, depths)

    def _split(self, lower: Node, position: int) -> Node:
        """Cut a run in two; `lower` stays the deeper half. O(blocks). Returns the upper half."""
        parent = lower.parent
        assert parent is not None
        start, front = lower.start, lower.cut_front(position)
        upper = self._new_node(parent, start, front)
        upper.tag = lower.tag
        parent.children[self._key(upper.first, upper.tag)] = upper
        upper.children[self._key(lower.first, lower.tag)] = lower
        lower.parent = upper
        lower.token = self.pool.ids.item(lower.first, 0)
        self.node_of[front] = upper.number
        self._offer(upper)
        return upper

    def _key(self, block: int, tag: Tag) -> object:
        return key_of(self.pool.ids[block], tag)

    def _new_node(self, parent: Node | None, start: int, blocks: Int32) -> Node:
        number = self._free_numbers.pop() if self._free_numbers else len(self.nodes)
        node = Node(number, parent, start, blocks)
        if number == len(self.nodes):
            self.nodes.append(node)
        else:
            self.nodes[number] = node
        if len(blocks):
            node.token = self.pool.ids.item(node.first, 0)
        return node

    # ---------------------------------------------------------------- evict

    def retire(self, blocks: Blocks) -> None:
        """No table holds these offered blocks any more: they may be evicted. O(blocks)."""
        if len(blocks):
            self.policy.retire(blocks)
            self.offer(blocks)

    def offer(self, blocks: Blocks) -> None:
        """Queue the nodes of these idle blocks. O(blocks)."""
        numbers = self.node_of.take(blocks)
        begins = numbers[1:] != numbers[:-1]  # blocks of a run stand together
        if np.count_nonzero(begins):
            numbers = numbers[np.concatenate([[True], begins])]
        else:
            numbers = numbers[:1]
        for number in numbers.tolist():
            node = self.nodes[number]
            assert node is not None
            self._offer(node)

    def offer_idle(self, blocks: Blocks) -> None:
        """The rank of these blocks changed: queue those that are idle anew. O(blocks)."""
        self.offer(blocks[self._idle(blocks)])

    def _offer(self, node: Node) -> None:
        if node.children or not self._is_idle(tail := int(node.blocks[-1])):
            node.queue.put_aside(node)
        else:
            node.queue.push(self._rank(tail), node)

    def _is_idle(self, block: int) -> bool:
        return not (self.pool.refs[block] or self.pool.holds[block])

    def _is_idle_tip(self, node: Node) -> bool:
        return node.end > node.start and not node.children and self._is_idle(int(node.blocks[-1]))

    def _idle(self, blocks: Blocks) -> NDArray[np.bool_]:
        idle: NDArray[np.bool_] = self.pool.refs.take(blocks) == 0
        if self.pool.num_holds:
            idle &= self.pool.holds.take(blocks) == 0
        return idle

    def _rank(self, block: int) -> float:
        return float(self.policy.rank(np.array([block], np.intp))[0])

    def _next(self, queue: Queue[Node]) -> tuple[float, Node] | None:
        """The idle tip that leaves first. Amortised O(log n): outdated entries are dropped."""
        while (entry := queue.first()) is not None:
            rank, node = entry
            if self._is_idle_tip(node):
                return rank, node
            queue.drop_first()
        return None

    def evict(
        self,
        count: int,
        allowance: Callable[[int], int] | None = None,
    ) -> int:
        """Forget `count` idle blocks, from each queue at most its allowance. There are enough.

        O(count log n): idle tips, lowest rank first. Only when there are no more of those, idle
        blocks inside a run with everything after them, which may be more than asked for.
        Return how many blocks the index forgot. Those that no table holds are now free.

        `allowance` returns how many blocks of a queue may leave, None: all. A queue that has none
        is not looked at again before `relist` names it.
        """
        self._refresh()
        if allowance is None:
            self.relist(self._queues)
        gone: list[Blocks] = []
        blocks: Blocks
        room = dict[int, int]()

        def left(number: int) -> int:
            if number not in room:
                room[number] = count if allowance is None else allowance(number)
            return room[number]

        while count > 0:
            number, node, limit = self._lowest(left)
            most = min(count, left(number))
            if node is not None:
                blocks = self._trim(node, most, limit)
                num_idle = len(blocks)
            else:
                blocks, num_idle = self._cut(self._queues[number], most)
            count -= num_idle
            room[number] -= num_idle
            gone.append(blocks)
        return self._forget(gone)

    def relist(self, numbers: Iterable[int]) -> None:
        """Look at these queues again: they may have an allowance now. O(numbers)."""
        for number in numbers:
            self._queues.relist(number)

    def evict_from(self, number: int, count: int) -> int:
        """Forget `count` idle blocks of one queue, which has them. As `evict`."""
        self._refresh()
        queue, gone = self._queues[number], list[Blocks]()
        while count > 0:
            entry = self._next(queue)
            if entry is not None:
                gone.append(self._trim(entry[1], count, np.inf))
                count -= len(gone[-1])
            else:
                blocks, num_idle = self._cut(queue, count)
                gone.append(blocks)
                count -= num_idle
        return self._forget(gone)

    def _forget(self, gone: list[Blocks]) -> int:
        blocks = gone[0] if len(gone) == 1 else np.concatenate([_NO_BLOCKS, *gone])
        self.pool.uncache(blocks)
        self.policy.forget(blocks)
        if self._log is not None and len(blocks):
            ids = blocks.astype(np.int32)
            self._log.add("evicted", blocks=ids)
            self._log.add("removed", blocks=ids)
        return len(blocks)

    def _lowest(self, left: Callable[[int], int]) -> tuple[int, Node | None, float]:
        """Return the queue whose first tip ranks lowest, that tip, and the next queue's rank.

        Where no queue has a tip, one that has nodes put aside.
        """
        best = self._queues.lowest(self._next, left)
        if best is not None:
            return best
        for number in self._queues:
            if self._queues[number].aside and left(number) > 0:
                return number, None, np.inf
        raise BrokenInvariant("prefix index: fewer blocks can leave than the pool counts")

    def _refresh(self) -> None:
        fallen = self.policy.fallen()
        if len(fallen):
            fallen = fallen[self.pool.cached[fallen] & (self.pool.refs[fallen] == 0)]
            self.offer(fallen)

    def _trim(self, node: Node, count: int, limit: float) -> Blocks:
        """Take up to `count` blocks off a tip's tail while they are idle and rank lowest."""
        queue = node.queue
        queue.drop_first()
        tail = None
        if count > 1 and node.end - node.start > 1:
            after = self._next(queue)
            limit = min(limit, after[0]) if after else limit
            tail = node.blocks[-count:][::-1].astype(np.intp)
            leave = self.policy.rank(tail) <= limit
            leave &= self._idle(tail)
            leave[0] = True
            count = len(tail) if np.count_nonzero(leave) == len(tail) else int(leave.argmin())
        blocks = node.blocks[-1:].copy() if tail is None else tail[:count]
        self._shorten(node, node.end - len(blocks))
        return blocks

    def _cut(self, queue: Queue[Node], count: int) -> tuple[Blocks, int]:
        """Take up to `count` idle blocks that stand before held ones, with all that follows them.

        From the deepest run that has any: what stands before it keeps its place. O(nodes below).
        """
        node = queue.aside_first()
        if not self._idle(node.blocks).any():
            return _NO_BLOCKS, 0
        below = list(self._below(node))
        deepest = max(
            (other for other in below if self._idle(other.blocks).any()),
            key=lambda other: other.start,
            default=node,
        )
        if deepest is not node:
            queue.put_aside(node)
            queue.aside.pop(deepest, None)
            node, below = deepest, list(self._below(deepest))
        idle = self._idle(node.blocks).nonzero()[0]
        first = int(idle[-min(count, len(idle))])
        gone = [node.blocks[first:].copy(), *(other.blocks.copy() for other in below)]
        for other in below:
            self._bury(other)
        node.children = {}
        self._shorten(node, node.start + first)
        blocks = np.concatenate(gone)
        return blocks, int(np.count_nonzero(self._idle(blocks)))

    def _shorten(self, node: Node, end: int) -> None:
        """Let a run end earlier; an empty one leaves the tree, and its parent may be a tip now."""
        node.end, node.sealed = end, True
        if end > node.start:
            self._offer(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[self._key(node.first, node.tag)]
        self._bury(node)
        if parent.parent is not None:
            if not parent.children and self._is_idle(int(parent.blocks[-1])):
                self._offer(parent)
        elif not parent.children and self.roots.get(parent.tree) is parent:
            # Tenants come and go: an empty tree must not stay behind.
            del self.roots[parent.tree]
            trees = self._trees_of[parent.tree[0]]
            del trees[parent.tree]
            if not trees:
                del self._trees_of[parent.tree[0]]
            self._bury(parent)

    def _bury(self, node: Node) -> None:
        node.end = node.start
        node.queue.forget(node)
        self.nodes[node.number] = None
        self._free_numbers.append(node.number)

    def _below(self, node: Node) -> Iterator[Node]:
        stack = list(node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    # ---------------------------------------------------------------- keep house

    def walk(self) -> Iterator[Node]:
        """All nodes, roots included; parents before children, siblings in order. O(nodes)."""
        for root in self.roots.values():
            stack = [root]
            while stack:
                yield (node := stack.pop())
                stack.extend(reversed(node.children.values()))

    def requeue(self) -> None:
        """Queue all nodes by their ranks of now. O(n log n)."""
        for number in self._queues:
            self._queues[number].clear()
        for node in self.walk():
            if node.parent is not None:
                self._offer(node)

    def set_queues(self, numbers: dict[str | None, int]) -> None:
        """Give each of these namespaces a queue of its own, the others one together. O(nodes)."""
        self._queues, self._queue_of = Queues(), {}
        for namespace, number in numbers.items():
            self._queue_of[namespace] = number
            self._queues.add(number)
        for namespace in self._trees_of:
            self._queue_again(namespace)

    def add_queue(self, namespace: str | None, number: int) -> None:
        """Give a namespace a queue of its own. O(its nodes)."""
        self._queue_of[namespace] = number
        self._queues.add(number)
        self._queue_again(namespace)

    def drop_queue(self, namespace: str | None) -> None:
        """Let a namespace share a queue with those without a quota. O(its nodes)."""
        number = self._queue_of.pop(namespace)
        self._queue_again(namespace)
        self._queues.drop(number)

    def _queue_again(self, namespace: str | None) -> None:
        queue = self._queues[self._queue_of.get(namespace, 0)]
        for root in self._trees_of.get(namespace, {}).values():
            root.queue = queue
            for node in self._below(root):
                node.queue.forget(node)
                node.queue = queue
                self._offer(node)

    def owned(self) -> Iterator[tuple[str | None, Int32]]:
        """Return the blocks offered to each namespace, run by run. O(nodes)."""
        for namespace in self._trees_of:
            for blocks in self.owned_by(namespace):
                yield namespace, blocks

    def owned_by(self, namespace: str | None) -> Iterator[Int32]:
        """Return the blocks offered to one namespace, run by run. O(its nodes)."""
        for root in self._trees_of.get(namespace, {}).values():
            for node in self._below(root):
                yield node.blocks

    def offered(self) -> Iterator[Event]:
        """All runs as `stored` events, parents before children. O(tokens)."""
        for root in self.roots.values():
            for node in self._below(root):
                parent = node.parent
                before = int(parent.blocks[-1]) if parent and parent.end else -1
                yield Event(0, "stored", **self._event(node.tree, node.tag, before, node.blocks))

    def _event(self, tree: TreeKey, tag: Tag, before: int, blocks: Blocks) -> dict[str, Any]:
        namespace, adapter = tree
        return {
            "blocks": blocks.copy(),
            "namespace": namespace,
            "adapter": adapter,
            "parent": before,
            "tokens": self.pool.ids[blocks],
            "contents": tag or (),
        }

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size, and its blocks to their new places. O(blocks)."""
        for node in self.nodes:
            if node is not None:
                node.relocate(places)
        self.node_of = moved(self.node_of, num_blocks, places)
        self.arrivals.resize(num_blocks, places)
        self.policy.resize(num_blocks, places)

    def check_queues(self, is_open: Callable[[int], bool]) -> None:
        """Raise `BrokenInvariant` unless eviction looks at each open queue. O(queues)."""
        self._queues.check(is_open)

    def check(self) -> None:
        """Raise `BrokenInvariant` unless trees, look-up and pool tell the same story. O(blocks)."""
        owner = np.full(self.pool.num_blocks, -1, np.int32)
        count = 0
        for tree, root in self.roots.items():
            if root.tree != tree or root.parent is not None or root.end or not root.children:
                raise BrokenInvariant(f"prefix index: the root of {tree!r} is out of place")
            if self._trees_of.get(tree[0], {}).get(tree) is not root:
                raise BrokenInvariant(f"prefix index: the tree {tree!r} is not its namespace's")
            for node in [root, *self._below(root)]:
                count += 1
                self._check_node(node)
                if np.any(owner[node.blocks] >= 0):
                    raise BrokenInvariant("prefix index: a block stands twice in the trees")
                owner[node.blocks] = node.number
        if count != sum(node is not None for node in self.nodes):
            raise BrokenInvariant("prefix index: a node is in no tree")
        if np.any((owner >= 0) != self.pool.cached) or self.arrivals:
            raise BrokenInvariant("prefix index: its blocks are not those the pool marks as cached")
        wrong = np.flatnonzero((owner != self.node_of) & (owner >= 0))
        if len(wrong):
            raise BrokenInvariant(f"prefix index: block {wrong[0]} is looked up in a wrong node")

    def _check_node(self, node: Node) -> None:
        if self.nodes[node.number] is not node or (node.parent and node.end <= node.start):
            raise BrokenInvariant(f"prefix index: node {node.number} is out of place or empty")
        for key, child in node.children.items():
            expected = self._key(child.first, child.tag)
            in_place = child.parent is node and child.start == node.end and child.tree == node.tree
            if not in_place or key != expected:
                raise BrokenInvariant(f"prefix index: node {child.number} is out of place")
        if node.parent is None:
            return
        idle = self._idle(node.blocks)
        if idle.any() and node not in node.queue.aside:
            # First asked, since a policy that fails here changes all ranks.
            expected = self._rank(int(node.blocks[-1]))
            rank = node.queue.ranks.get(node, (None, 0))[0]
            if node.children or not idle[-1] or rank != expected:
                raise BrokenInvariant(f"prefix index: idle block {node.blocks[-1]} never leaves")


def _call(method: Callable[[], None] | None) -> None:
    if method is not None:
        method()
