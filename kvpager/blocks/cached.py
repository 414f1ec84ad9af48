"""Cached blocks that are also kept elsewhere: `manager.cached`.

    leaving(count) ─▶ keys(blocks, keying) ─▶ hold(blocks) ─▶ copy the bytes ─▶ release(ticket)
                                └─▶ mark_offered(blocks)           └─▶ a store answers
                                                                        └─▶ mark_clean(keys, store)

A block is *clean* in a store that has a copy of it: its eviction loses nothing. A block that is in
no store is *dirty*. It is offered once each time it becomes idle, whatever the stores answer.
Publishing a block again, with other tokens, makes it dirty. Of a group of layers with a window,
only blocks that a prompt continues from are offered, see `groups/continuations.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks import preview
from kvpager.blocks.mm_hashes import Tag
from kvpager.blocks.pool import KEYED, OFFERED, PASSING, STORES
from kvpager.blocks.radix import Node
from kvpager.blocks.state import BlockState
from kvpager.blocks.upcoming import Index, Upcoming
from kvpager.plans import NO_BLOCKS, Int32

NUM_STORES_MAX = STORES.bit_length()
_LOOK_AT = 8  # blocks whose exact order is found, for each one wanted


class Keying(Protocol):
    """Makes content keys of 32 bytes: a key covers all that a block's KV depends on."""

    def root(self, namespace: str | None, lora: str | None, group: int) -> bytes:
        """Return the key before the first block of a namespace, LoRA adapter and group."""
        ...

    def windowed(self, root: bytes, namespace: str | None, digest: bytes) -> bytes:
        """Return the key of a block of a group with a window; `digest` covers its tokens."""
        ...

    def block(self, namespace: str | None, before: bytes, tokens: Int32, tag: Tag) -> bytes:
        """Return the key of a block after the block with the key `before`."""
        ...


