"""The naive allocator on the same sequences: one region of the maximum length for each.

A sequence takes a region when it begins. If none is free, it waits, first come, first served. It
keeps the region until it ends. A sequence that gets a region late has as many tokens as in the
recording from then on. A real server would have computed fewer. So the comparison favours the naive
allocator.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from kvpager.report.cells import Array, Blocks, owner_of


@dataclass(slots=True)
class ReservedPool:
    """Regions of `region_blocks` blocks in a pool, and the sequences that wait for one."""

    num_blocks: int
    region_blocks: int
    block_size: int
    most_running: int = 0
    served: set[int] = field(default_factory=set)  # sequences that had a region
    regions: dict[int, int] = field(default_factory=dict)  # of sequences
    waiting: dict[int, None] = field(default_factory=dict)  # an ordered set
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_regions))  # a heap: the lowest region first

    @property
    def max_tokens(self) -> int:
        """Return the slots of a region. O(1)."""
        return self.region_blocks * self.block_size

    @property
    def num_regions(self) -> int:
        """Return how many sequences the pool has room for. O(1)."""
        return self.num_blocks // self.region_blocks

    def begin(self, sequence: int) -> None:
        """Give the sequence a region, or let it wait. O(log regions)."""
        self.waiting[sequence] = None
        self._admit()

    def end(self, sequence: int) -> None:
        """Take the region of the sequence back, and give it to the next one. O(log regions)."""
        if sequence in self.waiting:
            del self.waiting[sequence]
            return
        heapq.heappush(self._free, self.regions.pop(sequence))
        self._admit()

    def _admit(self) -> None:
        while self._free and self.waiting:
            sequence = next(iter(self.waiting))
            del self.waiting[sequence]
            self.regions[sequence] = heapq.heappop(self._free)
            self.served.add(sequence)
        self.most_running = max(self.most_running, len(self.regions))

    def blocks(self, lengths: dict[int, int], requests: dict[int, int | None]) -> Blocks:
        """Return the blocks of the pool while sequences have `lengths` tokens. O(blocks)."""
        tokens, owners = np.zeros((2, self.num_regions), np.int64)
        for sequence, region in self.regions.items():
            tokens[region] = lengths[sequence]
            owners[region] = owner_of(requests[sequence])
        size, rest = self.block_size, self.num_blocks - self.num_regions * self.region_blocks
        # Without a region, there may be more blocks to one than memory has room for.
        starts = np.arange(min(self.region_blocks, self.num_blocks)) * size
        live = np.clip(tokens[:, None] - starts, 0, size).ravel()

        def spread(values: Array) -> Array:
            return np.concatenate([np.repeat(values, self.region_blocks), np.zeros(rest, np.int64)])

        taken = spread(np.sign(owners))
        live = np.concatenate([live, np.zeros(rest, np.int64)])
        return Blocks(live, taken * size, np.zeros_like(live), taken, spread(owners))
