"""What one cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvpager.integrations.huggingface.cache.rows import Partition


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What one cache holds now. Blocks count once, whichever rows of the cache share them.

    `num_tokens` are columns of the batch, padding included. `dense_bytes` are the bytes that
    `DynamicCache` would hold in place of the paged layers; layers that are not paged are in none
    of the figures.
    """

    num_rows: int
    num_tokens: int
    num_layers: int
    num_paged_layers: int
    num_blocks: int
    num_shared_blocks: int  # held by more than one row of the cache
    held_bytes: int
    dense_bytes: int
    num_host_blocks: int
    host_held_bytes: int


class Holding(NamedTuple):
    """Blocks of one pool that the rows of a group hold."""

    num_blocks: int
    num_shared_blocks: int  # in the tables of several rows
    held_bytes: int
    on_host: bool

    @classmethod
    def of(cls, partition: Partition) -> Holding:
        """Count the blocks of rows that are in one pool. O(blocks)."""
        tables = partition.pool.manager.block_tables(partition.batch)
        blocks, holders = np.unique(tables[tables >= 0], return_counts=True)
        num_bytes = len(blocks) * partition.pool.block_bytes
        return cls(len(blocks), int(np.count_nonzero(holders > 1)), num_bytes, partition.on_host)
