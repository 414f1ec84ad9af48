"""Begin, fork and end sequences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.mm_hashes import NO_MM_HASHES, read_mm_hashes
from kvpager.blocks.radix import Match
from kvpager.blocks.sequences import Prompt, SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import NO_BLOCKS, NO_COPIES, Int32, Int64


class Allocation:
    """Looks prompts up; begins, forks and ends sequences. The caller holds the lock.

    Writes all columns of rows that begin or end, and the totals of prefix look-ups.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def begin(self, who: Prompt, length: int, ids: Int32 | None, reserve: int) -> SequenceHandle:
        """Begin a sequence of `length` tokens. O(tokens). Raises: `OutOfBlocks`."""
        state, match = self._state, _NO_MATCH
        if ids is not None:
            match = state.index.match(who.tree, ids[: max(length - 1, 0)], who.mm_hashes)
        num_fresh = -(-length // state.block_size) - len(match.blocks)
        owners = state.owners([who], [num_fresh])
        state.refuse(num_fresh, owners, match.blocks, reserve)
        handle = self._new_row(who, length, ids, match, owners)
        if ids is not None:
            row, shared = handle._row, match.blocks
            if len(shared):
                state.rows.nodes[row], state.rows.published[row] = match.node, len(shared)
                state.evictor.policy.touch(shared)
            self._count(length, handle.num_cached_tokens)
        return handle

    def _count(self, length: int, num_cached: int) -> None:
        totals = self._state.totals
        totals["total_prefix_queries"] += 1
        totals["total_prefix_hits"] += num_cached > 0
        totals["prefix_query_tokens"] += length
        totals["prefix_hit_tokens"] += num_cached

    def _new_row(
        self, who: Prompt, length: int, ids: Int32 | None, match: Match, owners: Int64 | None
    ) -> SequenceHandle:
        state, rows, shared = self._state, self._state.rows, match.blocks
        size = state.block_size
        num_cached = len(shared) * size + match.num_partial
        num_fresh = -(-length // size) - len(shared)
        state.reserve(len(shared) + num_fresh)
        row = rows.free_rows[-1]
        copies = np.array([[match.partial_block, -1]], np.int32) if match.num_partial else NO_COPIES
        handle = SequenceHandle(
            state, row, int(rows.generations[row]), num_cached, copies, state.fences.ticket(copies)
        )
        # Copies precede all writes. So without fences the source block may be evicted, and even
        # be taken for this sequence.
        keep = copies[:, 0] if handle.ticket else NO_BLOCKS
        fresh = state.take(
            num_fresh, owners, np.concatenate([shared, keep]) if len(keep) else shared
        )
        if len(shared):
            state.pool.share(shared)
        rows.free_rows.pop()
        rows.add(row, who, shared, fresh, length, num_cached, 0 if ids is None else length)
        if len(copies):
            copies[0, 1] = fresh[0]
            if copies[0, 0] == fresh[0]:
                handle.copies, handle.ticket = NO_COPIES, 0
            state.copied(handle.copies, handle.ticket)
        if ids is not None:
            state.pool.write_ids(fresh, ids[len(shared) * size :])
        return handle

    def find(self, who: Prompt, ids: Int32) -> tuple[int, Int32]:
        """Return the number of cached tokens that `ids` begin with, and their blocks. O(tokens)."""
        state = self._state
        _, blocks, partial_block, num_partial = state.index.match(who.tree, ids, who.mm_hashes)
        num_tokens = len(blocks) * state.block_size + num_partial
        return num_tokens, np.append(blocks, np.int32(partial_block)) if num_partial else blocks

    def fork(self, parent: int, times: int) -> list[SequenceHandle]:
        """Begin `times` sequences that share every block of `parent`. O(blocks) each."""
        state, rows = self._state, self._state.rows
        state.reserve(-(-rows.length(parent) // state.block_size), times)
        num_cached = int(rows.committed[parent])
        next_rows = rows.free_rows[: -times - 1 : -1]
        children = [
            SequenceHandle(state, row, int(rows.generations[row]), num_cached) for row in next_rows
        ]
        state.change.begin()
        for row in rows.rows_of(parent):
            state.pool.share(rows.device_blocks(row), times)
        for _ in children:
            rows.fork(parent)
        return children

    def end(self, sequences: list[int]) -> None:
        """Release the blocks of these sequences and end their handles. O(blocks)."""
        state, table = self._state, self._state.rows
        for first in sequences:
            for row in table.rows_of(first):
                state.release(table.device_blocks(row))
                if table.swapped[row]:
                    state.host.release(table.host_blocks(row))
            table.drop(first)


def identity(
    namespace: str | None,
    lora: str | None,
    mm_hashes: Iterable[tuple[int, int, bytes]],
    length: int,
) -> Prompt:
    """Return the validated key parts of a prompt of `length` tokens. O(mm_hashes)."""
    if namespace is None and lora is None and not mm_hashes:
        return _ANYBODY
    arguments.label("namespace", namespace)
    arguments.label("lora", lora)
    shown = read_mm_hashes(mm_hashes, length) if mm_hashes else NO_MM_HASHES
    return Prompt(namespace, lora, shown)


_NO_MATCH = Match(None, NO_BLOCKS)
_ANYBODY = Prompt()
