"""2Q: a low overhead high performance buffer management algorithm (Johnson and Shasha, 1994)."""

from __future__ import annotations

from collections import OrderedDict

from kvpager.simulate.policies.queues import Ghosts, Queue, QueuePolicy

IN = 0.25  # size of the FIFO queue, as a share of the pool
OUT = 0.5  # fingerprints of evicted blocks per block of the pool


class TwoQ(QueuePolicy):
    """Keeps a FIFO queue for new blocks, and an LRU queue for evicted blocks that return."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.new: Queue = OrderedDict()  # A1in
        self.main: Queue = OrderedDict()  # Am
        self.ghosts = Ghosts(int(OUT * num_blocks))  # A1out
        self.new_max = max(int(IN * num_blocks), 1)
        self.is_new: set[int] = set()

    def insert(self, block: int, fingerprint: int) -> None:  # noqa: D102
        if self.ghosts.take(fingerprint):
            self.main[block] = None
        else:
            self.new[block] = None
            self.is_new.add(block)

    def hit(self, block: int) -> None:  # noqa: D102
        if block not in self.is_new:
            self.main[block] = None
            self.main.move_to_end(block)
        else:
            self.new[block] = None  # `next_out` may have named it

    def let_go(self, block: int) -> None:  # noqa: D102
        if block in self.main:
            self.main.move_to_end(block)

    def next_out(self, number: int) -> int | None:  # noqa: D102
        if len(self.new) + number <= self.new_max:
            return self.take_idle(self.main, self.new)
        return self.take_idle(self.new, self.main)

    def remove(self, block: int, fingerprint: int) -> None:  # noqa: D102
        if block in self.is_new:
            self.is_new.remove(block)
            self.ghosts.add(fingerprint)
        self.new.pop(block, None)
        self.main.pop(block, None)
