"""A contiguous copy of paged keys or values, for attention code that knows nothing of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels.arguments import require_device, require_dims, require_rows
from kvpager.kernels.backends import select


@torch.no_grad()
def gather_kv(cache: Tensor, block_tables: Tensor, kv_lens: Tensor, length: int) -> Tensor:
    """The last `length` tokens of every row: [rows, length, kv_heads, head_dim]. O(rows * length).

    - `cache` [blocks, block_size, kv_heads, head_dim]: one of the views of `BlockStorage.layer`.
    - `block_tables` int32 [rows, max_blocks], -1 where a row has no block.
    - `kv_lens` int32 or int64 [rows]: the tokens of each row, at most max_blocks * block_size.
    - `length`: tokens to return, at least 0.

    Rows are right-aligned, as left-padded batches are: the last column is each row's newest token.
    A row shorter than `length` is zero on its left, and so is a token whose block is -1; whatever
    lies in slots that no row uses never shows.

    `ValueError` and `TypeError` for wrong shapes, dtypes and devices; values are not looked at.
    """
    require_dims("cache", cache, "[blocks, block_size, kv_heads, head_dim]", 4)
    require_rows(block_tables, kv_lens)
    if length < 0:
        raise ValueError(f"length is {length}; pass 0 or more tokens")
    require_device(cache, block_tables=block_tables, kv_lens=kv_lens)
    gathered: Tensor = select("gather_kv", cache.device)(cache, block_tables, kv_lens, length)
    return gathered
