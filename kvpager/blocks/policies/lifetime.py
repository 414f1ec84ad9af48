"""Evict the block with the earliest deadline, under the strategy with most recent hits.

A block's deadline is the time of its last release plus a lifetime. A strategy computes lifetimes,
in multiples of the pool's size, from a block's history:

    lru        0: the block that was released first is evicted first
    doubling   d for each doubling of its uses, d from 1/2 to 8: from recency towards frequency
    reused     a for a block that was used more than once: one-time blocks cannot evict it
    own        reused and doubling, but 0 for a prefix that many prompts share and extend a lot:
               such a prefix is held while it is needed
    lottery    8 for the blocks of one prompt in n: keeps a part of a loop longer than the pool

The best strategy depends on traffic and pool size, so the policy evaluates all of them. A strategy
would hold the blocks with the latest deadlines, as many as the pool has. A reused block is a hit of
the strategy if its deadline was among those. This needs no simulation: a block's history does not
depend on the strategy in charge, because a table of ghosts keeps the history of evicted blocks by
fingerprint. Hits decay with time, and the strategy with most hits is in charge.

Time is counted in blocks: each block of each prompt, reused or new, is one tick. So results do not
depend on the machine's speed, and the same constants fit pools and blocks of any size.

Ghosts, and short stays of one-time blocks, are from S3-FIFO (Yang et al., 2023) and 2Q (Johnson and
Shasha, 1994). Choosing between recency and frequency by ghost hits is from ARC (Megiddo and Modha,
2003), ranks on a clock that demand drives from GreedyDual (Young, 1994), and keeping a few blocks
while a loop passes from BIP (Qureshi et al., 2007).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.fingerprints import NO_DEPTHS
from kvpager.blocks.policies.base import BlockPolicy, Blocks
from kvpager.plans import NO_BLOCKS, Float64, Int32, Int64, UInt64

Index = NDArray[np.intp]

# The history of a block or ghost is one int64. High bits: the time of its last release or use, so
# that records compare by age. Low bits, the traits: shared prefix or not, lot of its prompt, uses.
_USES = 0x3F
_LOT, _LOTS = 6, 16
_SHARED = 1 << 10
_TIME = 11
_TRAITS = (1 << _TIME) - 1

_NO_EDGE = -(2.0**60)  # the pool holds everything
_ADDS_MUCH = 0.05  # mean prompts
_MEAN_OVER = 1024  # prompts that the mean is taken over: long enough to be steady


def _lifetimes() -> Float64:
    """Return lifetimes in pools, float64 [strategies, traits]; the first strategy is LRU."""
    traits = np.arange(_TRAITS + 1)
    uses = np.maximum(traits & _USES, 1)
    doublings, is_reused = np.log2(uses), (uses > 1).astype(np.float64)
    own = np.where(traits & _SHARED, 0.0, 1.0)
    lots = traits >> _LOT & (_LOTS - 1)
    rows = [each * doublings for each in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)]
    rows += [stay * is_reused for stay in (1.0, 4.0)]
    rows += [
        (stay * is_reused + each * doublings) * own for stay in (1.0, 4.0) for each in (0.0, 1.0)
    ]
    rows += [8.0 * (lots % prompts == 0) for prompts in (2, 4, 16)]
    return np.array(rows)


LIFETIMES = _lifetimes()


class Ghosts:
    """The histories of evicted blocks, by fingerprint.

    A fingerprint has one slot: a newer ghost replaces an older one, so no sweep is needed.
    """

    def __init__(self, num_slots: int) -> None:
        self.prints: UInt64 = np.zeros(num_slots, np.uint64)  # 0: empty
        self.records: Int64 = np.zeros(num_slots, np.int64)
        self._mask = np.uint64(num_slots - 1)  # of a power of two

    def put(self, prints: UInt64, records: Int64) -> None:
        """Store the records of evicted blocks. O(blocks)."""
        slots = (prints & self._mask).astype(np.intp)
        self.prints[slots] = prints
        self.records[slots] = records

    def take(self, prints: UInt64) -> tuple[Index, Int64]:
        """Remove `prints`; return the indices that were found and their records. O(blocks)."""
        slots = (prints & self._mask).astype(np.intp)
        known = (self.prints.take(slots) == prints).nonzero()[0]
        if not len(known):
            return known, NO_DEPTHS
        slots = slots[known]
        self.prints[slots] = 0
        return known, self.records.take(slots)

    def everyone(self) -> tuple[UInt64, Int64]:
        """Return all prints and their records, oldest first. O(slots log slots)."""
        used = self.prints.nonzero()[0]
        used = used[self.records[used].argsort(kind="stable")]
        return self.prints[used], self.records[used]

    def sample(self, first: int, step: int) -> Int64:
        """Return the records in one slot of `step`, from slot `first` on. O(slots / step)."""
        records: Int64 = self.records[first::step][self.prints[first::step] != 0]
        return records


class Contest:
    """Recent hits of each strategy, and the strategy in charge."""

    PERIOD = 0.25  # pools between two counts; at first a quarter of the time so far
    PERIOD_MIN = 512  # ticks: a count takes about 0.4 ms
    MEMORY = 8.0  # pools, over which a hit fades to 1/e
    SAMPLE = 2048  # blocks and ghosts sampled to estimate what the pool would hold

    def __init__(self, num_blocks: int, scale: int, now: int = 0) -> None:
        """Begin with LRU. `scale` is about `num_blocks`."""
        self.bonuses: Float64 = LIFETIMES * num_blocks  # ticks
        self.hits: Float64 = np.zeros(len(LIFETIMES))
        self.chosen = 0
        # The earliest deadline that each strategy's pool holds.
        self.edges: Float64 = np.full(len(LIFETIMES), _NO_EDGE)
        self._scale = scale
        self._counted_at = now
        self.due_at = now + self.PERIOD_MIN
        self._seen: list[tuple[Int64, int]] = []

    def see(self, records: Int64, now: int) -> None:
        """Record that blocks with these histories are used again. O(1)."""
        self._seen.append((records, now))

    def count(self, sample: Int64, num_held: int, now: int) -> bool:
        """Count the hits since the last call. Return True if the strategy in charge changed.

        The pool holds `num_held` of the records in `sample`. O(strategies * (sample + seen)).
        """
        before, self.edges = self.edges, self._edges(sample, num_held)
        ticks = now - self._counted_at
        self.hits *= np.exp(-ticks / (self.MEMORY * self._scale))
        if self._seen:
            records = np.concatenate([records for records, _ in self._seen])
            lengths = [len(records) for records, _ in self._seen]
            times = np.repeat([time for _, time in self._seen], lengths)
            # Interpolate edges between two counts. Before the first count they follow the clock.
            moved = np.where(before > _NO_EDGE, self.edges - before, ticks) / max(ticks, 1)
            edges = self.edges[:, None] - moved[:, None] * (now - times)
            self.hits += np.count_nonzero(self._deadlines(records) >= edges, axis=1)
        self._seen.clear()
        self._counted_at = now
        period = int(self.PERIOD * min(self._scale, now))
        self.due_at = now + max(period, self.PERIOD_MIN)
        best = int(self.hits.argmax())
        if self.hits[best] <= self.hits[self.chosen]:
            return False
        self.chosen = best
        return True

    def _edges(self, sample: Int64, num_held: int) -> Float64:
        if len(sample) <= num_held:
            return np.full(len(LIFETIMES), _NO_EDGE)
        last = len(sample) - 1 - num_held
        edges: Float64 = np.partition(self._deadlines(sample), last, axis=1)[:, last]
        return edges

    def _deadlines(self, records: Int64) -> Float64:
        """Return deadlines by [strategy, record]."""
        deadlines: Float64 = self.bonuses[:, records & _TRAITS] + (records >> _TIME)
        return deadlines


class Lifetime(BlockPolicy):
    """Evicts the block with the earliest deadline, under the strategy in charge.

    Every call is O(blocks named). Once per quarter of the pool, strategies are compared, O(1). If
    the strategy in charge changes, all blocks are ranked again, O(pool).
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "records": np.int64,  # 0: not published
        "prints": np.uint64,
        "depths": np.int64,
        "deadlines": np.float64,
    }
    GHOSTS_PER_BLOCK = 32  # 512 bytes; with fewer ghosts old prefixes seem new
    needs_fingerprints = True
    records: Int64
    prints: UInt64
    depths: Int64
    deadlines: Float64

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        scale = _scale(num_blocks)
        self.ghosts = Ghosts(self.GHOSTS_PER_BLOCK * scale)
        self.contest = Contest(num_blocks, scale)
        self.num_prompts, self.mean_length = 0, 0.0
        self.is_outdated = False

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        self.now += len(blocks)
        index = blocks.astype(np.intp)
        self.prints[index] = fingerprints
        self.depths[index] = depths
        self.records[index] = self.now << _TIME | 1
        known, records = self.ghosts.take(fingerprints)
        if len(known):
            self._use(index[known], records)

    def touch(self, blocks: Blocks) -> None:  # noqa: D102
        self.now += len(blocks)
        index = blocks.astype(np.intp)
        self._use(index, self.records.take(index))

    def _use(self, index: Index, records: Int64) -> None:
        """Record that blocks with histories `records` are used again."""
        self.contest.see(records, self.now)
        self.records[index] = np.minimum((records & _USES) + 1, _USES) | self.now << _TIME
        if self.now >= self.contest.due_at:
            self._compare()

    def _compare(self) -> None:
        step = max((self.GHOSTS_PER_BLOCK + 1) * _scale(self.num_blocks) // Contest.SAMPLE, 1)
        first = self.now % step  # another sample each time, so that errors cancel out
        cached = self.records[first::step]
        sample = np.concatenate([cached[cached > 0], self.ghosts.sample(first, step)])
        self.is_outdated |= self.contest.count(sample, self.num_blocks // step, self.now)

    def release(self, blocks: Blocks) -> None:  # noqa: D102
        index = np.asarray(blocks, np.intp)
        uses = self.records.take(index) & _USES
        # Count from the end: a block in the middle seems new if its ghost was lost.
        known = (uses > 1).nonzero()[0]
        added = len(uses) - 1 - known.item(-1) if len(known) else len(uses)
        length = self.depths.item(index.item(-1)) + 1
        self.num_prompts = min(self.num_prompts + 1, _MEAN_OVER)
        self.mean_length += (length - self.mean_length) / self.num_prompts
        traits = uses | (self.prints.item(index.item(-1)) % _LOTS) << _LOT
        if len(known) and added > _ADDS_MUCH * self.mean_length:
            traits |= np.where(uses > 2, _SHARED, 0)
        self.records[index] = traits | self.now << _TIME
        self.deadlines[index] = self.contest.bonuses[self.contest.chosen].take(traits) + self.now

    def rank(self, blocks: Blocks) -> Float64:  # noqa: D102
        return self.deadlines.take(blocks)

    def reranked(self, count: int) -> Int32:  # noqa: D102
        if not self.is_outdated:
            return NO_BLOCKS
        self.is_outdated = False
        bonuses = self.contest.bonuses[self.contest.chosen]
        self.deadlines[:] = bonuses.take(self.records & _TRAITS) + (self.records >> _TIME)
        return np.arange(self.num_blocks, dtype=np.int32)

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        index = blocks.astype(np.intp)
        self.ghosts.put(self.prints.take(index), self.records.take(index))
        self.records[index] = 0

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool, and restart the comparison of strategies. O(blocks)."""
        before = _scale(self.num_blocks)
        super().resize(num_blocks, places)
        if (scale := _scale(num_blocks)) != before:
            ghosts = self.ghosts.everyone()
            self.ghosts = Ghosts(self.GHOSTS_PER_BLOCK * scale)
            self.ghosts.put(*ghosts)
        chosen, hits = self.contest.chosen, self.contest.hits
        self.contest = Contest(num_blocks, scale, self.now)
        self.contest.chosen, self.contest.hits = chosen, hits


def _scale(num_blocks: int) -> int:
    """Return the power of two nearest to `num_blocks`: small growth keeps the ghosts."""
    return 1 << round(float(np.log2(num_blocks)))
