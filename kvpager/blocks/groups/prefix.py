"""Prefix look-up and publication for groups of layers, some with a sliding window.

A layer with a window needs only the blocks of the last window before the end of a hit. So the
blocks of its group are published separately, each keyed by a digest of all tokens up to its end. In
the prefix index the digest takes the place of an mm_hash:

    group 0, full       run of blocks a b c d e f       by their tokens, one after the other
    group 1, window 2   e by digest(a..e), f by digest(a..f)        b, c, d were evicted

Each block of such a group is a run of its own. So a block that slid out of the window is evicted
by its own rank, before blocks that are still in use.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvpager.blocks.groups.digests import extend_digests
from kvpager.blocks.mm_hashes import MMHashes, Tag
from kvpager.blocks.radix import Node, Place, TreeKey, key_of
from kvpager.blocks.sequences import Prompt
from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_needed
from kvpager.plans import Int32


class Hit(NamedTuple):
    """Cached blocks of a prompt."""

    tables: Int32  # [groups, blocks], -1 for no block
    nodes: list[Node | None]  # of the last block, in groups without a window
    digests: list[bytes]  # of the prompt's blocks


class WindowIndex:
    """Looks up prompts for all groups, and publishes the blocks of groups with a window.

    The caller holds the lock. Writes `published` of the rows it is given.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._windows = state.windows

    # ---------------------------------------------------------------- look up

    def nothing(self) -> Hit:
        """Return an empty hit. O(groups)."""
        num_groups = len(self._windows)
        return Hit(np.empty((num_groups, 0), np.int32), [None] * num_groups, [])

    def match(self, prompt: Prompt, ids: Int32) -> Hit:
        """Return the longest prefix of `ids` that every group can serve. O(tokens)."""
        state, size, hit = self._state, self._state.block_size, self.nothing()
        most, runs = len(ids) // size, dict[int, Int32]()
        trees = [prompt._replace(group=group).tree for group in range(len(self._windows))]
        for group, window in enumerate(self._windows):
            if window is None:
                match = state.index.match(trees[group], ids[: most * size], prompt.mm_hashes)
                runs[group], hit.nodes[group] = match.blocks, match.node
                most = min(most, len(match.blocks))
        needed = [tree for tree, window in zip(trees, self._windows, strict=True) if window != 1]
        if not most or any(tree not in state.forest.roots for tree in needed):
            return self.nothing()
        tables = np.full((len(trees), most), -1, np.int32)
        for group, run in runs.items():
            tables[group] = run[:most]
        if any(self._windows):
            keys = self._keys(hit.digests, ids[: most * size], prompt.mm_hashes)
            most = self._find_common(trees, keys, tables)
        for table, window in zip(tables, self._windows, strict=True):
            table[: first_needed(most * size, window, size)] = -1
        return hit._replace(tables=tables[:, :most])

    def held(self, prompt: Prompt, ids: Int32) -> Hit:
        """Return all cached blocks of `ids`, which may be too few to continue. O(tokens * groups).

        The nodes are those of the longest run in `ids`.
        """
        state, size, hit = self._state, self._state.block_size, self.nothing()
        most = len(ids) // size
        tables = np.full((len(self._windows), most), -1, np.int32)
        ids, keys = ids[: most * size], list[object]()
        if any(self._windows):
            keys = self._keys(hit.digests, ids, prompt.mm_hashes)
        for group, (table, window) in enumerate(zip(tables, self._windows, strict=True)):
            tree = prompt._replace(group=group).tree
            if window is None:
                match = state.index.match(tree, ids, prompt.mm_hashes)
                hit.nodes[group], table[: len(match.blocks)] = match.node, match.blocks
            else:
                table[:] = [state.index.find_first(tree, key) for key in keys]
        return hit._replace(tables=tables)

    def _keys(self, digests: list[bytes], ids: Int32, mm_hashes: MMHashes) -> list[object]:
        """Return the keys of whole blocks in groups with a window; fill in their digests."""
        blocks = ids.reshape(-1, self._state.block_size)
        extend_digests(digests, blocks, mm_hashes)
        return [
            key_of(tokens, self._tag(digest))
            for tokens, digest in zip(blocks, digests, strict=True)
        ]

    def _find_common(self, trees: list[TreeKey], keys: list[object], tables: Int32) -> int:
        """Return how many blocks all groups with a window can serve; write them to `tables`."""
        most, agreed = len(keys), -1
        while most != agreed:
            agreed = most
            for tree, window, table in zip(trees, self._windows, tables, strict=True):
                if window is not None:
                    most = self._find(tree, window, keys[:most], table)
        return most

    def _find(self, tree: TreeKey, window: int, keys: list[object], table: Int32) -> int:
        """Return the longest prefix, in blocks, whose last window a group has.

        From the last block to the front; what is found is written to `table`.
        """
        size, index = self._state.block_size, self._state.index
        end = len(keys)
        first = first_needed(end * size, window, size)
        for position in range(len(keys) - 1, -1, -1):
            if position < first:  # a window of one token needs no block
                return end
            if table[position] < 0:
                table[position] = index.find_first(tree, keys[position])
            if table[position] < 0:
                end = position
                first = first_needed(end * size, window, size)
            elif position <= first:
                return end
        return end

    # ---------------------------------------------------------------- publish

    def publish(self, row: int, end: int) -> Int32:
        """Publish the blocks up to `end` of a row of a group with a window. O(their tokens).

        The change has begun, and the index is to settle afterwards. Return the blocks that the
        index has now: those of the row, or equal ones.
        """
        state, table = self._state, self._state.rows
        begin, who = int(table.published[row]), table.prompt(row)
        digests = table.digests[row - who.group]
        blocks = table.tables.part(row, begin, end)
        if len(digests) < end:
            missing = blocks[len(digests) - begin :]
            extend_digests(digests, state.pool.ids[missing], who.mm_hashes)
        published = []
        for position, block in enumerate(blocks.tolist(), begin):
            before = digests[position - 1] if position else None
            place = Place(position, before, who.mm_hashes.tag(state.block_size, position))
            tag = self._tag(digests[position])
            published.append(state.index.publish_first(who.tree, block, tag, place))
        table.published[row] = end
        return np.array(published, np.int32)

    def _tag(self, digest: bytes) -> Tag:
        size = self._state.block_size
        return ((0, size, digest, size),)
