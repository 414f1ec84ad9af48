"""Work items: the part of a block table that each program of an attention kernel reads. NumPy only.

A work item is (queries, table row, kv start, kv stop): one program reads these kv tokens through
that row of the block tables, once, for all queries of the item. One mechanism then covers split-KV
(Flash-Decoding, Dao et al. 2023), query tiles of a prefill, and reading a prefix that several rows
share only once (Hydragen, Juravsky et al. 2024; cascade inference in FlashInfer, Ye et al. 2025):

    row 0   A B C │ D            A B C ── items for rows 0, 1 and 2 together
    row 1   A B C │ E F ─ G      E F   ── an item for rows 1 and 2
    row 2   A B C │ E F ─ H      D, G, H ── an item for each row alone, open at its end

The planner finds shared prefixes in the block tables. It sorts rows by their block ids, so that the
longest common prefixes of neighbours form a trie. Only full blocks count, because a block that is
still written belongs to one row. Forked rows need no other bookkeeping.

An item is an upper bound: the kernel clamps it to what its queries see, with the lengths on the
device. The last item of a decode row is open (`OPEN`), so a plan stays valid while rows grow.
`Planner` returns the same plan until rows fork, join, finish or outgrow it.

A query of several items has one partial result per item, and a merge combines them. The result of
a query with one item is final.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

OPEN = 2**31 - 1  # the kv stop of an item that ends where its row ends

# Cost of one more partial result per row, as the kv tokens read in the same time.
PARTIAL_COST_TOKENS = 32


class Tiling(NamedTuple):
    """Sizes of a program's work, and the number of items that fill the device."""

    block_size: int  # tokens per block
    few: int  # queries of an item in a small tile; always 1 in decode
    many: int  # queries of an item in a large tile, >= few
    align: int  # items start at a multiple of this many kv tokens, or at the end of a shared prefix
    items: int  # items that keep every multiprocessor busy
    chunk_min: int = 128  # kv tokens below which splitting a row gains nothing


@dataclass(frozen=True, slots=True, eq=False)
class WorkPlan:
    """Work items of one attention call, as int32 arrays ready for a device.

    - `items` [n, 5]: first member, members, table row, kv start, kv stop. The first `num_large`
      items have up to `many` queries, the others up to `few`; long items come first in each part.
    - `members`, `slots` [members]: a member's packed query, and the slot of its partial result;
      -1 if the query has a single part, which is its final result.
    - `merged` [m], `merge_starts` [m + 1]: queries with several parts, and their runs of slots.
    - `one_query`: every row has one query, so packed query and row have the same number.
    - `holes`: a block that a query may see is -1. Set only if `one_query` is False.
    """

    items: NDArray[np.int32]
    members: NDArray[np.int32]
    slots: NDArray[np.int32]
    merged: NDArray[np.int32]
    merge_starts: NDArray[np.int32]
    num_large: int
    one_query: bool
    holes: bool

    @property
    def num_slots(self) -> int:
        """Number of partial results. O(1)."""
        return int(self.merge_starts[-1])


class _Segments(NamedTuple):
    """Ranges of kv tokens [low, high) of table `row`, each read for `members` queries in order."""

    first: Ints
    members: Ints
    row: Ints
    low: Ints
    high: Ints
    open: NDArray[np.bool_]


class _Known(NamedTuple):
    """A plan with the inputs that must stay the same for it to hold."""

    plan: WorkPlan
    block_tables: NDArray[np.int32]
    seq_lens: Ints
    cu_seqlens_q: Ints | None  # None: every row has one query, and the fields below apply
    full: NDArray[np.bool_]  # [rows, blocks]: full blocks, fixed while a row grows
    shared: NDArray[np.bool_]  # [rows, blocks]: blocks that an item reads for several rows
    limits: Ints  # [rows]: above these lengths the work is out of balance


