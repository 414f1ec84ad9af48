"""A contiguous copy of paged keys or values, for attention code that knows nothing of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import (
    require_contiguous_rows,
    require_device,
    require_dims,
    require_floating,
    require_rows,
    require_scales,
    require_tensors,
    without_gradients,
)
from kvpager.kernels.backends import select


@without_gradients
def gather_kv(
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    length: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The last `length` tokens of every row: [rows, length, kv_heads, head_dim]. O(rows * length).

    - `cache` [blocks, block_size, kv_heads, head_dim]: one of the views of `BlockStorage.layer`.
    - `block_tables` int32 [rows, max_blocks], -1 where a row has no block.
    - `seq_lens` int32 or int64 [rows]: the tokens of each row, at most max_blocks * block_size.
    - `length`: tokens to return, at least 0.
    - `scales` float32 [blocks, block_size, kv_heads]: for a quantised cache, the one of
      `BlockStorage.scales` that belongs to it.
    - `dtype` of the result: that of the cache unless given, needed with `scales`.

    Rows are right-aligned, as left-padded batches are: the last column is each row's newest token.
    A row shorter than `length` is zero on its left. A token whose block is -1 is zero, also in a
    cache of 0 blocks. Whatever lies in slots that no row uses never shows.

    `ValueError` and `TypeError` for wrong shapes, strides, dtypes and devices. Values are not
    looked at, but for negative lengths on a CPU; debug mode looks at all (`debug.py`).
    """
    require_tensors(cache=cache, block_tables=block_tables, seq_lens=seq_lens)
    require_dims("cache", cache, "[blocks, block_size, kv_heads, head_dim]", 4)
    require_contiguous_rows(cache=cache)
    require_scales("cache", cache, "scales", scales)
    require_rows(block_tables, seq_lens)
    if length < 0:
        raise ValueError(f"length is {length}; pass 0 or more tokens")
    if dtype is not None:
        require_floating("dtype", dtype)
    elif scales is not None:
        raise TypeError("dtype is None; with scales, pass that of the result: torch.bfloat16, ...")
    require_device(cache, block_tables=block_tables, seq_lens=seq_lens)
    if debug.enabled():
        debug.check_rows(block_tables, seq_lens, cache)
    gathered: Tensor = select("gather_kv", cache.device)(
        cache, block_tables, seq_lens, length, scales=scales, dtype=dtype
    )
    return gathered
