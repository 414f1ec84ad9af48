"""Choose what to load of a prompt whose layers form groups: as far as all groups can continue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import NamedTuple

from kvpager.storage.tiers.group_blocks import GroupBlocks, Place
from kvpager.storage.tiers.protocol import BlockStore

# Looks up blocks of a prompt in a store, given its number, keys not to ask for, and free slots.
Find = Callable[[GroupBlocks, int, BlockStore, Collection[bytes], int], None]
_SPARE = 8  # blocks of a window to look up at first, besides the last window


def find_runs(
    blocks: GroupBlocks, number: int, store: BlockStore, unusable: Collection[bytes], most: int
) -> None:
    """Note which next blocks of groups without a window store `number` has. O(groups * blocks).

    `unusable` are keys that the store cannot serve. `most` is how many blocks staging has room for.
    """
    for group in blocks.groups(windowed=False):
        first, stop = int(blocks.run(group)), blocks.cached.shape[1]
        keys = (blocks.key(Place(group, at)) for at in range(first, stop))
        wanted = list(takewhile(lambda key: key not in unusable, keys))
        count = store.find(wanted) if wanted else 0
        blocks.stored[number, group, first : first + count] = True


def find_windows(
    blocks: GroupBlocks, number: int, store: BlockStore, unusable: Collection[bytes], most: int
) -> None:
    """Note which blocks of groups with a window store `number` has. O(groups * blocks).

    The store is asked from the end of the prompt, in growing steps, until the prompt continues
    somewhere. Groups without a window come first: they bound where that may be.
    """
    groups, stop = blocks.groups(windowed=True), blocks.cached.shape[1]
    stop = min((blocks.run(group) for group in blocks.groups(windowed=False)), default=stop)
    window = int(blocks.needed(stop).sum(axis=1)[groups].max(initial=0))
    lowest = max(blocks.longest(blocks.here) - window, 0)
    end, step = stop, window + _SPARE
    while groups and end > lowest:
        first = max(end - step, lowest)
        places = [
            place
            for group in groups
            for place in (Place(group, at) for at in range(first, end))
            if not blocks.known[place] and blocks.key(place) not in unusable
        ]
        there = are_stored(store, [blocks.key(place) for place in places])
        for place, is_there in zip(places, there, strict=True):
            blocks.stored[number][place] = is_there
        if blocks.longest(blocks.known, most) >= first + window:
            return  # the windows of longer prefixes begin at `first` or later
        end, step = first, 2 * step


def are_stored(store: BlockStore, keys: Sequence[bytes]) -> list[bool]:
    """Return which keys a store seems to have. O(keys)."""
    find_each = getattr(store, "find_each", None)
    if find_each is not None:
        return list(find_each(keys))
    return [store.find([key]) > 0 for key in keys]


class Batch(NamedTuple):
    """Blocks to load from one store."""

    store: int
    places: list[Place]
    keys: list[bytes]


def next_batch(blocks: GroupBlocks, most: int, batch: int) -> Batch | None:
    """Return the next blocks to load, up to `batch`; None if there are none. O(groups * blocks).

    `most` is how many blocks staging has room for.
    """
    num_blocks = blocks.longest(blocks.known, most)
    places = blocks.to_load(num_blocks)
    if not places or num_blocks <= blocks.longest(blocks.here):
        return None
    sources = [blocks.source(place) for place in places]
    same = next((n for n, source in enumerate(sources) if source != sources[0]), len(sources))
    places = places[: min(same, batch)]
    return Batch(sources[0], places, [blocks.key(place) for place in places])