class Planner:
    """Plans attention, and caches plans while they hold.

    Args:
        causal, window: options of the attention.
        share: read shared prefixes once. False reads every row by itself.
        keep: number of cached plans, for callers that take turns.
    """

    def __init__(
        self,
        tiling: Tiling,
        causal: bool = True,
        window: int | None = None,
        *,
        share: bool = True,
        keep: int = 4,
    ) -> None:
        self._tiling = tiling
        self._causal = causal
        self._window = window
        self._share = share
        self._keep = keep
        self._known: list[_Known] = []

    def plan(
        self,
        block_tables: NDArray[np.int32],
        seq_lens: NDArray[np.integer],
        cu_seqlens_q: NDArray[np.integer] | None = None,
    ) -> WorkPlan:
        """Return the plan for block tables [rows, blocks]: the previous object while it holds.

        O(rows * blocks) plus sorting: about 20 us for 64 rows of 512 blocks if a cached plan holds,
        1 ms otherwise. Leave out `cu_seqlens_q` [rows + 1] if every row has one query. The planner
        copies the arrays and keeps no reference to them.
        """
        lens = seq_lens.astype(np.int64)
        starts = None if cu_seqlens_q is None else cu_seqlens_q.astype(np.int64)
        if starts is not None and bool((np.diff(starts) == 1).all()):
            starts = None
        for index, known in enumerate(self._known):
            if self._holds(known, block_tables, lens, starts):
                if index:
                    self._known.insert(0, self._known.pop(index))
                return known.plan
        if starts is None:
            known = self._decode(block_tables, lens)
        else:
            known = self._many(block_tables, lens, starts)
        self._known.insert(0, known)
        del self._known[self._keep :]
        return known.plan

    def _holds(
        self, known: _Known, block_tables: NDArray[np.int32], lens: Ints, starts: Ints | None
    ) -> bool:
        if len(lens) != len(known.seq_lens):
            return False
        if starts is not None or known.cu_seqlens_q is not None:
            return (
                np.array_equal(lens, known.seq_lens)
                and starts is not None
                and known.cu_seqlens_q is not None
                and np.array_equal(starts, known.cu_seqlens_q)
                and np.array_equal(block_tables, known.block_tables)
            )
        width = known.block_tables.shape[1]
        if block_tables.shape[1] < width or bool((lens > known.limits).any()):
            return False
        if bool((lens < known.seq_lens).any()):
            # A shared item would read past the row's end, a window before its first token.
            return False
        changed = block_tables[:, :width] != known.block_tables
        changed &= known.full
        if not changed.any():
            return True
        if self._window is None:
            return False
        # A row may free blocks behind its window, unless an item reads them for other rows too.
        behind = (lens - self._window) // self._tiling.block_size
        gone = (block_tables[:, :width] < 0) & (np.arange(width) < behind[:, None]) & ~known.shared
        return not bool((changed & ~gone).any())

    def _decode(self, block_tables: NDArray[np.int32], lens: Ints) -> _Known:
        lows = np.zeros_like(lens)
        if self._window is not None:
            lows = np.maximum(lens - self._window, 0)
        # The newest block is never shared, because its row still writes to it.
        full = np.maximum(lens - 1, 0) // self._tiling.block_size
        width = min(int(full.max(initial=0)), block_tables.shape[1])
        columns = np.arange(width)
        covered = columns < full[:, None]
        cropped = block_tables[:, :width].copy()
        order = np.arange(len(lens))
        common = np.zeros(max(0, len(lens) - 1), np.int64)
        if self._share and len(lens) > 1 and width:
            order, common = _common_prefixes(cropped, covered)
        segments, depths = _segments(order, common, lows, lens, self._tiling.block_size)
        plan, size = _work(segments, order, len(lens), self._tiling, one_query=True)
        shared = np.zeros_like(depths)
        shared[order] = depths
        last_starts = np.zeros_like(lens)
        open_items = plan.items[plan.items[:, 4] == OPEN]
        last_starts[plan.members[open_items[:, 0]]] = open_items[:, 3]
        # A last item may grow to twice its share before a new plan pays off.
        limits = np.maximum(last_starts + 2 * size, lens)
        shared_blocks = covered & (columns < shared[:, None])
        return _Known(plan, cropped, lens, None, covered, shared_blocks, limits)

    def _many(self, block_tables: NDArray[np.int32], lens: Ints, starts: Ints) -> _Known:
        tiling = self._tiling
        counts = np.diff(starts)
        row, tile = _ragged(-(-counts // tiling.many))
        first = starts[row] + tile * tiling.many
        count = np.minimum(tiling.many, starts[row + 1] - first)
        oldest = lens[row] - (starts[row + 1] - first)
        low = np.zeros_like(oldest)
        if self._window is not None:
            low = np.maximum(oldest - self._window + 1, 0)
        high = np.maximum(oldest + count if self._causal else lens[row], low)
        segments = _Segments(first, count, row, low, high, np.zeros(len(row), np.bool_))
        order = np.arange(int(starts[-1]))
        plan, _ = _work(segments, order, len(order), tiling, one_query=False)
        plan = _with_holes(plan, block_tables, tiling.block_size, lens)
        nothing = np.zeros((0, 0), np.bool_)
        return _Known(plan, block_tables.copy(), lens, starts, nothing, nothing, lens)


def _common_prefixes(
    block_tables: NDArray[np.int32], covered: NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """Return an order of rows that groups common prefixes, and the blocks that each row shares with
    the next."""
    rows = len(block_tables)
    # Uncovered blocks get a number of their own per row. -1 already means no block.
    keys = np.where(covered, block_tables, -2 - np.arange(rows, dtype=np.int32)[:, None])
    # Any total order will do; comparing bytes is fastest.
    names = [line.tobytes() for line in keys]
    order = np.array(sorted(range(rows), key=names.__getitem__), np.int64)
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    return order, np.where(same.all(1), keys.shape[1], same.argmin(1))


def _segments(
    order: Ints, common: Ints, lows: Ints, lens: Ints, block_size: int
) -> tuple[_Segments, Ints]:
    """Walk the trie from its root: return shared segments, then each row's own segment.

    Also returns the number of blocks that each row, in the order of `order`, shares with others.
    """
    found: list[tuple[int, int, int, int]] = []  # first, count, low, high
    depths = np.zeros(len(order), np.int64)
    floors = lows[order]
    groups = [(0, len(order), 0)] if len(order) else []
    while groups:
        first, stop, depth = groups.pop()
        count = stop - first
        if count == 1:
            depths[first] = depth
            continue
        inner = common[first : stop - 1]
        deepest = int(inner.min())
        low = max(depth * block_size, int(floors[first:stop].min()))
        saved = (deepest * block_size - low) * (count - 1)
        if saved >= count * PARTIAL_COST_TOKENS:
            found.append((first, count, low, deepest * block_size))
            depth = deepest
        # The rows part where they share no more than `deepest` blocks.
        cuts = [first, *(first + 1 + np.flatnonzero(inner == deepest)).tolist(), stop]
        groups.extend((a, b, depth) for a, b in pairwise(cuts))
    table = np.array(found, np.int64).reshape(-1, 4)
    alone = np.arange(len(order))
    segments = _Segments(
        first=np.concatenate((table[:, 0], alone)),
        members=np.concatenate((table[:, 1], np.ones_like(alone))),
        row=order[np.concatenate((table[:, 0], alone))],
        low=np.concatenate((table[:, 2], np.maximum(depths * block_size, floors))),
        high=np.concatenate((table[:, 3], lens[order])),
        open=np.arange(len(table) + len(alone)) >= len(table),
    )
    return segments, depths


def _work(
    segments: _Segments, order: Ints, num_queries: int, tiling: Tiling, *, one_query: bool
) -> tuple[WorkPlan, int]:
    """Cut segments into items of about equal length; return the plan and that length."""
    # Kernels have a leaner program for the common case, a single decode row.
    few = 1 if one_query else tiling.few
    large = segments.members > few
    tile = np.where(large, tiling.many, few)
    tiles = -(-segments.members // tile)
    # Round down to the start of a block at most: earlier tokens may belong to another segment.
    low = segments.low - segments.low % gcd(tiling.align, tiling.block_size)
    length = np.maximum(segments.high - low, 0)
    share = -(-int((length * tiles).sum()) // tiling.items // tiling.align) * tiling.align
    size = max(share, tiling.chunk_min)
    pieces = np.maximum(-(-length // size), 1)
    each = np.maximum(-(-length // pieces // tiling.align) * tiling.align, tiling.align)
    pieces = np.maximum(-(-length // each), 1)
    # Tiles of one piece are neighbours, so they read the same tokens at about the same time.
    segment, index = _ragged(pieces * tiles)
    piece, tile_index = index // tiles[segment], index % tiles[segment]
    start = low[segment] + piece * each[segment]
    stop = np.minimum(start + each[segment], segments.high[segment])
    longest_first = np.lexsort((start - stop, ~large[segment]))
    last = segments.open[segment] & (piece == pieces[segment] - 1)
    offset = tile_index * tile[segment]
    count = np.minimum(tile[segment], segments.members[segment] - offset)
    stop = np.where(last, OPEN, np.maximum(stop, start))
    first = segments.first[segment] + offset
    items = np.stack((first, count, segments.row[segment], start, stop), axis=1)[longest_first]
    plan = _with_slots(items, order, num_queries, int(large[segment].sum()), one_query)
    return plan, size


def _with_slots(
    items: Ints, order: Ints, num_queries: int, num_large: int, one_query: bool
) -> WorkPlan:
    """Replace ranges of `order` by members, and give each query with several parts its slots."""
    item, index = _ragged(items[:, 1])
    queries = order[items[item, 0] + index]
    items[:, 0] = np.cumsum(items[:, 1]) - items[:, 1]
    parts = np.bincount(queries, minlength=num_queries)
    several = parts > 1
    # The slots of a query are consecutive, so that the merge reads one run of memory.
    by_query = np.argsort(queries, kind="stable")
    by_query = by_query[several[queries[by_query]]]
    slots = np.full(len(queries), -1, np.int32)
    slots[by_query] = np.arange(len(by_query))
    merged = np.flatnonzero(several)
    return WorkPlan(
        items=items.astype(np.int32),
        members=queries.astype(np.int32),
        slots=slots,
        merged=merged.astype(np.int32),
        merge_starts=np.concatenate(([0], np.cumsum(parts[merged]))).astype(np.int32),
        num_large=num_large,
        one_query=one_query,
        holes=False,
    )


def _with_holes(
    plan: WorkPlan, block_tables: NDArray[np.int32], block_size: int, lens: Ints
) -> WorkPlan:
    """Return the plan with `holes` set if an item reads a missing block."""
    columns = block_tables.shape[1]
    missing = np.zeros((len(block_tables), columns + 1), np.int64)
    np.cumsum((block_tables < 0), axis=1, out=missing[:, 1:])
    row = plan.items[:, 2]
    stop = np.minimum(plan.items[:, 4], lens[row])
    first = np.minimum(plan.items[:, 3] // block_size, columns)
    last = np.clip(-(-stop // block_size), first, columns)
    holes = bool((missing[row, last] > missing[row, first]).any())
    return replace(plan, holes=holes)


def _ragged(counts: Ints) -> tuple[Ints, Ints]:
    """Return owners and indices: for counts (2, 0, 3), 0 0 2 2 2 and 0 1 0 1 2."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
