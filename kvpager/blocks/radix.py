"""The prefix trees: nodes are runs of blocks, found by the key of their first block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.eviction_queues import Queue
from kvpager.blocks.fingerprints import moved
from kvpager.blocks.mm_hashes import Tag
from kvpager.blocks.pool import BlockPool, Blocks
from kvpager.errors import BrokenInvariant
from kvpager.plans import NO_BLOCKS, Int32

# Namespace and LoRA, and the group of layers if it is not the first.
TreeKey = tuple[str | None, str | None] | tuple[str | None, str | None, int]


class Place(NamedTuple):
    """Where a block of a group with a window is in its prompt. Only events need it.

    Attributes:
        position: blocks before it.
        before: digest of the tokens before it, None for none.
        tag: the mm_hashes that overlap it.
    """

    position: int
    before: bytes | None
    tag: Tag


class Node:
    """A run: blocks `start` to `end` of all prompts through this node."""

    __slots__ = (
        "_room", "children", "end", "first", "number", "parent", "place", "queue", "sealed",
        "start", "tag", "token", "tree",
    )  # fmt: skip

    def __init__(self, number: int, parent: Node | None, start: int, blocks: Int32) -> None:
        self.number = number
        self.parent = parent
        self.start = start
        self.end = start + len(blocks)
        self.children: dict[object, Node] = {}
        self.sealed = False
        self.tag: Tag = None
        self.place: Place | None = None  # of a block of a group with a window
        self.token = -1  # the first token of a node with a parent
        self.first = int(blocks[0]) if len(blocks) else -1
        self._room = blocks
        if parent is not None:
            self.tree: TreeKey = parent.tree
            self.queue: Queue[Node] = parent.queue

    @property
    def blocks(self) -> Int32:
        """The run, a view. O(1)."""
        return self._room[: self.end - self.start]

    @property
    def group(self) -> int:
        """The group of layers whose blocks these are. O(1)."""
        return self.tree[2] if len(self.tree) == 3 else 0

    @property
    def digest(self) -> bytes:
        """The digest that names a block of a group with a window, see `groups/prefix.py`. O(1)."""
        assert self.tag is not None
        return self.tag[0][2]

    def extend(self, blocks: NDArray[np.integer[Any]]) -> None:
        """Append blocks to the run. Amortised O(blocks)."""
        used, needed = self.end - self.start, self.end - self.start + len(blocks)
        if needed > len(self._room):
            room = np.empty(max(needed, 2 * len(self._room)), np.int32)
            room[:used] = self.blocks
            self._room = room
        self._room[used:needed] = blocks
        self.end += len(blocks)

    def relocate(self, places: Int32) -> None:
        """Replace block ids by their new ids. O(blocks)."""
        if self.end > self.start:
            self.blocks[:] = places[self.blocks]
            self.first = int(self._room[0])

    def cut_front(self, position: int) -> Int32:
        """Remove the blocks before `position` and return them, a copy. O(blocks)."""
        front = self._room[: position - self.start].copy()
        self._room = self.blocks[position - self.start :].copy()
        self.start, self.first = position, int(self._room[0])
        return front


class Match(NamedTuple):
    """The longest known prefix: whole `blocks`, then `num_partial` tokens of `partial_block`."""

    node: Node | None
    blocks: Int32
    partial_block: int = -1
    num_partial: int = 0


def key_of(tokens: Int32, tag: Tag) -> object:
    """Return the key of a child: the tokens and the tag of its first block. O(block_size)."""
    return tokens.tobytes() if tag is None else (tokens.tobytes(), tag)


class Forest:
    """The prefix trees: their nodes by number, by block, and by namespace.

    Writes `nodes` and `node_of`. Reads the pool: the token ids of a run are those of its blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.roots: dict[TreeKey, Node] = {}
        self.nodes: list[Node | None] = []  # by number
        self.node_of: Int32 = np.full(pool.num_blocks, -1, np.int32)
        self._roots_of: dict[str | None, dict[TreeKey, Node]] = {}
        self._free_numbers: list[int] = []

    # ---------------------------------------------------------------- nodes come and go

    def new_root(self, tree: TreeKey, queue: Queue[Node]) -> Node:
        """Begin a tree. O(1)."""
        root = self.new_node(None, 0, NO_BLOCKS)
        root.tree, root.queue = tree, queue
        self.roots[tree] = self._roots_of.setdefault(tree[0], {})[tree] = root
        return root

    def new_node(self, parent: Node | None, start: int, blocks: Int32) -> Node:
        """Make a node; the caller adds it to its parent. O(1)."""
        number = self._free_numbers.pop() if self._free_numbers else len(self.nodes)
        node = Node(number, parent, start, blocks)
        if number == len(self.nodes):
            self.nodes.append(node)
        else:
            self.nodes[number] = node
        if len(blocks):
            node.token = self.pool.ids.item(node.first, 0)
        return node

    def name(self, node: Node, blocks: Blocks) -> None:
        """Map these blocks to `node`. O(blocks)."""
        self.node_of[blocks.astype(np.intp)] = node.number

    def bury(self, node: Node) -> None:
        """Drop a node that left its tree. O(1)."""
        node.end = node.start
        node.queue.forget(node)
        self.nodes[node.number] = None
        self._free_numbers.append(node.number)

    def drop_root(self, root: Node) -> None:
        """Drop an empty tree. O(1)."""
        del self.roots[root.tree]
        roots = self._roots_of[root.tree[0]]
        del roots[root.tree]
        if not roots:
            del self._roots_of[root.tree[0]]
        self.bury(root)

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size. `places`: the new id of each block. O(blocks)."""
        for node in self.nodes:
            if node is not None:
                node.relocate(places)
        self.node_of = moved(self.node_of, num_blocks, places)

    # ---------------------------------------------------------------- reading

    def key(self, block: int, tag: Tag) -> object:
        """Return the key of a child that begins with `block`. O(block_size)."""
        return key_of(self.pool.ids[block], tag)

    def locate(self, node: Node | None, position: int) -> Node | None:
        """Return the node that has the place (node, position > 0) now, or None. O(depth)."""
        while node is not None and position <= node.start:
            node = node.parent
        return node if node is not None and position <= node.end else None

    def path(self, node: Node, position: int) -> Int32:
        """Return the first `position` blocks on the path to `node`. O(depth)."""
        runs = [node.blocks[: position - node.start]]
        while (parent := node.parent) is not None:
            runs.append(parent.blocks)
            node = parent
        return np.concatenate(runs[::-1])

    def below(self, node: Node) -> Iterator[Node]:
        """Return all nodes below this one. O(nodes)."""
        stack = list(node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def walk(self) -> Iterator[Node]:
        """Return all nodes, roots included: parents first, siblings in order. O(nodes)."""
        for root in self.roots.values():
            stack = [root]
            while stack:
                yield (node := stack.pop())
                stack.extend(reversed(node.children.values()))

    def roots_of(self, namespace: str | None) -> list[Node]:
        """Return the roots of a namespace's trees. O(trees)."""
        return list(self._roots_of.get(namespace, {}).values())

    def namespaces(self) -> list[str | None]:
        """Return the namespaces that have a tree. O(namespaces)."""
        return list(self._roots_of)

    def owned(self) -> Iterator[tuple[str | None, Int32]]:
        """Return the published blocks of each namespace, run by run. O(nodes)."""
        for namespace in self._roots_of:
            for blocks in self.owned_by(namespace):
                yield namespace, blocks

    def owned_by(self, namespace: str | None) -> Iterator[Int32]:
        """Return the published blocks of one namespace, run by run. O(its nodes)."""
        for root in self.roots_of(namespace):
            for node in self.below(root):
                yield node.blocks

    def check(self) -> None:
        """Raise `BrokenInvariant` unless trees and look-up agree. O(blocks)."""
        owner = np.full(self.pool.num_blocks, -1, np.int32)
        count = 0
        for tree, root in self.roots.items():
            if root.tree != tree or root.parent is not None or root.end or not root.children:
                raise BrokenInvariant(f"prefix index: the root of {tree!r} is out of place")
            if self._roots_of.get(tree[0], {}).get(tree) is not root:
                raise BrokenInvariant(f"prefix index: the tree {tree!r} is not its namespace's")
            for node in [root, *self.below(root)]:
                count += 1
                self._check_node(node)
                if np.any(owner[node.blocks] >= 0):
                    raise BrokenInvariant("prefix index: a block is in the trees twice")
                owner[node.blocks] = node.number
        if count != sum(node is not None for node in self.nodes):
            raise BrokenInvariant("prefix index: a node is in no tree")
        if np.any((owner >= 0) != self.pool.cached):
            raise BrokenInvariant("prefix index: its blocks are not the cached blocks of the pool")
        wrong = np.flatnonzero((owner != self.node_of) & (owner >= 0))
        if len(wrong):
            raise BrokenInvariant(f"prefix index: block {wrong[0]} is looked up in a wrong node")

    def _check_node(self, node: Node) -> None:
        if self.nodes[node.number] is not node or (node.parent and node.end <= node.start):
            raise BrokenInvariant(f"prefix index: node {node.number} is out of place or empty")
        for key, child in node.children.items():
            expected = self.key(child.first, child.tag)
            in_place = child.parent is node and child.start == node.end and child.tree == node.tree
            if not in_place or key != expected:
                raise BrokenInvariant(f"prefix index: node {child.number} is out of place")
