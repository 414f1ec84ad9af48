"""The blocks of a prompt in several groups of layers: which are here, and which to load.

    group 0, full       a b c d e f g h         to continue after h: all of them,
    group 1, window             . . g h         and those that the next token attends to

A prompt continues after a block if each group has what the next token attends to. A store has the
blocks of a window at few places only: see `kvpager.blocks.groups.continuations`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.windows import first_needed
from kvpager.plans import Int64
from kvpager.storage.keys import PromptKeys

Bools = NDArray[np.bool_]


class Place(NamedTuple):
    """A block of a prompt: its group of layers, and its position in the prompt."""

    group: int
    position: int


class GroupBlocks:
    """The known places of a prompt's blocks. Arrays of blocks are bool [groups, blocks].

    Attributes:
        keys: their content keys.
        name: the key of the block after the prefix that can continue now.
        cached: the blocks on the device.
        loaded: the blocks in staging.
        places: of the blocks in staging, in the order in which they came.
        stores: the numbers of the stores to ask.
        stored: for each store, the blocks that it seems to have.
    """

    def __init__(self, keys: PromptKeys, cached: Bools, num_stores: int) -> None:
        self.keys = keys
        self.cached = cached
        self.loaded: Bools = np.zeros_like(cached)
        self.places: list[Place] = []
        self.stores = list(range(num_stores))
        self.stored: Bools = np.zeros((num_stores, *cached.shape), np.bool_)
        size, windows, ends = keys.block_size, keys.windows, range(cached.shape[1] + 1)
        # The first block that each group needs, by the number of blocks to continue after.
        self._firsts: Int64 = np.array(
            [[first_needed(end * size, window, size) for end in ends] for window in windows]
        )
        self.name = keys.of(0, self.longest(cached))

    @property
    def here(self) -> Bools:
        """Blocks on the device or in staging. O(blocks)."""
        return self.cached | self.loaded

    @property
    def known(self) -> Bools:
        """Blocks that are here or seem to be in a store. O(blocks * stores)."""
        known: Bools = self.here | self.stored.any(axis=0)
        return known

    @property
    def num_new(self) -> int:
        """The number of leading blocks that the known blocks add. O(groups * blocks)."""
        return self.longest(self.known) - self.longest(self.here)

    def num_from(self, number: int) -> int:
        """Return how many blocks are to be loaded from store `number`. O(groups * blocks)."""
        return [self.source(at) for at in self.to_load(self.longest(self.known))].count(number)

    def source(self, place: Place) -> int:
        """Return the first store with a block; at least one must have it. O(stores)."""
        return int(self.stored[:, place.group, place.position].argmax())

    def leave_out(self, number: int) -> None:
        """Load nothing more from store `number`. O(blocks)."""
        self.stores.remove(number)
        self.stored[number] = False

    def groups(self, *, windowed: bool) -> list[int]:
        """Return the groups with a window, or those without. O(groups)."""
        windows = enumerate(self.keys.windows)
        return [group for group, window in windows if (window is not None) == windowed]

    def run(self, group: int) -> int:
        """Return how many leading blocks of a group are known. O(blocks)."""
        known = self.known[group]
        return len(known) if known.all() else int(known.argmin())

    def longest(self, here: Bools, most: int | None = None) -> int:
        """Return how many leading blocks a prompt continues after, with the blocks `here`.

        If `most` is given, at most `most` of the needed blocks are missing in `self.here`.
        O(groups * blocks).
        """
        ends = np.arange(here.shape[1] + 1)
        lacking = _sums(~here, self._firsts, ends).sum(axis=0)
        can_continue = lacking == 0
        if most is not None:
            can_continue &= _sums(~self.here, self._firsts, ends).sum(axis=0) <= most
        return int(can_continue.nonzero()[0][-1])  # 0 blocks need none

    def needed(self, num_blocks: int) -> Bools:
        """Return which blocks a prompt needs to continue after `num_blocks`. O(groups * blocks)."""
        positions = np.arange(self.cached.shape[1])
        return (positions >= self._firsts[:, num_blocks, None]) & (positions < num_blocks)

    def to_load(self, num_blocks: int) -> list[Place]:
        """Return the blocks to load, in order: those of groups without a window first."""
        groups, positions = (self.needed(num_blocks) & ~self.here).nonzero()
        places = map(Place, groups.tolist(), positions.tolist())
        last = self.groups(windowed=True)
        return sorted(places, key=lambda place: (place.group in last, place.position))

    def key(self, place: Place) -> bytes:
        """Return the content key of a block. O(1)."""
        return self.keys.of(*place)

    def add(self, places: Iterable[Place]) -> None:
        """Record that blocks came into staging. O(places)."""
        for place in places:
            self.loaded[place] = True
            self.places.append(place)

    def take(self, count: int) -> list[Place]:
        """Remove the first blocks that came, as `Fetch.take` does. O(blocks)."""
        taken, self.places = self.places[:count], self.places[count:]
        return taken


def _sums(flags: Bools, firsts: Int64, ends: Int64) -> Int64:
    """Return how many flags are set from `firsts` to `ends`, [groups, ends]."""
    sums = np.zeros((len(flags), flags.shape[1] + 1), np.int64)
    np.cumsum(flags, axis=1, out=sums[:, 1:])
    counts: Int64 = sums[:, ends] - np.take_along_axis(sums, firsts, axis=1)
    return counts
