"""The sequences of a `ReservedManager`, named by handles."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpager.blocks.sequences import Batch, Prompt, SequenceHandle
from kvpager.errors import StaleSequence, require
from kvpager.plans import NO_COPIES, Int32, Int64

NO_REGION = -1  # of a sequence without tokens
Named = SequenceHandle | Batch | list[SequenceHandle]


@dataclass(slots=True)
class ReservedSequence:
    """A sequence and its region.

    Its counts are ordered: committed <= length and known <= length.
    """

    prompt: Prompt
    region: int = NO_REGION
    length: int = 0
    known: int = 0  # leading tokens whose ids are known
    committed: int = 0


class ReservedSequences:
    """All live sequences. Numbers are reused; generations are never. The caller holds `lock`."""

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock
        self._items: list[ReservedSequence | None] = []
        self._generations: list[int] = []
        self._free: list[int] = []

    def live(self) -> list[ReservedSequence]:
        """Return all sequences. O(sequences)."""
        return [each for each in self._items if each is not None]

    def length(self, sequence: SequenceHandle) -> int:
        """Return the tokens in the sequence. O(1). Raises `StaleSequence`."""
        with self._lock:
            return self.find(sequence)[0].length

    def add(
        self, sequence: ReservedSequence, num_cached: int, copies: Int32 = NO_COPIES
    ) -> SequenceHandle:
        """Return the handle of a new sequence. O(1)."""
        if not self._free:
            self._free.append(len(self._items))
            self._items.append(None)
            self._generations.append(0)
        number = self._free.pop()
        self._items[number] = sequence
        return SequenceHandle(self, number, self._generations[number], num_cached, copies)

    def drop(self, named: Named) -> None:
        """Make the handles stale. O(n)."""
        for number in self._numbers(named):
            self._items[number] = None
            self._generations[number] += 1
            self._free.append(number)

    def batch(self, named: Named) -> Batch:
        """Return several handles as one argument. O(n). Raises: as `find`."""
        numbers = self._numbers(named)
        generations = [self._generations[number] for number in numbers]
        return Batch(self, np.array(numbers, np.int64), np.array(generations, np.int64), -1)

    def find(self, named: Named) -> list[ReservedSequence]:
        """Return the sequences of handles. O(n).

        Raises: `StaleSequence`, `ValueError` for a repeated handle, `TypeError` for other objects.
        """
        return [each for number in self._numbers(named) if (each := self._items[number])]

    def _numbers(self, named: Named) -> list[int]:
        if isinstance(named, Batch):
            pairs = zip(named.rows.tolist(), named.generations.tolist(), strict=True)
            handles = [SequenceHandle(named.owner, *pair) for pair in pairs]
        else:
            handles = [named] if isinstance(named, SequenceHandle) else named
        numbers = [self._number(handle) for handle in handles]
        if len(set(numbers)) < len(numbers):
            raise ValueError("sequences: one is repeated. Pass each sequence once.")
        return numbers

    def _number(self, handle: SequenceHandle) -> int:
        if not isinstance(handle, SequenceHandle):
            raise TypeError(f"expected a SequenceHandle, got {type(handle).__name__}")
        if handle._owner is not self:
            raise StaleSequence(f"{handle.name} belongs to another manager")
        if self._generations[handle._row] != handle._generation:
            raise StaleSequence(f"{handle.name} was freed")
        return handle._row

    # ---------------------------------------------------------------- all sequences

    def extents(self, num_regions: int) -> tuple[Int64, Int64]:
        """Return the tokens in each region, and how many of them are in several sequences.

        int64 [regions] each. O(sequences + regions).
        """
        first, second = np.zeros((2, num_regions), np.int64)  # the two longest sequences
        for each in self.live():
            if each.region != NO_REGION:
                longest = int(first[each.region])
                second[each.region] = max(int(second[each.region]), min(each.length, longest))
                first[each.region] = max(each.length, longest)
        return first, second

    def check(self, num_regions: int, num_tokens: int) -> Int64:
        """Return how many sequences have each region. O(sequences + regions).

        Raises: `BrokenInvariant` if counts of a sequence are not ordered, or it lacks a region.
        """
        live = self.live()
        for each in live:
            is_ordered = max(each.committed, each.known) <= each.length <= num_tokens
            require(is_ordered, f"{each}: its counts are not ordered")
            has_region = each.region != NO_REGION
            require(has_region == (each.length > 0), f"{each}: expected a region if it has tokens")
        used = [each.region for each in live if each.region != NO_REGION]
        return np.bincount(used, minlength=num_regions)
