"""Puts the loaded blocks of a prompt into the prefix cache, a part at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import KeyParts
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying, KeyContext, content_keys
from kvpager.storage.tiers.followers import Followers
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.saving import Saver
from kvpager.storage.tiers.slot_memory import Lease, SlotMemory


class Attached(NamedTuple):
    """Blocks that were added to the prefix cache.

    Attributes:
        keys: their content keys.
        sources: the numbers of the stores that they came from.
        num_new: how many more leading blocks of the prompt are cached now.
    """

    keys: list[bytes]
    sources: list[int]
    num_new: int

    def by_store(self, stores: Sequence[BlockStore]) -> list[list[bytes]]:
        """Return the keys of the blocks from each store. O(blocks * stores)."""
        pairs = list(zip(self.keys, self.sources, strict=True))
        return [[key for key, source in pairs if source == n] for n in range(len(stores))]

    def num_tokens(self, stores: Sequence[BlockStore], block_size: int) -> dict[str, int]:
        """Return the newly cached tokens by store, in proportion to their blocks."""
        num_tokens, before, tokens = self.num_new * block_size, 0, dict[str, int]()
        for store, keys in zip(stores, self.by_store(stores), strict=True):
            if keys:
                after = num_tokens * (before + len(keys)) // len(self.keys)
                share = after - num_tokens * before // len(self.keys)
                tokens[store.name] = tokens.get(store.name, 0) + share
                before += len(keys)
        return tokens


@dataclass(eq=False)
class PrefixAttacher:
    """Attaches the next blocks of prompts. One thread, between steps, calls its methods."""

    _manager: BlockManager
    _staging: SlotMemory
    _saver: Saver
    _keying: ContentKeying
    _followers: Followers

    def new_fetch(
        self, tokens: Int32, identity: KeyParts, context: KeyContext, first: int, num_blocks: int
    ) -> Fetch:
        """Return a fetch of the blocks from `first` to `num_blocks`. O(tokens)."""
        keys = content_keys(tokens, self._manager.block_size, context, identity["mm_hashes"])
        return Fetch(tokens, identity, first, keys[:num_blocks])

    def attach(self, fetch: Fetch, count: int) -> Attached | None:
        """Attach the first `count` blocks. Returns None if the fetch is of no use any more."""
        manager, size, first = self._manager, self._manager.block_size, fetch.first
        stop, identity = first + min(count, len(fetch.slots)), fetch.identity
        # An image that begins in these blocks may end behind them.
        shown = [each for each in identity["mm_hashes"] if each[0] < stop * size]
        length = max([stop * size, *(end for _, end, _ in shown)])
        shortened: KeyParts = {**identity, "mm_hashes": shown}
        try:
            sequence = manager.allocate(fetch.tokens[:length], **shortened)
        except OutOfBlocks:
            return None
        try:
            if sequence.ticket:
                manager.copies.complete(sequence)  # its copy would be overwritten
            start = sequence.num_cached_tokens // size
            if start < first:
                return None
            skipped = min(start, stop) - first
            slots, sources = fetch.take(stop - first)
            with Lease(self._staging, slots) as lease:
                slots, sources = slots[skipped:], sources[skipped:]
                if not slots:
                    return Attached([], [], 0)
                self._saver.promote(fetch.keys[start:stop], identity["namespace"], slots, sources)
                blocks = manager.block_tables([sequence])[0][start:stop].tolist()
                self._staging.write(slots, blocks)
                lease.slots = lease.slots[:skipped]
            self._followers.load(fetch, start, blocks)
            manager.commit(sequence, stop * size)
            found = manager.match_prefix(fetch.tokens[: length + 1], blocks=True, **shortened)
            keys = manager.cached.keys(found.blocks[start:stop], self._keying)
            return Attached(keys, sources, len(keys))
        finally:
            manager.free(sequence)

    def drop(self, fetch: Fetch) -> None:
        """Hold nothing for a fetch any more. O(1)."""
