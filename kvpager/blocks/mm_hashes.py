"""Hashes of the images, audio or embeddings behind a prompt's placeholder tokens.

Two prompts share a block only if the block overlaps the same hashes in both. A block's *tag* lists
the hashes that overlap it. Consecutive blocks with equal tags form a stretch.

    tokens    t t t t | i i i i | i i t t | t t j j |        blocks of four tokens
    tag       None      (i,)      (i,)      (j,)             three stretches
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from kvpager import _validate as arguments

# (start, stop, hash, end): the hash covers tokens `start` to `stop`. `end` is less than `stop` if
# the sequence was truncated inside the range.
MMHash = tuple[int, int, bytes, int]
Tag = tuple[MMHash, ...] | None

OVERLAP_MAX = 64  # hashes over one token; the bound keeps a prompt's tags O(tokens) in size


class MMHashes:
    """The hashes of one prompt, sorted by their first tokens."""

    __slots__ = ("_ends_max", "_starts", "items")

    def __init__(self, items: Iterable[MMHash] = ()) -> None:
        """O(n log n). Raises: `ValueError` if more than `OVERLAP_MAX` cover one token."""
        self.items = tuple(sorted(items))
        self._starts = [start for start, _, _, _ in self.items]
        # For each hash, the furthest end among it and the hashes before it.
        self._ends_max = list(accumulate((end for _, _, _, end in self.items), max))
        if len(self.items) > OVERLAP_MAX:
            self._refuse_deep_overlap()

    def __bool__(self) -> bool:
        return bool(self.items)

    def _refuse_deep_overlap(self) -> None:
        ends = sorted(end for _, _, _, end in self.items)
        for number, start in enumerate(self._starts, 1):
            depth = number - bisect_right(ends, start)
            if depth > OVERLAP_MAX:
                raise ValueError(
                    f"mm_hashes: more than {OVERLAP_MAX} cover token {start}. "
                    "Join overlapping ranges into one range with one hash."
                )

    def up_to(self, length: int) -> MMHashes:
        """Return the hashes that start before token `length`, cut there. O(n)."""
        if not self.items or self._ends_max[-1] <= length:
            return self
        return MMHashes((*c[:3], min(c[3], length)) for c in self.items if c[0] < length)

    def stretches(self, block_size: int, first: int, end: int) -> list[tuple[int, Tag]]:
        """Return blocks `first` to `end` as (end of stretch, tag). O(hashes in range)."""
        if not self.items:
            return [(end, None)]
        found: list[tuple[int, Tag]] = []
        for stop, tag in self._sweep(block_size, first, end):
            if found and found[-1][1] == tag:
                found.pop()
            found.append((stop, tag))
        return found or [(end, None)]

    def tag(self, block_size: int, block: int) -> Tag:
        """Return one block's tag. O(hashes in range)."""
        return self.stretches(block_size, block, block + 1)[0][1]

    def _sweep(self, size: int, block: int, end: int) -> Iterator[tuple[int, Tag]]:
        """Yield (end of stretch, tag) at each block where a range begins or ends."""
        items, starts = self.items, self._starts
        at = bisect_left(starts, block * size)
        here = list(items[bisect_right(self._ends_max, block * size) : at])
        while block < end:
            begin, behind = block * size, (block + 1) * size
            here = [one for one in here if one[3] > begin]
            while at < len(items) and starts[at] < behind:
                if items[at][3] > begin:
                    here.append(items[at])
                at += 1
            stop = min(end, starts[at] // size) if at < len(items) else end
            for _, last, _, cut in here:
                # The block in which a range was truncated has its own tag.
                change = cut // size if cut < last else -(-cut // size)
                stop = min(stop, change if change > block else -(-cut // size))
            yield stop, tuple(_clipped(one, behind) for one in here) or None
            block = stop


def _clipped(mm_hash: MMHash, behind: int) -> MMHash:
    start, stop, digest, end = mm_hash
    if end == stop or end < behind:
        return mm_hash
    return start, stop, digest, stop


NO_MM_HASHES = MMHashes()


def read_mm_hashes(value: Iterable[tuple[int, int, bytes]], length: int) -> MMHashes:
    """Return the validated hashes of a prompt of `length` tokens. O(n log n)."""
    found = []
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(
            f"mm_hashes={arguments.shown(value)}: expected a list of (start, stop, hash)"
        )
    for item in value:
        if not isinstance(item, tuple | list) or len(item) != 3:
            raise TypeError(f"mm_hashes: {arguments.shown(item)} is not a (start, stop, hash)")
        start, stop, digest = item
        if not isinstance(digest, bytes) or not digest:
            raise TypeError(
                f"mm_hashes: {arguments.shown(item)} has no hash. Pass bytes, such as a SHA-256."
            )
        start = arguments.count("mm_hashes start", start)
        stop = arguments.count("mm_hashes stop", stop, at_least=start + 1, at_most=length)
        found.append((start, stop, digest, stop))
    return MMHashes(found)
