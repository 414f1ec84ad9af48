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

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from kvpager.blocks.mm_hashes import MMHashes, Tag
from kvpager.blocks.radix import Node, key_of
from kvpager.blocks.sequences import Prompt
from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_needed
from kvpager.plans import NO_BLOCKS, Int32

_FRONT = bytes(32)  # the digest before the first token


class Held(NamedTuple):
    """Blocks of one group that a new sequence shares, from block `first` on."""

    first: int
    blocks: Int32
    node: Node | None = None  # of the last block, in a group without a window

    @property
    def table(self) -> Int32:
        """Return the block table, -1 before `first`. O(blocks)."""
        return np.concatenate([np.full(self.first, -1, np.int32), self.blocks])


class Hit(NamedTuple):
    """The cached prefix of a prompt, in whole blocks."""

    num_blocks: int
    held: list[Held]  # of each group
    digests: list[bytes]  # of the prompt's blocks


class WindowIndex:
    """Looks up prompts for all groups, and publishes the blocks of groups with a window.

    The caller holds the lock. Writes `published` of the rows it is given.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._windows = state.windows

    # ---------------------------------------------------------------- look up

    def match(self, prompt: Prompt, ids: Int32) -> Hit:
        """Return the longest prefix of `ids` that every group can serve. O(tokens)."""
        state, most = self._state, len(ids) // self._state.block_size
        who = [prompt._replace(group=group) for group in range(len(self._windows))]
        found: list[tuple[Int32, Node | None]] = []
        for member, window in zip(who, self._windows, strict=True):
            if window is None:
                match = state.index.match(
                    member.tree, ids[: most * state.block_size], member.mm_hashes
                )
                most = min(most, len(match.blocks))
                found.append((match.blocks, match.node))
            else:
                found.append((NO_BLOCKS, None))
        if not most or not self._is_known(who):
            return self.nothing()
        if not any(self._windows):
            return Hit(most, [Held(0, blocks[:most], node) for blocks, node in found], [])
        blocks = ids[: most * state.block_size].reshape(most, -1)
        digests: list[bytes] = []
        self._extend(digests, blocks, prompt.mm_hashes)
        keys = [
            key_of(block, self._tag(digest)) for block, digest in zip(blocks, digests, strict=True)
        ]
        most, published = self._common(who, keys)
        held = []
        for (run, node), blocks_of, window in zip(found, published, self._windows, strict=True):
            if window is None:
                held.append(Held(0, run[:most], node))
            else:
                first = first_needed(most * state.block_size, window, state.block_size)
                held.append(Held(first, blocks_of[first:most].copy()))
        return Hit(most, held, digests) if most else self.nothing(digests)

    def _is_known(self, who: Sequence[Prompt]) -> bool:
        roots = self._state.forest.roots
        return all(prompt.tree in roots for prompt in who)

    def nothing(self, digests: Sequence[bytes] = ()) -> Hit:
        """Return an empty hit. O(groups)."""
        return Hit(0, [Held(0, NO_BLOCKS) for _ in self._windows], list(digests))

    def _common(self, who: Sequence[Prompt], keys: list[object]) -> tuple[int, list[Int32]]:
        """Return how many blocks all groups with a window can serve, and these blocks."""
        published = [np.full(len(keys), -1, np.int32) for _ in who]
        most, agreed = len(keys), -1
        while most != agreed:
            agreed = most
            for prompt, window, blocks in zip(who, self._windows, published, strict=True):
                if window is not None:
                    most = self._served(prompt, window, keys[:most], blocks)
        return most, published

    def _served(self, who: Prompt, window: int, keys: list[object], blocks: Int32) -> int:
        """Return the longest prefix, in blocks, whose last window a group has.

        From the last block to the front; what is found is noted in `blocks`.
        """
        size, index, tree = self._state.block_size, self._state.index, who.tree
        end = len(keys)
        first = first_needed(end * size, window, size)
        for position in range(len(keys) - 1, -1, -1):
            if blocks[position] < 0:
                blocks[position] = index.find_first(tree, keys[position])
            if blocks[position] < 0:
                end = position
                first = first_needed(end * size, window, size)
            elif position <= first:
                return end
        return end

    # ---------------------------------------------------------------- publish

    def publish(self, row: int, end: int) -> None:
        """Publish the blocks up to `end` of a row of a group with a window. O(their tokens).

        The change has begun, and the index is to settle afterwards.
        """
        state, table = self._state, self._state.rows
        begin, who = int(table.published[row]), table.prompt(row)
        digests = table.digests[row - who.group]
        blocks = table.tables.part(row, begin, end)
        if len(digests) < end:
            missing = blocks[len(digests) - begin :]
            self._extend(digests, state.pool.ids[missing], who.mm_hashes)
        for block, digest in zip(blocks.tolist(), digests[begin:end], strict=True):
            state.index.publish_first(who.tree, block, self._tag(digest))
        table.published[row] = end

    def _extend(self, digests: list[bytes], blocks: Int32, mm_hashes: MMHashes) -> None:
        """Append the digests of further blocks of token ids, [n, block_size]. O(tokens)."""
        before = digests[-1] if digests else _FRONT
        begin, end = len(digests), len(digests) + len(blocks)
        for stop, tag in mm_hashes.stretches(self._state.block_size, begin, end):
            shown = b"" if tag is None else repr(tag).encode()
            for position in range(len(digests), stop):
                tokens = blocks[position - begin].tobytes()
                before = blake2b(before + tokens + shown, digest_size=32).digest()
                digests.append(before)

    def _tag(self, digest: bytes) -> Tag:
        size = self._state.block_size
        return ((0, size, digest, size),)
