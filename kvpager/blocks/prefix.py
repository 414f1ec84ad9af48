"""The prefix index: the token prefixes whose blocks are in the pool.

A compressed radix tree per namespace and LoRA. A node is a run of whole blocks without a branch.
Its children differ in their first block:

    root ── [system prompt, 40 blocks] ─┬─ [question A, 3]
                                        └─ [question B, 7] ── ...

A look-up compares the tokens of a run in one vector operation, so no hash can collide. It reads one
tree only, so no tenant can hit another tenant's blocks. Sharing prefixes through a radix tree is
from SGLang's RadixAttention (Zheng et al., 2024), reusing part of the next block from TensorRT-LLM.
The pool stores the token ids of each block, so published and held tokens cannot differ.

A sequence stores its place as (node, published blocks). If a run is split, the node becomes the
lower half, and walking up finds the place again. A run that lost its tail is sealed: it never grows
again, so a place beyond its end is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from kvpager.blocks.event_log import Event, EventLog
from kvpager.blocks.eviction import Evictor
from kvpager.blocks.fingerprints import Arrivals
from kvpager.blocks.mm_hashes import NO_MM_HASHES, MMHashes, Tag
from kvpager.blocks.pool import Blocks
from kvpager.blocks.radix import Forest, Match, Node, Place, TreeKey, key_of
from kvpager.errors import BrokenInvariant
from kvpager.plans import NO_BLOCKS, Int32

# How many runs to try for a partial match of their first block. Thousands may branch off here; the
# latest are the likeliest.
_PARTIAL_CANDIDATES_MAX = 16
_RECENT_MAX = 4096  # runs in `recent`


class PrefixIndex:
    """Looks up and publishes committed full blocks, by their tokens.

    Writes the runs and children of the nodes that grow, and, by `cache`, which blocks the pool
    marks as cached. Tells the evictor which nodes are leaves.
    """

    def __init__(self, forest: Forest, evictor: Evictor, log: EventLog | None = None) -> None:
        self.pool = forest.pool
        self.block_size = self.pool.ids.shape[1]
        self.policy = evictor.policy
        self.arrivals = Arrivals(self.pool)
        self._forest = forest
        self._evictor = evictor
        self._log = log
        # Blocks published since a reader set this to [], each run with the block before it; None if
        # the reader must read all runs.
        self.recent: list[tuple[int, Int32]] | None = None

    # ---------------------------------------------------------------- look up

    def match(self, tree: TreeKey, tokens: Int32, mm_hashes: MMHashes = NO_MM_HASHES) -> Match:
        """Return the longest published prefix of `tokens` in `tree`. O(tokens)."""
        root = self._forest.roots.get(tree)
        if root is None:
            return Match(None, NO_BLOCKS)
        num_full = len(tokens) // self.block_size
        wanted = tokens[: num_full * self.block_size].reshape(num_full, self.block_size)
        node, position, found = self._walk(
            root, 0, wanted, mm_hashes.stretches(self.block_size, 0, num_full)
        )
        if len(found) < 2:
            blocks = found[0] if found else NO_BLOCKS
        else:
            blocks = np.concatenate(found)
        rest = tokens[position * self.block_size : (position + 1) * self.block_size]
        if not len(rest):
            return Match(node, blocks)
        tag = mm_hashes.tag(self.block_size, position)
        return Match(node, blocks, *self._partial(node, position, rest, tag))

    def _walk(
        self, node: Node, position: int, wanted: Int32, tags: list[tuple[int, Tag]]
    ) -> tuple[Node, int, list[Int32]]:
        """Walk from block `position`, in or at the end of `node`, while `wanted` agrees."""
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
            agreed = int(same.argmin()) // self.block_size  # also 0 if all are equal
            if not agreed and np.count_nonzero(same) == same.size:
                agreed = len(run)
            found.append(run[:agreed])
            position += agreed
            segment += position == stop
            if agreed < len(run):
                break
        return node, position, found

    def _partial(self, node: Node, position: int, rest: Int32, tag: Tag) -> tuple[int, int]:
        """Return the next block that agrees longest with `rest`, and the number of tokens."""
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

    def find_first(self, tree: TreeKey, key: object) -> int:
        """Return the first block of the run at the front of `tree` with this key, or -1. O(1)."""
        root = self._forest.roots.get(tree)
        node = None if root is None else root.children.get(key)
        return -1 if node is None else node.first

    # ---------------------------------------------------------------- publish

    def root(self, tree: TreeKey) -> Node:
        """Return the root of `tree`; make it on first use. O(1)."""
        root = self._forest.roots.get(tree)
        if root is None:
            root = self._forest.new_root(tree, self._evictor.queue(tree[0]))
        return root

    def publish(
        self, node: Node, position: int, blocks: Blocks, mm_hashes: MMHashes
    ) -> tuple[Node, bool]:
        """Publish full `blocks` after the place (node, position). O(tokens).

        Equal blocks that are published already stay in the index. Return the node of the last
        block, and True if a block in the index is not the sequence's own. `settle` must follow.
        """
        end, is_duplicate = position + len(blocks), False
        first, tags = position, mm_hashes.stretches(self.block_size, position, end)
        if position < node.end or self._forest.key(int(blocks[0]), tags[0][1]) in node.children:
            wanted = self.pool.ids.take(blocks, axis=0)
            node, position, found = self._walk(node, position, wanted, tags)
            if position > first:
                published = np.concatenate(found)
                is_duplicate = not np.array_equal(published, blocks[: position - first])
                self._reuse(published)
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
        return node, is_duplicate

    def publish_first(self, tree: TreeKey, block: int, tag: Tag, place: Place) -> int:
        """Publish a block at the front of `tree`; `settle` must follow. O(block_size).

        Return the block in the index: an equal one that was published before, or `block`.
        """
        root, key = self.root(tree), self._forest.key(block, tag)
        equal = root.children.get(key)
        if equal is None:
            self._begin_run(root, 0, np.array([block], np.int32), tag, key, place)
            return block
        self._reuse(equal.blocks[:1])
        return equal.first

    def _reuse(self, published: Int32) -> None:
        self.settle()
        self.policy.touch(published)
        self._evictor.release(published[self._evictor.idle(published)])  # used, and idle again

    def _attach(self, node: Node, position: int, blocks: Blocks, tag: Tag) -> Node:
        if position and node in node.queue.ranks:  # the idle leaf gets a held child
            node.queue.forget(node)
            node.queue.defer(node)
        if not position or node.children or node.sealed or node.tag != tag:
            key = self._forest.key(int(blocks[0]), tag)
            return self._begin_run(node, position, blocks.astype(np.int32), tag, key)
        self._tell(node, position, blocks, tag)
        node.extend(blocks)
        self._forest.name(node, blocks)
        return node

    def _begin_run(
        self,
        parent: Node,
        position: int,
        blocks: Int32,
        tag: Tag,
        key: object,
        place: Place | None = None,
    ) -> Node:
        self._tell(parent, position, blocks, tag, place)
        node = self._forest.new_node(parent, position, blocks)
        node.tag, node.place = tag, place
        parent.children[key] = node
        self._forest.name(node, blocks)
        return node

    def _tell(
        self, node: Node, position: int, blocks: Blocks, tag: Tag, place: Place | None = None
    ) -> None:
        """Report `blocks` to the policy and the log, before they join the tree after `node`."""
        before = int(node.blocks[-1]) if position else -1
        self.arrivals.add(blocks, position, before, node.tree)
        if self.recent is not None:
            self.recent.append((before, blocks.astype(np.int32)))
            if len(self.recent) > _RECENT_MAX:
                self.recent = None
        if self._log is not None:
            self._log.add("stored", **self._event(node.tree, tag, before, position, blocks, place))

    def settle(self) -> None:
        """Report the newly published blocks to pool and policy. O(blocks)."""
        if self.arrivals:
            blocks, fingerprints, depths = self.arrivals.drain(self.policy.needs_fingerprints)
            self.pool.cache(blocks)
            self.policy.admit(blocks, fingerprints, depths)

    def _split(self, lower: Node, position: int) -> Node:
        """Split a run; `lower` stays the deeper half. O(blocks). Return the upper half."""
        parent = lower.parent
        assert parent is not None
        start, front = lower.start, lower.cut_front(position)
        upper = self._forest.new_node(parent, start, front)
        upper.tag = lower.tag
        parent.children[self._forest.key(upper.first, upper.tag)] = upper
        upper.children[self._forest.key(lower.first, lower.tag)] = lower
        lower.parent = upper
        lower.token = self.pool.ids.item(lower.first, 0)
        self._forest.name(upper, front)
        self._evictor.enqueue_node(upper)
        return upper

    # ---------------------------------------------------------------- events, resize, check

    def published(self) -> Iterator[Event]:
        """Return all runs as `stored` events, parents before children. O(tokens)."""
        for before, node in self.runs():
            where = before, node.start, node.blocks, node.place
            yield Event(0, "stored", **self._event(node.tree, node.tag, *where))

    def runs(self) -> Iterator[tuple[int, Node]]:
        """Return all runs with the block before each, or -1; parents first. O(nodes)."""
        for root in self._forest.roots.values():
            for node in self._forest.below(root):
                parent = node.parent
                yield int(parent.blocks[-1]) if parent and parent.end else -1, node

    def _event(
        self,
        tree: TreeKey,
        tag: Tag,
        before: int,
        position: int,
        blocks: Blocks,
        place: Place | None,
    ) -> dict[str, Any]:
        namespace, lora = tree[:2]
        windowed = dict[str, Any]()
        if place is not None:
            assert tag is not None
            windowed = {"digest": tag[0][2], "digest_before": place.before}
            position, tag = place.position, place.tag
        return {
            "blocks": blocks.copy(),
            "namespace": namespace,
            "lora": lora,
            "parent": before,
            "position": position,
            "tokens": self.pool.ids[blocks],
            "mm_hashes": tag or (),
            "group": tree[2] if len(tree) == 3 else 0,
            **windowed,
        }

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool to its new size. `places`: the new id of each block. O(blocks)."""
        self.recent = None
        self._forest.resize(num_blocks, places)
        self.arrivals.resize(num_blocks, places)
        self.policy.resize(num_blocks, places)

    def check(self) -> None:
        """Raise `BrokenInvariant` unless trees, look-up and pool agree. O(blocks)."""
        self._forest.check()
        if self.arrivals:
            raise BrokenInvariant("prefix index: its blocks are not the cached blocks of the pool")
