"""The block manager of mode "reserved": a region of the maximum length for each sequence.

Servers managed KV memory like this before paging. Requests that share a prefix, and the samples of
a request, each have their own region:

    manager = ReservedManager(num_rows=8, max_length=2048)
    seq = manager.allocate(prompt_ids)      # takes a region; seq.copies: blocks of a cached prefix
    step = manager.append(seq, 1)           # takes another region only after a fork

A fork shares the region of its parent until one of the two grows: that one is copied to another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._atomic import Change
from kvpager._text import counted
from kvpager.blocks.allocation import identity
from kvpager.blocks.sequences import Batch, SequenceHandle, Target, listed
from kvpager.blocks.stats import Stats, Withheld
from kvpager.errors import OutOfBlocks
from kvpager.modes.regions import Regions
from kvpager.modes.reserved_sequences import NO_REGION, ReservedSequence, ReservedSequences
from kvpager.plans import NO_BLOCKS, NO_COPIES, AppendPlan, CopyPlan, Int32, Int64, Tier


class _Copies(NamedTuple):
    is_fenced: bool = False


class _NoQuotas:
    """The quotas of a manager that has none."""

    def ceiling(self, namespace: str | None) -> int | None:
        return None

    def set(self, namespace: str | None, *, ceiling: int | None = None) -> None:
        raise ValueError(
            f'ceiling={ceiling}: mode="reserved" has no quotas. Take mode="paged", or lower '
            "max_num_seqs."
        )

    def drop(self, namespace: str | None) -> None:
        """Do nothing."""


class _Bounds:
    """Bounds on the blocks of a sequence: always a whole region."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return self._num_blocks if num_tokens > 0 else 0

    def withheld(
        self, prompt: ArrayLike | None, namespace: str | None, lora: str | None
    ) -> Withheld:
        return Withheld()