class CachedBlocks:
    """The published blocks of a manager. Thread-safe.

    Writes the pool's marks, and its holds through the fences.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._upcoming = Upcoming(state)
        self._keying: Keying | None = None
        # Entries of blocks that left stay until the block gets another key.
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_dropped_dirty(self) -> int:
        """Dirty blocks that were evicted since `keys` was first called. O(1)."""
        return self._state.pool.num_dropped_dirty

    def leaving(self, count: int, ahead: int | None = None) -> Int32:
        """Return the first `count` blocks that would be evicted and are to be offered, int32 [n].

        Those are dirty blocks that were not offered since they became idle. They come in the order
        of evictions if they are among the next 8 * `count` blocks; others follow by their rank.
        With `ahead`, all come by their rank, and only blocks that leave while the next `ahead`
        blocks are taken, by rank. O(blocks), O(8 * count * log blocks) if there is one. With
        `ahead`, O(new idle blocks), and O(blocks) after each `ahead` / 4 blocks that left.
        Raises: `ValueError`, `TypeError` for a bad argument.
        """
        count = arguments.count("count", count)
        ahead = None if ahead is None else arguments.count("ahead", ahead)
        state = self._state
        with state.lock, state.change:
            if ahead is not None:
                state.change.begin()
                state.evictor.refresh(_LOOK_AT * count)
                return self._upcoming.first(count, ahead, self._are_to_offer)
            wanted = self._are_to_offer()
            count = min(count, int(np.count_nonzero(wanted)))
            if not count:
                return NO_BLOCKS
            state.change.begin()  # the policy may change ranks
            state.evictor.refresh(_LOOK_AT * count)
            next_, is_used_up = preview.leaving(
                state.evictor, count, lambda blocks: wanted[blocks], _LOOK_AT * count
            )
            if len(next_) == count or not is_used_up:
                return next_
            wanted[next_] = False
            return np.concatenate([next_, self._by_rank(wanted, count - len(next_))])

    def _by_rank(self, wanted: NDArray[np.bool_], count: int) -> Int32:
        blocks = np.flatnonzero(wanted)
        ranks = self._state.evictor.policy.rank(blocks)
        return blocks[np.argsort(ranks, kind="stable")][:count].astype(np.int32)

    def _are_to_offer(self, blocks: Index | slice = slice(None)) -> NDArray[np.bool_]:
        """Return which blocks are idle, dirty, not passing, and not offered since idle."""
        pool = self._state.pool
        wanted: NDArray[np.bool_] = pool.cached[blocks] & (pool.refs[blocks] == 0)
        if pool.num_holds:
            wanted &= pool.holds[blocks] == 0
        wanted &= pool.marks[blocks] & (STORES | OFFERED | PASSING) == 0
        return wanted

    def keys(self, blocks: Int32, keying: Keying) -> list[bytes]:
        """Return the content keys of published blocks. O(blocks + blocks before them, once).

        The manager keeps the keys until it is given another `keying`.
        Raises: `ValueError` for a block that is not published.
        """
        state = self._state
        with state.lock, state.change:
            index = self._published(blocks)
            # Before the change: `keying` may call code of the caller, and that may fail.
            made = self._made_keys(index, keying)
            state.change.begin()
            state.pool.counts_dirty = True
            if self._keying is not keying:
                state.pool.marks &= ~np.uint16(KEYED)
                self._keying = keying
            for block, key in made.items():
                self._set_key(block, key)
            return [self._key_of[block] for block in index.tolist()]

    def _made_keys(self, index: NDArray[np.intp], keying: Keying) -> dict[int, bytes]:
        """Make the missing keys of blocks and of the blocks before them."""
        forest, made = self._state.forest, dict[int, bytes]()
        for number in dict.fromkeys(forest.node_of[index].tolist()):
            self._key_run(forest.nodes[number], keying, made)
        return made

    def _key_run(self, node: Node | None, keying: Keying, made: dict[int, bytes]) -> None:
        """Make the missing keys of a run and of the runs before it."""
        runs = []
        while node is not None and node.parent is not None:
            runs.append(node)
            node = node.parent
        pool, group = self._state.pool, runs[-1].group
        namespace, lora = runs[-1].tree[:2]
        key = keying.root(namespace, lora, group)
        if self._state.windows[group] is not None:  # each block is a run
            made[runs[0].first] = keying.windowed(key, namespace, runs[0].digest)
            return
        for run in reversed(runs):
            for block in run.blocks.tolist():
                if block in made:
                    key = made[block]
                elif self._keying is keying and pool.marks[block] & KEYED:
                    key = self._key_of[block]
                else:
                    key = made[block] = keying.block(namespace, key, pool.ids[block], run.tag)

    def _set_key(self, block: int, key: bytes) -> None:
        before = self._key_of.get(block)
        if before is not None and self._block_of.get(before) == block:
            del self._block_of[before]
        self._key_of[block], self._block_of[key] = key, block
        self._state.pool.marks[block] |= KEYED

    def namespaces(self, blocks: Int32) -> list[str | None]:
        """Return the namespaces of published blocks. O(blocks). Raises: as `keys`."""
        with self._state.lock:
            forest, index = self._state.forest, self._published(blocks)
            nodes = (forest.nodes[number] for number in forest.node_of[index].tolist())
            return [node.tree[0] for node in nodes if node is not None]

    def evict(self, namespace: str | None) -> int:
        """Evict all cached blocks of a namespace that no sequence holds; return how many.

        O(cached blocks of the namespace).
        """
        state = self._state
        with state.lock, state.change:
            state.change.begin()
            count = state.evictor.evict_namespace(namespace)
            state.totals["total_evicted"] += count
            return count

    def mark_offered(self, blocks: Int32) -> None:
        """Offer `blocks` no more until they were used again. O(blocks)."""
        state = self._state
        with state.lock, state.change:
            index = self._known(blocks)
            state.change.begin()
            state.pool.marks[index] |= np.uint16(OFFERED)

    def mark_clean(self, keys: Iterable[bytes], store: int) -> None:
        """Record that store number `store`, 0 to 6, has the blocks of `keys`. O(keys).

        Keys that `keys` did not return, or whose block has other content now, are skipped.
        """
        bit = self._bit(store)
        with self._state.lock, self._state.change:
            index = self._blocks_of(keys)
            self._state.change.begin()
            self._state.pool.marks[index] |= bit

    def mark_dirty(self, keys: Iterable[bytes], store: int) -> None:
        """Record that store number `store` lost the blocks of `keys`. O(keys)."""
        bit = self._bit(store)
        with self._state.lock, self._state.change:
            index = self._blocks_of(keys)
            self._state.change.begin()
            self._state.pool.marks[index] &= ~bit
            self._state.pool.note_idle(index)

    def hold(self, blocks: Int32) -> int:
        """Keep the content of published blocks until `release`. Returns a ticket. O(blocks).

        The blocks may leave the prefix cache before that.
        Raises: `ValueError` for a block that is not published, or if floors of namespaces need it.
        """
        state = self._state
        with state.lock, state.change:
            index = self._published(blocks).astype(np.int32)
            ticket = state.pin(index, "blocks: holding them would leave too few for the floors")
            if len(index):
                state.evictor.enqueue(index)  # idle blocks before them are deferred now
            return ticket

    def release(self, ticket: int, *, keep_rank: bool = False) -> None:
        """End a hold. O(blocks). Raises: `ValueError` for a ticket that is no open hold.

        A hold counts as a use. With `keep_rank` it does not: pass it if no sequence freed the
        blocks meanwhile.
        """
        state = self._state
        with state.lock, state.change:
            state.unpin(ticket, keep_rank=keep_rank)

    def _blocks_of(self, keys: Iterable[bytes]) -> NDArray[np.intp]:
        """Return the blocks that are published with these keys now."""
        pool = self._state.pool
        found = [self._block_of.get(key, pool.num_blocks) for key in keys]
        index = np.array([block for block in found if block < pool.num_blocks], np.intp)
        return index[pool.cached[index] & (pool.marks[index] & KEYED > 0)]

    def _published(self, blocks: Int32) -> NDArray[np.intp]:
        index = self._known(blocks)
        unpublished = index[~self._state.pool.cached[index]]
        if len(unpublished):
            raise ValueError(f"blocks: {unpublished[0]} is not published. Look them up again.")
        return index

    def _known(self, blocks: Int32) -> NDArray[np.intp]:
        index = np.asarray(blocks)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise TypeError("blocks: expected an int array [n]")
        num_blocks = self._state.pool.num_blocks
        if len(index) and not 0 <= index.min() <= index.max() < num_blocks:
            raise ValueError(f"blocks: expected numbers from 0 to {num_blocks - 1}")
        if len(np.unique(index)) != len(index):
            raise ValueError("blocks: one is repeated. Pass each block once.")
        return index.astype(np.intp)

    @staticmethod
    def _bit(store: int) -> np.uint16:
        return np.uint16(1 << arguments.count("store", store, at_most=NUM_STORES_MAX - 1))
