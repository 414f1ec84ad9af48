"""The figures of one cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvpager.integrations.huggingface.cache.rows import Partition


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The current contents of one cache. A block counts once, however many rows share it.

    `num_tokens` is the number of columns of the batch, padding included. `dense_bytes` is what
    `DynamicCache` would hold for the paged layers. Apart from `num_layers`, the figures do not
    include layers that are not paged.
    """

    num_rows: int
    num_tokens: int
    num_layers: int
    num_paged_layers: int
    num_blocks: int
    num_shared_blocks: int  # held by several rows of the cache
    held_bytes: int
    dense_bytes: int
    num_host_blocks: int
    host_held_bytes: int


class Holding(NamedTuple):
    """The blocks of one pool that the rows of a group hold."""

    num_blocks: int
    num_shared_blocks: int  # held by several rows
    held_bytes: int
    on_host: bool

    @classmethod
    def of(cls, partition: Partition) -> Holding:
        """Count the blocks of the rows in one pool. O(blocks)."""
        tables = partition.pool.manager.block_tables(partition.batch)
        blocks, holders = np.unique(tables[tables >= 0], return_counts=True)
        num_bytes = len(blocks) * partition.pool.block_bytes
        return cls(len(blocks), int(np.count_nonzero(holders > 1)), num_bytes, partition.on_host)
