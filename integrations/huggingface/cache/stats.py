"""What one cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


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
