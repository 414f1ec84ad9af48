"""The laws of the control plane, recounted from the block tables.

Each part checks its own books - pool, rows, prefix trees - and what only shows when they are laid
side by side is checked here: who holds which block, and that the index offers what is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant
from kvpager.pool import BlockPool
from kvpager.prefix import PrefixIndex
from kvpager.sequences import SequenceTable


def check(device: BlockPool, host: BlockPool, rows: SequenceTable, index: PrefixIndex) -> None:
    """Raise `BrokenInvariant` that names the first broken law found. O(blocks + tokens)."""
    holders = np.zeros(device.num_blocks, np.int32)
    host_holders = np.zeros(host.num_blocks, np.int32)
    for row in rows.live_rows():
        _check_table(rows, row, index.block_size, device.num_blocks)
        _check_content(rows, row, index)
        holders[rows.device_blocks(row)] += 1
        away = _host_blocks(rows, row)
        np.add.at(host_holders, away[away >= 0], 1)
    rows.check()
    device.check("device", holders)
    host.check("host", host_holders)
    index.check(device.cached, device.refs)


def _host_blocks(rows: SequenceTable, row: int) -> NDArray[np.int32]:
    """A host block, or -1, for each block of the row."""
    return rows.host_blocks.get(row, np.full(int(rows.num_blocks[row]), -1, np.int32))


def _check_table(rows: SequenceTable, row: int, block_size: int, num_blocks: int) -> None:
    length, blocks = int(rows.lengths[row]), rows.blocks(row)
    if not 0 <= rows.committed[row] <= length:
        raise BrokenInvariant(f"sequence {row}: {rows.committed[row]} of {length} committed")
    if rows.num_blocks[row] != -(-length // block_size):
        raise BrokenInvariant(f"sequence {row}: {rows.num_blocks[row]} blocks for {length} tokens")
    if np.any(blocks >= num_blocks):
        raise BrokenInvariant(f"sequence {row}: its table names a block that does not exist")
    here, away = blocks >= 0, _host_blocks(rows, row) >= 0
    expected = np.arange(len(here)) >= rows.first_blocks[row]
    if len(away) != len(here) or np.any(here & away) or np.any((here | away) != expected):
        raise BrokenInvariant(f"sequence {row}: a block is missing, or stands in two tiers")
    if len(np.unique(blocks[here])) != np.count_nonzero(here):
        raise BrokenInvariant(f"sequence {row}: a block stands twice in its table")


def _check_content(rows: SequenceTable, row: int, index: PrefixIndex) -> None:
    content = rows.content(row)
    num_published = content.num_published * index.block_size
    if content.known > rows.lengths[row]:
        raise BrokenInvariant(f"sequence {row}: knows tokens that it does not have")
    if num_published > min(int(rows.committed[row]), content.known):
        raise BrokenInvariant(f"sequence {row}: published beyond what is committed and known")
    if content.node is None or not content.node.attached:
        return
    namespace, nodes = index.path(content.node)
    offered = np.concatenate([np.empty(0, np.int32), *(node.tokens for node in nodes)])
    if namespace != content.namespace or not np.array_equal(
        offered, content.tokens[:num_published]
    ):
        raise BrokenInvariant(f"sequence {row}: the index offers other tokens than it holds")
