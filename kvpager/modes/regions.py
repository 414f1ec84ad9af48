"""Regions of equal length. A region holds one sequence, or a sequence and its forks."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from kvpager.blocks.sequences import Prompt
from kvpager.errors import OutOfBlocks, require
from kvpager.plans import NO_BLOCKS, NO_COPIES, Int32, Int64


class Regions:
    """The sequences that share each region, and the tokens whose KV it has.

    A region without a sequence keeps its KV until another sequence takes it. The caller holds a
    lock.

    Attributes:
        num_blocks: blocks of a region.
        num_tokens: token slots of a region.
        holders: int64 [regions], the sequences that share each region.
        published: int64 [regions], leading tokens that later prompts may reuse.
        num_evicted: regions that lost published tokens, in total.
        num_never_used: regions that no sequence has held yet.
    """

    def __init__(self, count: int, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.num_tokens = num_blocks, num_blocks * block_size
        self._block_size = block_size
        self.holders: Int64 = np.zeros(count, np.int64)
        self.published: Int64 = np.zeros(count, np.int64)
        self.num_evicted, self.num_never_used = 0, count
        self._ids: Int32 = np.zeros((count, self.num_tokens), np.int32)
        self._prompts: list[Prompt | None] = [None] * count
        # Least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def num_free(self) -> int:
        """Regions without a sequence. O(1)."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Regions without a sequence whose tokens may be reused. O(regions)."""
        return int(np.count_nonzero((self.holders == 0) & (self.published > 0)))

    def blocks(self, region: int, num_tokens: int) -> Int32:
        """Return the blocks of the region's first tokens. O(blocks)."""
        first = region * self.num_blocks
        return np.arange(first, first - (-num_tokens // self._block_size), dtype=np.int32)

    def slots(self, region: int, start: int, stop: int) -> Int64:
        """Return the slots of the region's tokens `start` to `stop`. O(tokens)."""
        return np.arange(start, stop, dtype=np.int64) + region * self.num_tokens

    def refuse(self, count: int, length: int = 0, num_more: int = 0) -> None:
        """Raise `OutOfBlocks` unless `count` regions and `num_more` further blocks are free.

        Also raises if a region is too short for `length` tokens. O(regions).
        """
        if length > self.num_tokens:
            need = -(-length // self._block_size)
            advice = f"a region has {self.num_tokens} slots; raise max_length"
            raise OutOfBlocks(need, self.num_blocks, 0, self.num_blocks, advice=advice)
        need = count * self.num_blocks + num_more
        if need > self.num_free * self.num_blocks:
            cached = self.num_cached * self.num_blocks
            free, total = self.num_free * self.num_blocks - cached, len(self) * self.num_blocks
            advice = f"a sequence needs {self.num_blocks}; free one or raise num_rows"
            raise OutOfBlocks(need, free, cached, total, advice=advice)

    # ---------------------------------------------------------------- the KV of regions

    def match(self, who: Prompt, ids: Int32) -> tuple[int, int]:
        """Return the region that has the most leading tokens of `ids`, and their number.

        O(regions * tokens). Prompts with images or other inputs are never found.
        """
        best = 0, False, -1  # tokens, whether the region is free, the region
        if not who.mm_hashes:
            for region in np.flatnonzero(self.published > 0).tolist():
                if self._prompts[region] == who:
                    most = min(int(self.published[region]), len(ids))
                    different = np.flatnonzero(self._ids[region, :most] != ids[:most])
                    found = int(different[0]) if len(different) else most
                    # The KV of a free region needs no copy.
                    best = max(best, (found, self.holders[region] == 0, region))
        return best[2], best[0]

    def publish(self, region: int, who: Prompt, num_tokens: int) -> None:
        """Let later prompts reuse the whole blocks of the first `num_tokens` tokens. O(1)."""
        whole = num_tokens // self._block_size * self._block_size
        if whole > self.published[region] and not who.mm_hashes:
            self.published[region], self._prompts[region] = whole, who

    def write(self, region: int, start: int, ids: Int32 = NO_BLOCKS) -> None:
        """Note that tokens from `start` on are overwritten, by `ids` if they are known. O(ids)."""
        whole = start // self._block_size * self._block_size
        self.published[region] = min(int(self.published[region]), whole)
        self._ids[region, start : start + len(ids)] = ids

    def clear(self) -> int:
        """Forget the KV of regions without a sequence. Return their number. O(regions)."""
        cleared = (self.holders == 0) & (self.published > 0)
        self.published[cleared] = 0
        count = int(np.count_nonzero(cleared))
        self.num_evicted += count
        return count

    # ---------------------------------------------------------------- take, share, release

    def begin(self, ids: Int32, source: int, num_cached: int) -> tuple[int, Int32]:
        """Give a free region to a new sequence. Return it, and the blocks to copy to it first.

        `source` has the first `num_cached` of the tokens `ids`. O(tokens + regions).
        """
        if num_cached and not self.holders[source]:
            region = self._take(source)
            self.write(region, num_cached, ids[num_cached:])
            return region, NO_COPIES
        region = self._take()
        self.write(region, 0, ids)
        return region, self._copies(source, region, num_cached) if num_cached else NO_COPIES

    def _take(self, region: int | None = None) -> int:
        if region is None:
            region = next((one for one in self._free if not self.published[one]), None)
        if region is None:
            region = next(iter(self._free))
            self.num_evicted += 1
        # New regions are handed out in order, so those with a higher number were never used.
        self.num_never_used = min(self.num_never_used, len(self) - 1 - region)
        del self._free[region]
        self.holders[region] = 1
        return region

    def leave(self, region: int, length: int) -> tuple[int, Int32]:
        """Move one of several sequences, of `length` tokens, to a free region. O(blocks + regions).

        Returns the region, and the blocks to copy.
        """
        other = self._take()
        self.release(region)
        self._ids[other, :length] = self._ids[region, :length]
        self.published[other] = 0  # until the next commit: no copy may read what another one writes
        return other, self._copies(region, other, length)

    def _copies(self, source: int, destination: int, num_tokens: int) -> Int32:
        pairs = self.blocks(source, num_tokens), self.blocks(destination, num_tokens)
        return np.stack(pairs, axis=1)

    def share(self, region: int, times: int) -> None:
        """Let further sequences share a region. O(1)."""
        self.holders[region] += times

    def release(self, region: int) -> None:
        """Remove a sequence from a region. O(1)."""
        self.holders[region] -= 1
        if not self.holders[region]:
            self._free[region] = None

    def check(self, holders: Int64) -> None:
        """Raise `BrokenInvariant` unless `holders` sequences share each region. O(regions)."""
        wrong = np.flatnonzero(self.holders != holders)
        require(not len(wrong), f"regions {wrong.tolist()}: their counts of sequences are wrong")
        free = sorted(self._free)
        require(free == np.flatnonzero(holders == 0).tolist(), f"regions: {free} count as free")
        is_whole = self.published % self._block_size == 0
        in_bounds = (self.published >= 0) & (self.published <= self.num_tokens)
        require(bool((is_whole & in_bounds).all()), f"regions: {self.published} are published")
