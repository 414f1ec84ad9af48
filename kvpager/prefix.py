"""Which token prefixes already have their blocks in the pool.

One tree per namespace; a node is one full, committed block and its tokens. A match compares the
tokens themselves, so no hash can collide, and never looks at another namespace's tree, so no
tenant can hit another's blocks. Sharing prefixes through a tree is SGLang's RadixAttention
(Zheng et al., 2024); reusing part of the next block is TensorRT-LLM's.

Nodes leave from the tips, least recently used first: a longer prefix is less likely to be shared.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant

Int32 = NDArray[np.int32]

# How many blocks are looked at for one that matches in part.
_PARTIAL_CANDIDATES_MAX = 64
# Outdated heap entries kept beyond twice the number of nodes.
_OUTDATED_MAX = 64


class Node:
    """A cached block: its tokens, the block before it, and the blocks seen after it."""

    __slots__ = ("attached", "block", "children", "depth", "last_used", "parent", "tokens")

    def __init__(self, parent: Node | Root, tokens: Int32, block: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.block = block
        self.children: Children = {}
        self.depth: int = parent.depth + 1
        self.last_used = 0
        self.attached = True

    def __lt__(self, other: Node) -> bool:  # the heap's order among equals: the deeper one first
        return self.depth > other.depth


class Root:
    """Where a namespace's prefixes begin."""

    __slots__ = ("attached", "children", "depth", "namespace")

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self.children: Children = {}
        self.depth = 0
        self.attached = True


# First token -> all tokens -> node. The first level bounds the search for a partial match.
Children = dict[int, dict[bytes, Node]]


class Match(NamedTuple):
    """The longest known prefix: whole blocks, then `num_partial` tokens of `partial_block`."""

    node: Node | Root
    blocks: list[int]
    partial_block: int
    num_partial: int


def _common_prefix(a: Int32, b: Int32) -> int:
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


