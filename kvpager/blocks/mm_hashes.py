"""Images, embeddings and the like that stand behind placeholder tokens of a prompt.

Two prompts share a block only where the same contents stand behind it. A block's *tag* lists the
contents that it overlaps; consecutive blocks with equal tags are one stretch.

    tokens    t t t t | i i i i | i i t t | t t j j |        blocks of four tokens
    tag       None      (i,)      (i,)      (j,)             three stretches
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from kvpager import _validate as arguments

# A content: its first token, the one after its last, its digest, and its end. The end is less
# than the token after the last where a sequence was cut short inside the content.
Content = tuple[int, int, bytes, int]
Tag = tuple[Content, ...] | None  # what a run's blocks overlap, the same for all of them

OVERLAP_MAX = 64  # contents behind one token; a bound keeps a prompt's tags O(tokens) in size


class Contents:
    """The contents of one prompt, by their first tokens."""

    __slots__ = ("_ends_max", "_starts", "items")

    def __init__(self, items: Iterable[Content] = ()) -> None:
        """O(n log n). Raises: `ValueError` where too many stand behind one token."""
        self.items = tuple(sorted(items))
        self._starts = [start for start, _, _, _ in self.items]
        # The furthest end among a content and those before it.
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
                    f"contents: more than {OVERLAP_MAX} stand behind token {start}. "
                    "Join those that overlap into one, with one digest."
                )

    def up_to(self, length: int) -> Contents:
        """Return the same without what lies behind token `length`. O(1) if nothing does."""
        if not self.items or self._ends_max[-1] <= length:
            return self
        return Contents((*c[:3], min(c[3], length)) for c in self.items if c[0] < length)

    def stretches(self, block_size: int, first: int, end: int) -> list[tuple[int, Tag]]:
        """Return blocks `first` to `end` as (end of stretch, tag). O(contents in reach)."""
        if not self.items:
            return [(end, None)]
        found: list[tuple[int, Tag]] = []
        for stop, tag in self._sweep(block_size, first, end):
            if found and found[-1][1] == tag:
                found.pop()
            found.append((stop, tag))
        return found or [(end, None)]

    def tag(self, block_size: int, block: int) -> Tag:
        """Return one block's tag. O(contents in reach)."""
        return self.stretches(block_size, block, block + 1)[0][1]

    def _sweep(self, size: int, block: int, end: int) -> Iterator[tuple[int, Tag]]:
        """Go from block to block at which a content begins or ends."""
        items, starts = self.items, self._starts
        at = bisect_left(starts, block * size)
        here = list(items[bisect_right(self._ends_max, block * size) : at])
        while block < end:
            begin, behind = block * size, (block + 1) * size
            here = [content for content in here if content[3] > begin]
            while at < len(items) and starts[at] < behind:
                if items[at][3] > begin:
                    here.append(items[at])
                at += 1
            stop = min(end, starts[at] // size) if at < len(items) else end
            for _, last, _, cut in here:
                # The block in which a content was cut short has a tag of its own.
                change = cut // size if cut < last else -(-cut // size)
                stop = min(stop, change if change > block else -(-cut // size))
            yield stop, tuple(_clipped(content, behind) for content in here) or None
            block = stop


def _clipped(content: Content, behind: int) -> Content:
    start, stop, digest, end = content
    if end == stop or end < behind:
        return content
    return start, stop, digest, stop


NO_CONTENTS = Contents()


def read_contents(value: Iterable[tuple[int, int, bytes]], length: int) -> Contents:
    """Return what stands behind a prompt's placeholders. O(contents)."""
    found = []
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(
            f"contents {arguments.shown(value)}: expected a list of (start, stop, digest)"
        )
    for item in value:
        if not isinstance(item, tuple | list) or len(item) != 3:
            raise TypeError(f"content {arguments.shown(item)}: expected (start, stop, digest)")
        start, stop, digest = item
        if not isinstance(digest, bytes) or not digest:
            raise TypeError(
                f"content {arguments.shown(item)}: expected bytes that stand for it, "
                "such as a SHA-256"
            )
        start = arguments.count("content's first token", start)
        stop = arguments.count("content's end", stop, at_least=start + 1, at_most=length)
        found.append((start, stop, digest, stop))
    return Contents(found)
