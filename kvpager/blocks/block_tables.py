"""The block tables' storage, used by `SequenceTable`.

Rows of different lengths share one array, so that memory follows the entries in use.

    starts   0  8  4        each row has its own span, a power of two of entries;
    spans    4  8  4        a row that outgrows its span moves to a longer one
    data     4 7 2 . | 7 . . . | 9 3 1 5 8 . . . | never used yet

In a rectangular table every row would be as wide as the longest. Here short rows stay short. A span
is at most twice as long as its row, or eight times after the row was shortened. The array is at
most four times as long as all spans together, plus 65,536 entries.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import numpy as np

from kvpager.errors import BrokenInvariant
from kvpager.plans import Int32, Int64

_SPAN_MIN = 4
_ENTRIES_MIN = 2**16  # an array this small is not worth shrinking


class Ragged:
    """Rows of int32. Entries that were never written hold `fill`."""

    def __init__(self, fill: int) -> None:
        self.data: Int32 = np.full(_SPAN_MIN, fill, np.int32)
        self.starts: Int64 = np.zeros(0, np.int64)
        self.spans: Int64 = np.zeros(0, np.int64)  # 0: the row has no entries
        # A memoryview reads one number in half the time that an array takes.
        self._starts_view, self._spans_view = self.starts.data, self.spans.data
        self._fill = fill
        self._free: dict[int, list[int]] = {}  # starts of free spans, by their length
        self._end = 0  # entries from here on are in no span
        self._num_spanned = 0  # entries in the spans of rows

    def __len__(self) -> int:
        return len(self.starts)

    def add_rows(self, count: int) -> None:
        """Add rows without entries. O(rows)."""
        starts, spans = (np.zeros(len(self) + count, np.int64) for _ in range(2))
        starts[: len(self)], spans[: len(self)] = self.starts, self.spans
        self.starts, self.spans = starts, spans
        self._starts_view, self._spans_view = starts.data, spans.data

    # ---------------------------------------------------------------- room

    def reserve(self, rows: Int64, counts: Int32 | Int64) -> None:
        """Make room for `counts` entries a row, or change nothing. Amortised O(new entries)."""
        is_short = self.spans[rows] < counts
        if not np.count_nonzero(is_short):
            return
        short = is_short.nonzero()[0]
        wanted = [(row, _span(count)) for row, count in
                  zip(rows[short].tolist(), counts[short].tolist(), strict=True)]  # fmt: skip
        fresh = Counter(span for _, span in wanted)
        missing = sum(
            max(number - len(self._free.get(span, ())), 0) * span for span, number in fresh.items()
        )
        if missing > len(self.data) - self._end:
            self._rebuild(sum(fresh.elements()))  # afterwards no span is free
        for row, span in wanted:
            self._move(row, span)

    def reserve_row(self, row: int, count: int) -> None:
        """As `reserve`, for one row."""
        if self._spans_view[row] < count:
            span = _span(count)
            if span > len(self.data) - self._end and not self._free.get(span):
                self._rebuild(span)
            self._move(row, span)

    def _move(self, row: int, span: int) -> None:
        old, size = self._starts_view[row], self._spans_view[row]
        if free := self._free.get(span):
            start = free.pop()
        else:
            start = self._end
            self._end = start + span
        if size:
            self.data[start : start + size] = self.data[old : old + size]
            self._free.setdefault(size, []).append(old)
        self.data[start + size : start + span] = self._fill
        self._starts_view[row], self._spans_view[row] = start, span
        self._num_spanned += span - size

    def trim(self, row: int, count: int) -> None:
        """Shrink a row's span to `count` entries if it is much larger. O(log span)."""
        before = span = self._spans_view[row]
        if span <= max(4 * count, 2 * _SPAN_MIN):
            return
        start, least = self._starts_view[row], _span(2 * count)
        while span > least:
            span //= 2
            self._free.setdefault(span, []).append(start + span)
        self._num_spanned -= before - span
        self._spans_view[row] = span
        self._shrink()

    def release(self, row: int) -> None:
        """Remove all entries of a row. Amortised O(1)."""
        span = self._spans_view[row]
        if span:
            self._free.setdefault(span, []).append(self._starts_view[row])
            self._num_spanned -= span
            self._spans_view[row] = 0
            self._shrink()

    def _shrink(self) -> None:
        if len(self.data) > 4 * self._num_spanned + _ENTRIES_MIN:
            with suppress(MemoryError):
                self._rebuild(0)

    def _rebuild(self, more: int) -> None:
        """Move all spans to a new array with room for `more` entries. O(entries)."""
        rows = self.spans.nonzero()[0]
        spans = self.spans[rows]
        starts = np.cumsum(spans) - spans
        data = np.empty(2 * (self._num_spanned + more) + 256, np.int32)
        for old, new, span in zip(
            self.starts[rows].tolist(), starts.tolist(), spans.tolist(), strict=True
        ):
            data[new : new + span] = self.data[old : old + span]
        self._free = {}
        self.data, self._end = data, self._num_spanned
        self.starts[rows] = starts

    # ---------------------------------------------------------------- reading and writing

    def row(self, row: int) -> Int32:
        """Return all entries of a row, a view that is valid until the next `reserve`. O(1)."""
        start = int(self.starts[row])
        return self.data[start : start + int(self.spans[row])]

    def part(self, row: int, first: int, end: int) -> Int32:
        """Return entries `first` to `end` of a row, as `row` does. O(1)."""
        start = self._starts_view[row]
        return self.data[start + first : start + end]

    def places(self, rows: Int64, counts: Int64) -> tuple[Int64, Int64]:
        """Return where in `data` the first `counts` entries of the rows are, and their columns."""
        columns = ranks(counts)
        return np.repeat(self.starts[rows], counts) + columns, columns

    def table(self, rows: Int64, width: int) -> Int32:
        """Return the rows as a table, `fill` behind their ends, a copy. O(rows * width)."""
        if not width:
            return np.empty((len(rows), 0), np.int32)
        starts, spans = self.starts[rows], self.spans[rows]
        span = int(spans.min(initial=width))
        if span < width and int(starts.max()) + width > len(self.data):
            return self._uneven_table(starts, spans, width)
        table = self._windows(width)[starts]
        while span < width:  # behind a short span are other rows' entries
            table[spans == span, span:] = self._fill
            span = max(2 * span, _SPAN_MIN)
        return table

    def _uneven_table(self, starts: Int64, spans: Int64, width: int) -> Int32:
        table = np.full((len(starts), width), self._fill, np.int32)
        for span in sorted({*spans.tolist()} - {0}):
            here, columns = spans == span, min(span, width)
            table[here, :columns] = self._windows(columns)[starts[here]]
        return table

    def _windows(self, width: int) -> Int32:
        """Return a view of `data` whose row i has the `width` entries from i on."""
        count = max(len(self.data) - width + 1, 0)
        return np.ndarray((count, width), np.int32, self.data, strides=(4, 4))

    def check(self, what: str, used: Int64) -> None:
        """Raise `BrokenInvariant` unless spans are disjoint and hold `used` entries. O(entries)."""
        owned = np.zeros(len(self.data), np.int64)
        for row in self.spans.nonzero()[0].tolist():
            owned[self.starts[row] : self.starts[row] + self.spans[row]] += 1
        if int(owned.sum()) != self._num_spanned or self._num_spanned != int(self.spans.sum()):
            raise BrokenInvariant(f"{what}: spans do not sum to {self._num_spanned} entries")
        for span, starts in self._free.items():
            for start in starts:
                owned[start : start + span] += 1
        if np.any(owned[: self._end] != 1) or np.any(owned[self._end :]):
            raise BrokenInvariant(f"{what}: an entry is in two spans, or in none")
        if np.any(self.spans < used):
            raise BrokenInvariant(f"{what}: a row is longer than its span")
        for row in self.spans.nonzero()[0].tolist():
            if np.any(self.row(row)[int(used[row]) :] != self._fill):
                raise BrokenInvariant(f"{what}: row {row} has an entry behind its end")


def ranks(counts: Int64) -> Int64:
    """Return each item's place in its own run: [2, 0, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def _span(count: int) -> int:
    return max(1 << (count - 1).bit_length(), _SPAN_MIN)
