"""ARC: a self-tuning, low overhead replacement cache (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from collections import OrderedDict

from kvpager.simulate.policies.queues import Ghosts, Queue, QueuePolicy


class ARC(QueuePolicy):
    """Keeps two LRU queues: blocks used once, and blocks used several times.

    Returning evicted blocks adapt the target size of each queue.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.once: Queue = OrderedDict()  # T1
        self.often: Queue = OrderedDict()  # T2
        self.once_ghosts = Ghosts(num_blocks)  # B1
        self.often_ghosts = Ghosts(2 * num_blocks)  # B2
        self.once_target = 0.0  # p
        self.is_once: set[int] = set()

    def insert(self, block: int, fingerprint: int) -> None:  # noqa: D102
        num_once, num_often = len(self.once_ghosts), len(self.often_ghosts)
        if self.once_ghosts.take(fingerprint):
            self.once_target += max(num_often / num_once, 1)
            self.often[block] = None
        elif self.often_ghosts.take(fingerprint):
            self.once_target -= max(num_once / num_often, 1)
            self.often[block] = None
        else:
            self.once[block] = None
            self.is_once.add(block)
        self.once_target = min(max(self.once_target, 0), self.num_blocks)
        num_cached = len(self.once) + len(self.often)
        self.once_ghosts.trim(self.num_blocks - len(self.once))
        self.often_ghosts.trim(2 * self.num_blocks - num_cached - len(self.once_ghosts))

    def hit(self, block: int) -> None:  # noqa: D102
        self.is_once.discard(block)
        self.once.pop(block, None)
        self.often[block] = None
        self.often.move_to_end(block)

    def let_go(self, block: int) -> None:  # noqa: D102
        queue = self.once if block in self.once else self.often
        if block in queue:
            queue.move_to_end(block)

    def next_out(self, number: int) -> int | None:  # noqa: D102
        if len(self.once) + number <= self.once_target:
            return self.take_idle(self.often, self.once)
        return self.take_idle(self.once, self.often)

    def remove(self, block: int, fingerprint: int) -> None:  # noqa: D102
        ghosts = self.once_ghosts if block in self.is_once else self.often_ghosts
        ghosts.add(fingerprint)
        self.is_once.discard(block)
        self.once.pop(block, None)
        self.often.pop(block, None)
