"""Puts the loaded blocks of a prompt in all groups of layers into the prefix cache.

A prompt needs all of them to continue, so a sequence holds the blocks until all are filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.sequences import KeyParts, SequenceHandle
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying, KeyContext, PromptKeys
from kvpager.storage.tiers.attaching import Attached
from kvpager.storage.tiers.group_blocks import GroupBlocks, Place
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.saving import Saver
from kvpager.storage.tiers.slot_memory import Lease, SlotMemory


@dataclass
class _Filling:
    """A sequence whose blocks are being filled, and the blocks filled so far."""

    sequence: SequenceHandle
    num_new: int
    filled: list[Place] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


@dataclass(eq=False)
class GroupAttacher:
    """Attaches the blocks that prompts need. One thread, between steps, calls its methods."""

    _manager: GroupedManager
    _staging: SlotMemory
    _saver: Saver
    _keying: ContentKeying
    _num_stores: int
    _filling: dict[Fetch, _Filling] = field(default_factory=dict, init=False)

    def new_fetch(
        self, tokens: Int32, identity: KeyParts, context: KeyContext, first: int, num_blocks: int
    ) -> Fetch:
        """Return a fetch of the blocks that all groups need to continue. O(tokens * groups)."""
        manager, shown = self._manager, identity["mm_hashes"]
        keys = PromptKeys(tokens, manager.block_size, context, shown, manager.windows)
        cached = self._cached(tokens, identity)[:, :num_blocks]
        blocks = GroupBlocks(keys, cached, self._num_stores)
        return Fetch(tokens, identity, first, [], blocks=blocks)

    def _cached(self, tokens: Int32, identity: KeyParts) -> NDArray[np.bool_]:
        cached: NDArray[np.bool_] = self._manager.cached_blocks(tokens, **identity) >= 0
        return cached

    def attach(self, fetch: Fetch, count: int) -> Attached | None:
        """Fill up to `count` blocks. Returns None if the fetch is of no use any more. O(bytes).

        The blocks are cached when none is left in `fetch.slots`.
        """
        filling = self._filling.get(fetch) or self._begin(fetch)
        if filling is None:
            return None
        blocks, namespace = _blocks_of(fetch), fetch.identity["namespace"]
        (slots, sources), places = fetch.take(count), blocks.take(count)
        with Lease(self._staging, slots) as lease:
            if slots:
                tables = self._manager.block_tables([filling.sequence])[:, 0]
                keys = [blocks.key(place) for place in places]
                self._saver.promote(keys, namespace, slots, sources)
                self._staging.write(slots, [int(tables[place]) for place in places])
                lease.slots = []
                filling.filled += places
                filling.sources += sources
        return self._end(fetch) if not fetch.slots else Attached([], [], 0)

    def _begin(self, fetch: Fetch) -> _Filling | None:
        """Hold the blocks from which a prompt continues; drop loaded blocks it no longer needs."""
        manager, blocks, identity = self._manager, _blocks_of(fetch), fetch.identity
        blocks.cached = self._cached(fetch.tokens, identity)[:, : blocks.cached.shape[1]]
        num_before, num_blocks = blocks.longest(blocks.cached), blocks.longest(blocks.here)
        if num_blocks <= num_before:
            return None
        try:
            sequence, missing = manager.restore(fetch.tokens, num_blocks, **identity)
        except OutOfBlocks:
            return None
        filling = self._filling[fetch] = _Filling(sequence, num_blocks - num_before)
        is_needed = [at.position < num_blocks and bool(missing[at]) for at in blocks.places]
        with Lease(self._staging) as useless:
            slots = list(compress(fetch.slots, is_needed))
            lost = list(compress(fetch.slots, [not each for each in is_needed]))
            fetch.slots, useless.slots = slots, lost
            fetch.sources = list(compress(fetch.sources, is_needed))
            blocks.places = list(compress(blocks.places, is_needed))
        return filling

    def _end(self, fetch: Fetch) -> Attached:
        """Put the blocks of a prompt into the prefix cache, once all are filled."""
        manager, filling = self._manager, self._filling[fetch]
        manager.commit(filling.sequence)
        tables = manager.cached_blocks(fetch.tokens, **fetch.identity)
        groups, positions = zip(*filling.filled, strict=True)
        keys = manager.cached.keys(tables[list(groups), list(positions)], self._keying)
        self.drop(fetch)
        return Attached(keys, filling.sources, filling.num_new)

    def drop(self, fetch: Fetch) -> None:
        """Release the blocks of a fetch, if it has any. O(blocks)."""
        filling = self._filling.pop(fetch, None)
        if filling is not None:
            self._manager.free(filling.sequence)


def _blocks_of(fetch: Fetch) -> GroupBlocks:
    assert fetch.blocks is not None
    return fetch.blocks