class ReservedManager:
    """A `CacheManager` that reserves a region of consecutive blocks for each sequence. Thread-safe.

    Region r has the blocks from `r * region_blocks` on: row r of `BlockStorage.open_rows`. The
    methods are those of `BlockManager`, with these differences:

    - `allocate` copies the longest cached prefix of another region instead of sharing it. Prompts
      with `mm_hashes` reuse nothing.
    - `append` copies a sequence that shares its region with a fork to another region.
    - Both raise `OutOfBlocks` if no region is free, and for more than `max_length` tokens.
    - The unused blocks of regions count towards `reserve`: sequences grow into them.
    - There are no host blocks, quotas or speculative tokens.
    - In `Stats`, the unused blocks of regions are `num_kept`.

    Args:
        num_rows: the number of regions.
        max_length: maximum tokens of a sequence, rounded up to whole blocks.
        block_size: token slots of a block, a power of two.
    """

    def __init__(self, num_rows: int, max_length: int, block_size: int = 16) -> None:
        num_rows = arguments.count("num_rows", num_rows, at_least=1)
        max_length = arguments.count("max_length", max_length, at_least=1)
        self.block_size = arguments.block_size(block_size)
        self.region_blocks = -(-max_length // block_size)
        self.num_blocks = num_rows * self.region_blocks
        self.num_host_blocks = 0
        # A region acts as a window. A scheduler shares no blocks behind a window, so it expects
        # each sample to take its own region.
        self.windows: tuple[int | None, ...] = (self.region_blocks * block_size,)
        self.quotas, self.copies = _NoQuotas(), _Copies()
        self.queries = _Bounds(self.region_blocks)
        self._regions = Regions(num_rows, self.region_blocks, block_size)
        self._totals = dict.fromkeys(
            ("total_copied", "total_prefix_queries", "total_prefix_hits", "prefix_query_tokens",
             "prefix_hit_tokens"), 0,
        )  # fmt: skip
        self._lock: AbstractContextManager[Any] = threading.RLock()
        self._sequences = ReservedSequences(self._lock)
        self._change = Change(self)

    def __repr__(self) -> str:
        with self._lock:
            regions = self._regions
            return (
                f"<ReservedManager: {len(regions) - regions.num_free} held, {regions.num_free} "
                f"free of {counted(len(regions), 'region')} of {regions.num_tokens} tokens>"
            )

    # ---------------------------------------------------------------- the verbs

    def allocate(
        self,
        prompt: int | ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
        reserve: int = 0,
    ) -> SequenceHandle:
        """Begin a sequence of `prompt` tokens. O(regions * tokens).

        Raises: as `BlockManager.allocate`.
        """
        length, ids = arguments.prompt(prompt)
        who = identity(namespace, lora, mm_hashes, length)
        reserve = arguments.count("reserve", reserve)
        with self._lock, self._change:
            regions, source, num_cached = self._regions, NO_REGION, 0
            num_new = int(length > 0)
            num_taken = (len(regions) - regions.num_free + num_new) * self.region_blocks
            num_spare = num_taken - self.num_held_blocks - self._num_blocks(length)
            regions.refuse(num_new, length, max(reserve - num_spare, 0))
            if ids is not None:
                source, num_cached = regions.match(who, ids[: max(length - 1, 0)])
            self._change.begin()
            known = 0 if ids is None else length
            sequence = ReservedSequence(who, length=length, known=known, committed=num_cached)
            copies = NO_COPIES
            if length:
                known_ids = NO_BLOCKS if ids is None else ids
                sequence.region, copies = regions.begin(known_ids, source, num_cached)
            if ids is not None:
                self._count_query(length, num_cached)
            self._totals["total_copied"] += len(copies)
            return self._sequences.add(sequence, num_cached, copies)

    def match_prefix(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> int:
        """Return how many leading tokens need no computing. O(regions * tokens)."""
        ids = arguments.token_ids(prompt)
        who = identity(namespace, lora, mm_hashes, len(ids))
        with self._lock:
            return self._regions.match(who, ids)[1]

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...
    def fork(
        self, sequence: SequenceHandle, count: int | None = None
    ) -> SequenceHandle | list[SequenceHandle]:
        """Return a new sequence, or `count`, that shares the region until one grows. O(1) each.

        Raises: `StaleSequence`.
        """
        times = 1 if count is None else arguments.count("count", count, at_least=1, at_most=2**16)
        with self._lock, self._change:
            parent = self._sequences.find(sequence)[0]
            self._change.begin()
            if parent.region != NO_REGION:
                self._regions.share(parent.region, times)
            children = [
                self._sequences.add(replace(parent), parent.committed) for _ in range(times)
            ]
        return children[0] if count is None else children

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
        speculative: bool = False,
    ) -> AppendPlan:
        """Make room for further tokens. O(tokens), and O(blocks) for each copied sequence.

        Raises: as `BlockManager.append`; `ValueError` for speculative tokens.
        """
        named = listed(sequences)
        num_named = None if isinstance(named, SequenceHandle) else len(named)
        num_new, ids = arguments.new_tokens(num_named, tokens, counts)
        if arguments.flag("speculative", speculative):
            raise ValueError('speculative=True: mode="reserved" has none. Take mode="paged".')
        with self._lock, self._change:
            found = self._sequences.find(named)
            each = np.broadcast_to(num_new, len(found)).tolist()
            is_leaving = self._leaving(found, each)
            self._regions.refuse(sum(is_leaving))
            self._change.begin()
            slots, copies, start = [], [NO_COPIES], 0
            for sequence, count, leaves in zip(found, each, is_leaving, strict=True):
                if leaves:
                    copies.append(self._move(sequence))
                if count:
                    own = None if ids is None else ids[start : start + count]
                    slots.append(self._extend(sequence, count, own))
                start += count
            pairs = np.concatenate(copies)
            self._totals["total_copied"] += len(pairs)
            return AppendPlan(np.concatenate([np.empty(0, np.int64), *slots]), pairs)

    def _leaving(self, sequences: list[ReservedSequence], counts: list[int]) -> list[bool]:
        """Return which sequences need another region. Raises `OutOfBlocks` if one is too long.

        The last sequence of those that share a region keeps it.
        """
        sharing: dict[int, int] = {}
        leaving = []
        for sequence, count in zip(sequences, counts, strict=True):
            self._regions.refuse(0, sequence.length + count)
            region = sequence.region
            num_left = (
                2 if region == NO_REGION else sharing.get(region, self._regions.holders[region])
            )
            leaves = count > 0 and num_left > 1
            if region != NO_REGION:
                sharing[region] = int(num_left) - leaves
            leaving.append(leaves)
        return leaving

    def _move(self, sequence: ReservedSequence) -> Int32:
        """Give a sequence another region; return the blocks to copy."""
        regions = self._regions
        if sequence.region == NO_REGION:
            sequence.region, copies = regions.begin(NO_BLOCKS, NO_REGION, 0)
        else:
            sequence.region, copies = regions.leave(sequence.region, sequence.length)
        return copies

    def _extend(self, sequence: ReservedSequence, count: int, ids: Int32 | None) -> Int64:
        start, region = sequence.length, sequence.region
        self._regions.write(region, start, NO_BLOCKS if ids is None else ids)
        sequence.length += count
        if ids is not None and sequence.known == start:
            sequence.known += count
        return self._regions.slots(region, start, sequence.length)

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Record that the KV of the first `length` tokens (default: all) is written. O(n).

        Raises: `StaleSequence`; `ValueError` if the sequence is shorter.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        with self._lock, self._change:
            found = self._sequences.find(named)
            for sequence in found:
                arguments.within_one("length", length, sequence.length)
            self._change.begin()
            for sequence in found:
                self._commit(sequence, sequence.length if length is None else length)

    def _commit(self, sequence: ReservedSequence, length: int) -> None:
        sequence.committed = max(sequence.committed, length)
        if sequence.region != NO_REGION:
            reusable = min(sequence.committed, sequence.known)
            self._regions.publish(sequence.region, sequence.prompt, reusable)

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """Free sequences. A region keeps its KV until another sequence takes it. O(n).

        Raises: `StaleSequence`.
        """
        named = listed(sequences)
        arguments.flag("publish", publish)
        with self._lock, self._change:
            found = self._sequences.find(named)
            self._change.begin()
            for sequence in found:
                if publish:
                    self._commit(sequence, sequence.length)
                self._release(sequence)
            self._sequences.drop(named)

    def _release(self, sequence: ReservedSequence) -> None:
        if sequence.region != NO_REGION:
            self._regions.release(sequence.region)
            sequence.region = NO_REGION

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(1). Raises: as `commit`."""
        length = arguments.count("length", length)
        with self._lock, self._change:
            found = self._sequences.find(sequence)[0]
            arguments.within_one("length", length, found.length)
            self._change.begin()
            found.length = length
            found.known, found.committed = min(found.known, length), min(found.committed, length)
            found.prompt = found.prompt.up_to(length)
            if not length:
                self._release(found)

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, reserve: int = 0
    ) -> CopyPlan:
        """Raise `OutOfBlocks`, since there are no host blocks. To the device, move nothing. O(n).

        Also raises: `StaleSequence`; `TypeError`, `ValueError` for invalid arguments.
        """
        arguments.swap(to, at_most, reserve)
        named = listed(sequences)
        with self._lock:
            found = self._sequences.find(named)
            if to == "host" and found:
                need = max(sum(self._num_blocks(each.length) for each in found), 1)
                raise OutOfBlocks(need, 0, 0, 0, "host", 'mode="reserved" has no host tier')
            return CopyPlan(NO_COPIES, "host" if to == "device" else "device", to)

    def clear_prefix_cache(self) -> int:
        """Forget the KV of regions without a sequence; return their blocks. O(regions)."""
        with self._lock, self._change:
            self._change.begin()
            return self._regions.clear() * self.region_blocks

    # ---------------------------------------------------------------- handles and tables

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return several handles as one argument. O(n). Raises: as `BlockManager.batch`."""
        named = listed(sequences)
        with self._lock:
            return self._sequences.batch(named)

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        named = listed(sequences)
        with self._lock:
            return np.array([each.length for each in self._sequences.find(named)], np.int64)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return block tables, int32 [n, most blocks]. O(n * blocks). Raises `StaleSequence`."""
        named = listed(sequences)
        padding = arguments.count("padding", padding, at_least=-arguments.COUNT_MAX)
        with self._lock:
            found = self._sequences.find(named)
            counts = np.array([self._num_blocks(each.length) for each in found], np.int32)
            firsts = np.array([each.region for each in found], np.int32) * self.region_blocks
            columns = np.arange(counts.max(initial=0), dtype=np.int32)
            tables = np.where(columns < counts[:, None], firsts[:, None] + columns, padding)
            return tables.astype(np.int32)

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return `block_tables` and `lengths`, read at one moment. O(n * blocks)."""
        named = listed(sequences)
        with self._lock:
            return self.block_tables(named), self.lengths(named)

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return the slots of tokens `start` to `stop`, int64 [tokens]. O(tokens).

        Raises: `StaleSequence`; `ValueError` for tokens beyond the end.
        """
        start = arguments.count("start", start)
        with self._lock:
            found = self._sequences.find(sequence)[0]
            end = found.length if stop is None else arguments.count("stop", stop)
            arguments.within_one("stop", end, found.length)
            if start > end:
                raise ValueError(f"start={start}: expected 0 <= start <= stop = {end}")
            return self._regions.slots(max(found.region, 0), start, end)

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the same as `slots`. O(tokens)."""
        return self.slots(sequence, start, stop)

    # ---------------------------------------------------------------- the pool

    @property
    def num_free_blocks(self) -> int:
        """Blocks of free regions whose KV no prompt can reuse. O(regions)."""
        with self._lock:
            return (self._regions.num_free - self._regions.num_cached) * self.region_blocks

    @property
    def num_held_blocks(self) -> int:
        """Blocks that sequences use; a shared block counts once. O(sequences + regions)."""
        with self._lock:
            return int(self._num_blocks(self._sequences.extents(len(self._regions))[0]).sum())

    def stats(self) -> Stats:
        """Return current counts, and totals since the manager began. O(regions + sequences)."""
        with self._lock:
            regions, size = self._regions, self.region_blocks
            tokens, shared = self._sequences.extents(len(regions))
            num_held, num_cached = int(self._num_blocks(tokens).sum()), regions.num_cached * size
            return Stats(
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                num_free=regions.num_free * size - num_cached,
                num_held=num_held,
                num_cached=num_cached,
                num_kept=(len(regions) - regions.num_free) * size - num_held,
                num_never_used=regions.num_never_used * size,
                num_shared=int(self._num_blocks(shared).sum()),
                num_host_blocks=0,
                num_host_free=0,
                num_sequences=len(self._sequences.live()),
                num_swapped=0,
                num_tokens=int(tokens.sum()),
                total_evicted=regions.num_evicted * size,
                total_swapped_out=0,
                total_swapped_in=0,
                **self._totals,
            )

    def check(self) -> None:
        """Raise `BrokenInvariant` if an invariant is broken: a bug. O(regions + sequences)."""
        with self._lock:
            regions = self._regions
            regions.check(self._sequences.check(len(regions), regions.num_tokens))

    def _count_query(self, length: int, num_cached: int) -> None:
        totals = self._totals
        totals["total_prefix_queries"] += 1
        totals["total_prefix_hits"] += num_cached > 0
        totals["prefix_query_tokens"] += length
        totals["prefix_hit_tokens"] += num_cached

    @overload
    def _num_blocks(self, length: int) -> int: ...
    @overload
    def _num_blocks(self, length: Int64) -> Int64: ...
    def _num_blocks(self, length: int | Int64) -> int | Int64:
        return -(-length // self.block_size)
