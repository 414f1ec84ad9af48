"""The invariants of the control plane, recounted from the block tables.

Pool, rows, prefix trees and fences check their own arrays. This module checks them against each
other: the holders of each block, and published blocks against the index.
"""

from __future__ import annotations

import numpy as np

from kvpager.blocks.state import BlockState
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
        if not rows.keyed[row]:
            _check_published(state, row)
    state.accounts.check(device, state.owned())
    state.evictor.check_queues(state.accounts.is_known_open)


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