class PrefixIndex:
    """Committed full blocks by their tokens, and the order in which idle ones may leave."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._roots: dict[str | None, Root] = {}
        self._node_of: dict[int, Node] = {}  # by block
        self._idle: list[tuple[int, Node]] = []  # heap of (last used, node), some outdated
        self._clock = 0

    def __len__(self) -> int:
        return len(self._node_of)

    def root(self, namespace: str | None) -> Root:
        """Where the prefixes of `namespace` begin; made on first use. O(1)."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        return root

    def match(self, namespace: str | None, tokens: Int32) -> Match:
        """The longest prefix of `tokens` that is known in `namespace`. O(tokens)."""
        node: Node | Root | None = self._roots.get(namespace)
        blocks: list[int] = []
        if node is None:
            return Match(Root(namespace), blocks, 0, 0)
        start = 0
        while start + self.block_size <= len(tokens):
            child = self._child(node, tokens[start : start + self.block_size])
            if child is None:
                break
            blocks.append(child.block)
            node = child
            start += self.block_size
        partial = self._partial(node, tokens[start:])
        return Match(node, blocks, *partial)

    def publish(self, parent: Node | Root, tokens: Int32, block: int) -> tuple[Node, bool]:
        """Offer `block`, which holds `tokens` after `parent`. O(block_size).

        Returns the node for these tokens and whether it is new; when an equal block is offered
        already, that one stays and `block` remains its sequence's own.
        """
        child = self._child(parent, tokens)
        if child is not None:
            return child, False
        node = Node(parent, tokens.copy(), block)
        parent.children.setdefault(int(tokens[0]), {})[tokens.tobytes()] = node
        self._node_of[block] = node
        return node, True

    def retire(self, blocks: Iterable[int]) -> None:
        """No table holds these cached blocks any more: they may be evicted. O(blocks)."""
        self._clock += 1
        for block in blocks:
            node = self._node_of[block]
            node.last_used = self._clock
            if not node.children:
                heapq.heappush(self._idle, (self._clock, node))
        if len(self._idle) > 2 * len(self._node_of) + _OUTDATED_MAX:
            self._drop_outdated()

    def _drop_outdated(self) -> None:
        current = {
            id(node): (last_used, node)
            for last_used, node in self._idle
            if node.attached and node.last_used == last_used and not node.children
        }
        self._idle = list(current.values())
        heapq.heapify(self._idle)

    def evict(self, count: int, refs: Int32) -> list[int]:
        """Forget blocks until `count` that no table holds are gone. O(count log n) for tips.

        There must be so many. Returns all blocks forgotten: idle tips, least recently used first,
        and only when there are no more of those, idle blocks together with everything the tree
        knows after them, in no particular order and O(n) each.
        """
        forgotten: list[int] = []
        while count > 0:
            node = self._pop_idle_tip(refs) or next(
                node for node in self._node_of.values() if not refs[node.block]
            )
            for gone in self._subtree(node):
                forgotten.append(gone.block)
                gone.attached = False
                del self._node_of[gone.block]
                count -= not refs[gone.block]
            self._unlink(node)
        return forgotten

    def _pop_idle_tip(self, refs: Int32) -> Node | None:
        while self._idle:
            last_used, node = heapq.heappop(self._idle)
            # Outdated entries are dropped: the node is pushed anew when it is an idle tip again.
            current = node.attached and node.last_used == last_used
            if current and not refs[node.block] and not node.children:
                return node
        return None

    def _unlink(self, node: Node) -> None:
        parent, first = node.parent, int(node.tokens[0])
        siblings = parent.children[first]
        del siblings[node.tokens.tobytes()]
        if not siblings:
            del parent.children[first]
        if parent.children:
            return
        if isinstance(parent, Node):
            heapq.heappush(self._idle, (parent.last_used, parent))
        elif self._roots.get(parent.namespace) is parent:
            # Tenants come and go: an empty tree must not stay behind.
            parent.attached = False
            del self._roots[parent.namespace]

    def _child(self, node: Node | Root, tokens: Int32) -> Node | None:
        siblings = node.children.get(int(tokens[0]))
        return siblings.get(tokens.tobytes()) if siblings else None

    def _partial(self, node: Node | Root, tokens: Int32) -> tuple[int, int]:
        if not len(tokens):
            return 0, 0
        best, best_length = 0, 0
        siblings = node.children.get(int(tokens[0]), {})
        # Of prompts that all begin alike there may be thousands: the latest are the likeliest.
        for child in islice(reversed(siblings.values()), _PARTIAL_CANDIDATES_MAX):
            length = _common_prefix(child.tokens, tokens)
            if length > best_length:
                best, best_length = child.block, length
        return best, best_length

    def _subtree(self, start: Node | Root) -> Iterator[Node]:
        """`start`, where it is a block, and every node after it."""
        stack: list[Node | Root] = [start]
        while stack:
            node = stack.pop()
            if isinstance(node, Node):
                yield node
            for siblings in node.children.values():
                stack.extend(siblings.values())

    def path(self, node: Node | Root) -> tuple[str | None, list[Node]]:
        """The namespace and the nodes from the front of the prefix up to `node`. O(depth)."""
        nodes: list[Node] = []
        while isinstance(node, Node):
            nodes.append(node)
            node = node.parent
        return node.namespace, nodes[::-1]

    def check(self, cached: NDArray[np.bool_], refs: Int32) -> None:
        """Raise `BrokenInvariant` unless tree, look-up and pool tell the same story. O(n)."""
        nodes = [node for root in self._roots.values() for node in self._subtree(root)]
        blocks = [node.block for node in nodes]
        if len(set(blocks)) != len(blocks):
            raise BrokenInvariant("prefix index: a block stands twice in the trees")
        if {node.block: node for node in nodes} != self._node_of:
            raise BrokenInvariant("prefix index: trees and look-up by block differ")
        if set(blocks) != set(np.flatnonzero(cached).tolist()):
            raise BrokenInvariant("prefix index: its blocks are not those the pool marks as cached")
        current = {id(node) for used, node in self._idle if used == node.last_used}
        for namespace, root in self._roots.items():
            if root.namespace != namespace or not root.attached or not root.children:
                raise BrokenInvariant(f"prefix index: the root of {namespace!r} is out of place")
            self._check_children(root)
        for node in nodes:
            if not node.attached or len(node.tokens) != self.block_size:
                raise BrokenInvariant(f"prefix index: block {node.block} is not a full block")
            self._check_children(node)
            if not node.children and not refs[node.block] and id(node) not in current:
                raise BrokenInvariant(f"prefix index: idle block {node.block} can never be evicted")

    def _check_children(self, parent: Node | Root) -> None:
        for first, siblings in parent.children.items():
            for key, node in siblings.items():
                in_place = node.parent is parent and node.depth == parent.depth + 1
                if not in_place or node.tokens.tobytes() != key or int(node.tokens[0]) != first:
                    raise BrokenInvariant(f"prefix index: block {node.block} is out of place")
