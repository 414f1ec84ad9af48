"""Evict first what has outlived the time for which a block of its kind is worth keeping.

The idea. A cached block earns a hit when it is reused and takes up room until then. How soon that
happens, if ever, shows in part when its last holder leaves. There are eleven kinds:

    new      used once: behind a known prefix, or in a prompt that is new from its first block
             on and is short, middling, long or very long
    twice    used twice, last by a prompt that added nothing, little or much behind it
    often    used more often; the same three

For each kind the policy counts how many blocks were released and at which ages they were used
again. So it knows, for every lifetime T, how many hits a block of the kind earns if it is kept for
T, and how much room * time it takes. The best T of all kinds together is found through a price of
room * time: at a given price each kind takes the T that earns it most,

    hits(kind, T) - price * room_time(kind, T),

and the price is right when all kinds together just fill the pool. The rank of a block is its
deadline, the T of its kind after its release. It stays the same until the block is used again, so
the order can be kept in a heap. Before anything is learned all kinds live equally long: LRU.

What was evicted has to be seen when it comes again, or a kind that was once given a short life
could never show that it deserves a longer one, and a prefix would seem new each time. A table of
ghosts remembers evicted blocks by their fingerprints.

Time is counted in blocks (each block of each prompt, reused or new, is one tick), ages in fractions
of the pool and prompts in fractions of the mean prompt. So nothing depends on the machine's speed,
and the same constants serve pools and blocks of any size.

Whence. Hits per room * time, by class and age, are LHD's hit density (Beckmann, Chen and Cidon,
2018), here for a whole life instead of the rest of one, so that ranks stand still. A ghost's return
counts for more than a first coming, as in S3-FIFO (Yang et al., 2023). A rank that is a moment on a
clock which demand drives is GreedyDual's (Young, 1994). The price is a Lagrange multiplier.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.eviction import BlockPolicy, Blocks, Float64, Int32, Int64, UInt64
from kvpager.blocks.fingerprints import NO_DEPTHS

Index = NDArray[np.intp]

# Where one class of prompts ends and the next begins, in mean prompts: by the length of those that
# are new, and by what those that reuse something add.
_LENGTHS = (0.5, 1.0, 2.0)
_ADDITIONS = (0.0, 0.05)
_MEAN_OVER = 1024  # prompts that the mean is taken over: long enough to be steady

BEHIND_PREFIX, IN_NEW_PROMPT, TWICE, OFTEN, NUM_KINDS = 0, 1, 5, 8, 11
HELD = NUM_KINDS  # not released since its last use: nothing to learn from

# All that is remembered of a block, or of its ghost, is one int64: its last release, its kind, its
# uses. The time stands highest, so that the lower of two records is the older one.
_TIME, _KIND, _BYTE = 16, 8, 0xFF
_USES_MAX = _BYTE
_FIRST_USE = HELD << _KIND | 1


def _kind_table() -> Int64:
    """The kind by [kind if new, class of addition, uses up to 3]."""
    classes = np.arange(len(_ADDITIONS) + 1)
    kinds = np.empty((TWICE, len(classes), 4), np.int64)
    kinds[:, :, :2] = np.arange(TWICE)[:, None, None]
    kinds[:, :, 2] = TWICE + classes
    kinds[:, :, 3] = OFTEN + classes
    return kinds


_KINDS = _kind_table()


class Ghosts:
    """What is remembered of evicted prefixes, by fingerprint.

    One slot for each: a newer ghost takes the place of an older one, so nothing is ever swept.
    """

    def __init__(self, num_slots: int) -> None:
        self.prints: UInt64 = np.zeros(num_slots, np.uint64)  # 0: empty
        self.records: Int64 = np.zeros(num_slots, np.int64)
        self._mask = np.uint64(num_slots - 1)  # of a power of two

    def put(self, prints: UInt64, records: Int64) -> None:
        """Remember these. O(blocks)."""
        slots = (prints & self._mask).astype(np.intp)
        self.prints[slots] = prints
        self.records[slots] = records

    def take(self, prints: UInt64) -> tuple[Index, Int64]:
        """Which of `prints` are remembered, and their records, which are let go. O(blocks)."""
        slots = (prints & self._mask).astype(np.intp)
        known = (self.prints.take(slots) == prints).nonzero()[0]
        if not len(known):
            return known, NO_DEPTHS
        slots = slots[known]
        self.prints[slots] = 0
        return known, self.records.take(slots)

    def everyone(self) -> tuple[UInt64, Int64]:
        """All prints and their records, the oldest first. O(slots log slots)."""
        used = self.prints.nonzero()[0]
        used = used[self.records[used].argsort(kind="stable")]
        return self.prints[used], self.records[used]


class Lifetimes:
    """How long a block of each kind is worth keeping, learned from releases and reuses.

    `scale` is about the size of the pool, a power of two. Ages fall in bins, two for a factor of
    two. Counts fade, so that what was learned follows the traffic.
    """

    AGE_BINS_FROM = 1 / 32  # pools; blocks that come again sooner are hits whatever is done
    LIFE_MAX = 8  # pools; what comes again later is not worth waiting for
    PERIOD = 0.25  # pools, between two times of learning
    PERIOD_MIN = 4096  # blocks: learning takes about 0.15 ms
    MEMORY = 50  # pools, over which a count fades to 1/e
    PRIOR = 100.0  # releases for which a kind counts as an average one
    PRICES = 64  # four for a factor of two, from the dearest down

    def __init__(self, scale: int) -> None:
        unit = max(scale * self.AGE_BINS_FROM, 1.0)
        half_octaves = int(2 * np.log2(2 * self.LIFE_MAX * scale / unit))
        edges = np.ceil(unit * 2.0 ** (np.arange(half_octaves + 1) / 2))
        self.edges: Int64 = np.concatenate([[0], edges]).astype(np.int64)
        self.num_bins = len(self.edges) - 1
        self.period = max(int(scale * self.PERIOD), self.PERIOD_MIN)
        self._life_max = self.LIFE_MAX * scale
        self._kept = float(np.exp(-self.period / (self.MEMORY * scale)))
        # Only blocks released at least `age` ago can have been used again at that age.
        self._delays = np.round(self.edges[:-1] / self.period).astype(np.int64)
        self.past: Float64 = np.zeros((int(self._delays.max()) + 1, NUM_KINDS))
        self.released: Float64 = np.zeros(HELD + 1)
        self.reused: Float64 = np.zeros((HELD + 1) * self.num_bins)
        self.values: Float64 = np.full(HELD + 1, 2.0 * scale)

    def release(self, kinds: Int64 | int, count: int) -> None:
        """Blocks were released, of a kind each, or all of one. O(blocks)."""
        if isinstance(kinds, int):
            self.released[kinds] += count
        else:
            self.released += np.bincount(kinds, minlength=len(self.released))

    def reuse(self, records: Int64, now: int) -> None:
        """Blocks of these records are used again. O(blocks)."""
        places = self.edges[1:-1].searchsorted(now - (records >> _TIME), "right")
        places += (records >> _KIND & _BYTE) * self.num_bins
        self.reused += np.bincount(places, minlength=len(self.reused))

    def learn(self, num_blocks: int) -> None:
        """Find the lifetimes at which the kinds fill `num_blocks`. O(kinds * ages * prices)."""
        self.past[1:] = self.past[:-1].copy()
        self.past[0] = self.released[:NUM_KINDS]
        hits, room_times = self._curves()
        prices = 32 / num_blocks * 2.0 ** (-np.arange(self.PRICES) / 4)
        best = (hits - prices[:, None, None] * room_times).argmax(axis=2)
        share = self.past[0] / max(float(self.past[0].sum()), 1.0)
        # A tick releases one block, so the mean room * time of a block is the room that all take.
        room = room_times[np.arange(NUM_KINDS), best] @ share
        cheap = int(np.clip(room.searchsorted(num_blocks), 1, self.PRICES - 1))
        step = max(float(room[cheap] - room[cheap - 1]), 1e-9)
        weight = min(max((num_blocks - float(room[cheap - 1])) / step, 0.0), 1.0)
        lives = np.minimum(self.edges[best[cheap - 1 : cheap + 1]], self._life_max)
        found = lives[0] * (1 - weight) + lives[1] * weight
        # Halfway only: one period's counts are noisy.
        self.values[:NUM_KINDS] = (self.values[:NUM_KINDS] + found) / 2
        self.reused *= self._kept
        self.released *= self._kept

    def _curves(self) -> tuple[Float64, Float64]:
        """Hits and room * time of one block, by kind and lifetime, the first of which is none."""
        reused = self.reused.reshape(-1, self.num_bins)[:NUM_KINDS]
        released = self.past[self._delays].T
        average = reused.sum(axis=0) / (released.sum(axis=0) + 1)
        chance = (reused + self.PRIOR * average) / (released + self.PRIOR)
        hits = np.minimum(chance.cumsum(axis=1), 1.0)
        chance = np.diff(hits, axis=1, prepend=0.0)
        # In each bin it stays if it was not used again so far; if it is now, for half of the bin.
        room_times = ((1 - hits + chance / 2) * np.diff(self.edges)).cumsum(axis=1)
        none = np.zeros((NUM_KINDS, 1))
        num_lives = int(self.edges.searchsorted(self._life_max, "right"))
        return (
            np.hstack([none, hits[:, :num_lives]]),
            np.hstack([none, room_times[:, :num_lives]]),
        )


class Lifetime(BlockPolicy):
    """Learned lifetimes: the block leaves whose kind's time is over for longest.

    Every call is O(blocks named); `retire` learns once in a quarter of the pool, O(1).
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "records": np.int64,
        "prints": np.uint64,
        "depths": np.int64,
        "deadlines": np.float64,
    }
    GHOSTS_PER_BLOCK = 32  # 512 bytes; an early loss makes an old prefix seem new
    needs_fingerprints = True
    records: Int64
    prints: UInt64
    depths: Int64
    deadlines: Float64

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        scale = _scale(num_blocks)
        self.ghosts = Ghosts(self.GHOSTS_PER_BLOCK * scale)
        self.lifetimes = Lifetimes(scale)
        self.num_prompts, self.mean_length = 0, 0.0
        self.learns_at = self.lifetimes.period

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        self.now += len(blocks)
        index = blocks.astype(np.intp)
        self.prints[index] = fingerprints
        self.depths[index] = depths
        self.records[index] = _FIRST_USE
        known, records = self.ghosts.take(fingerprints)
        if len(known):
            self._use(index[known], records)

    def touch(self, blocks: Blocks) -> None:  # noqa: D102
        self.now += len(blocks)
        index = blocks.astype(np.intp)
        self._use(index, self.records.take(index))

    def _use(self, index: Index, records: Int64) -> None:
        """Blocks are used again, of which `records` is known."""
        self.lifetimes.reuse(records, self.now)
        self.records[index] = np.minimum((records & _BYTE) + 1, _USES_MAX) | HELD << _KIND

    def retire(self, blocks: Blocks) -> None:  # noqa: D102
        if self.now >= self.learns_at:
            self.lifetimes.learn(self.num_blocks)
            self.learns_at = self.now + self.lifetimes.period
        index = np.asarray(blocks, np.intp)
        uses = self.records.take(index) & _BYTE
        # Counted from the end: a ghost may be lost, and then a block in the middle seems new.
        known = (uses > 1).nonzero()[0]
        added = len(uses) - 1 - known.item(-1) if len(known) else len(uses)
        kinds = self._kinds(added, self.depths.item(index.item(-1)) + 1)
        if len(known):
            self._release(index, uses, kinds.take(uses, mode="clip"))
        else:
            self._release(index, 1, kinds.item(1))

    def _kinds(self, added: int, length: int) -> Int64:
        """Which kinds the blocks of a prompt are of that added so many, by their uses."""
        self.num_prompts = min(self.num_prompts + 1, _MEAN_OVER)
        self.mean_length += (length - self.mean_length) / self.num_prompts
        if added < length:
            kind_if_new = BEHIND_PREFIX
        else:
            kind_if_new = IN_NEW_PROMPT + bisect_left(_LENGTHS, length / self.mean_length)
        kinds: Int64 = _KINDS[kind_if_new, bisect_left(_ADDITIONS, added / self.mean_length)]
        return kinds

    def _release(self, index: Index, uses: Int64 | int, kinds: Int64 | int) -> None:
        """Begin the life of blocks, of a kind each, or all of one."""
        self.lifetimes.release(kinds, len(index))
        self.records[index] = (kinds << _KIND) + uses + (self.now << _TIME)
        self.deadlines[index] = self.lifetimes.values[kinds] + self.now

    def rank(self, blocks: Blocks) -> Float64:  # noqa: D102
        return self.deadlines.take(blocks)

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        index = blocks.astype(np.intp)
        self.ghosts.put(self.prints.take(index), self.records.take(index))

    def resize(self, num_blocks: int, places: Int32) -> None:
        """Follow the pool. What was learned stays valid as long as the scale does. O(blocks)."""
        before = _scale(self.num_blocks)
        super().resize(num_blocks, places)
        if (scale := _scale(num_blocks)) != before:
            ghosts = self.ghosts.everyone()
            self.ghosts = Ghosts(self.GHOSTS_PER_BLOCK * scale)
            self.ghosts.put(*ghosts)
            self.lifetimes = Lifetimes(scale)
            self.learns_at = self.now + self.lifetimes.period


def _scale(num_blocks: int) -> int:
    """The power of two next to `num_blocks`: pools that grow a little keep what they learned."""
    return 1 << round(float(np.log2(num_blocks)))
