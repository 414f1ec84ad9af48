"""S3-FIFO: FIFO queues are all you need for cache eviction (Yang et al., SOSP 2023)."""

from __future__ import annotations

from collections import OrderedDict

from kvpager.simulate.policies.queues import Ghosts, Queue, QueuePolicy

SMALL = 0.1  # size of the small queue, as a share of the pool
GHOSTS = 4  # fingerprints of evicted blocks per block of the pool
USES_MAX = 3
USES_TO_STAY = 2


class S3FIFO(QueuePolicy):
    """Keeps a small FIFO queue for new blocks, and a main queue for blocks used again.

    A recently evicted block that returns goes to the main queue.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.small: Queue = OrderedDict()
        self.main: Queue = OrderedDict()
        self.uses: dict[int, int] = {}
        self.ghosts = Ghosts(GHOSTS * num_blocks)
        self.small_max = max(int(SMALL * num_blocks), 1)
        self.from_small: set[int] = set()

    def insert(self, block: int, fingerprint: int) -> None:  # noqa: D102
        queue = self.main if self.ghosts.take(fingerprint) else self.small
        queue[block] = None
        self.uses[block] = 0

    def hit(self, block: int) -> None:  # noqa: D102
        self.uses[block] = min(self.uses[block] + 1, USES_MAX)
        if block not in self.small and block not in self.main:  # `next_out` has named it
            queue = self.small if block in self.from_small else self.main
            queue[block] = None
            self.from_small.discard(block)

    def next_out(self, number: int) -> int | None:  # noqa: D102
        is_small_full = len(self.small) + number >= self.small_max
        first = self._out_of_small if is_small_full else self._out_of_main
        then = self._out_of_main if is_small_full else self._out_of_small
        block = first()
        return then() if block is None else block

    def _out_of_small(self) -> int | None:
        while (block := self.idle(self.small)) is not None:
            del self.small[block]
            if self.uses[block] < USES_TO_STAY:
                self.from_small.add(block)
                return block
            self.main[block] = None
            self.uses[block] = 0
        return None

    def _out_of_main(self) -> int | None:
        while (block := self.idle(self.main)) is not None:
            del self.main[block]
            if not self.uses[block]:
                return block
            self.uses[block] -= 1
            self.main[block] = None
        return None

    def remove(self, block: int, fingerprint: int) -> None:  # noqa: D102
        if block in self.small or block in self.from_small:
            self.ghosts.add(fingerprint)
        self.from_small.discard(block)
        self.small.pop(block, None)
        self.main.pop(block, None)
        del self.uses[block]
