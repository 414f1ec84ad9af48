"""The invariants of the control plane, recounted from the block tables.

Pool, rows, prefix trees and fences check their own arrays. This module checks them against each
other: the holders of each block, and published blocks against the index.
"""

from __future__ import annotations

import numpy as np

from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_needed
from kvpager.errors import BrokenInvariant


def check(state: BlockState) -> None:
    """Raise `BrokenInvariant` for the first broken invariant found. O(blocks + tokens)."""
    device, host, rows = state.pool, state.host, state.rows
    rows.check()
    holders = np.zeros(device.num_blocks, np.int32)
    host_holders = np.zeros(host.num_blocks, np.int32)
    for row in rows.live_rows():
        for pool, count, blocks in (
            (device, holders, rows.device_blocks(row)),
            (host, host_holders, rows.host_blocks(row)),
        ):
            if np.any(blocks >= pool.num_blocks):
                raise BrokenInvariant(f"sequence {row}: its table names a block outside the pool")
            if len(np.unique(blocks)) != len(blocks):
                raise BrokenInvariant(f"sequence {row}: a block stands twice in its table")
            count[blocks] += 1
    device.check("device", holders)
    host.check("host", host_holders)
    state.fences.check()
    state.index.check()
    for row in rows.live_rows():
        if not rows.is_keyed(row):
            _check_published(state, row)
    if state.axes:
        _check_groups(state)
    state.accounts.check(device, state.owned())
    state.evictor.check(state.accounts.is_known_open)


def _check_groups(state: BlockState) -> None:
    """Raise `BrokenInvariant` unless the rows of each sequence agree. O(rows)."""
    table, size = state.rows, state.block_size
    for first in table.live_rows()[:: table.num_groups]:
        rows = np.array(table.rows_of(first))
        length, room, waiting = table.length(first), table.lengths[rows], table.waiting[rows]
        if np.any(room + waiting != length) or np.any(waiting < 0):
            raise BrokenInvariant(f"sequence {first}: slots for {room} tokens, {length} tokens")
        if np.any((waiting > 0) & (room % size > 0)):
            raise BrokenInvariant(f"sequence {first}: its slots {room} end within a block")
        if bool(waiting.any()) != (first in table.waiting_ids):
            raise BrokenInvariant(f"sequence {first}: {waiting} tokens wait, others than its ids")
        if len(table.digests.get(first, ())) * size > length:
            raise BrokenInvariant(f"sequence {first}: a digest stands for no tokens")
        if len(np.unique(table.swapped[rows])) > 1:
            raise BrokenInvariant(f"sequence {first}: swapped in some groups only")
        for group, (row, window) in enumerate(zip(rows.tolist(), state.windows, strict=True)):
            if table.prompt(row).group != group:
                raise BrokenInvariant(f"sequence {first}: row {row} is of another group")
            if table.first_blocks[row] > first_needed(int(table.committed[row]), window, size):
                raise BrokenInvariant(f"sequence {first}: a block within its window is gone")


def _check_published(state: BlockState, row: int) -> None:
    """Raise `BrokenInvariant` unless the row's published blocks equal the index's. O(blocks)."""
    rows, forest, device = state.rows, state.forest, state.pool
    position = int(rows.published[row])
    node = forest.locate(rows.nodes[row], position) if position else None
    if node is None:
        if position and not rows.duplicates[row]:
            raise BrokenInvariant(f"sequence {row}: the index lost blocks that it holds")
        return
    if node.tree != rows.prompt(row).tree:
        raise BrokenInvariant(f"sequence {row}: published in the tree of {node.tree!r}")
    published = forest.path(node, position)
    own = rows.blocks(row)[:position]
    here = own >= 0
    if not rows.duplicates[row] and np.any(own[here] != published[here]):
        raise BrokenInvariant(f"sequence {row}: the index has a duplicate of its blocks")
    if not np.array_equal(device.ids[own[here]], device.ids[published[here]]):
        raise BrokenInvariant(f"sequence {row}: the index has other tokens than its blocks")
