"""Gather paged keys or values into a contiguous tensor, for attention without block tables."""

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
    """Return each row's last `length` tokens: [rows, length, kv_heads, head_dim]. O(rows * length).

    - `cache` [blocks, block_size, kv_heads, head_dim]: one of the views of `BlockStorage.layer`.
    - `block_tables` int32 [rows, max_blocks], -1 where a row has no block.
    - `seq_lens` int32 or int64 [rows]: tokens of each row, at most max_blocks * block_size.
    - `length`: tokens to return, at least 0.
    - `scales` float32 [blocks, block_size, kv_heads]: the scales of a quantised cache, from
      `BlockStorage.scales`.
    - `dtype`: dtype of the result, by default that of the cache. Required with `scales`.

    Rows are right-aligned, like left-padded batches: the last column is each row's newest token.
    A row shorter than `length` has zeros on the left. A token whose block is -1 is zero, also in a
    cache of 0 blocks. Slots that no row uses never reach the result.

    Raises: `ValueError`, `TypeError` for wrong shapes, strides, dtypes or devices. The CPU kernels
    check lengths, and the native one block ids. Debug mode (`debug.py`) checks both everywhere.
    """
    require_tensors(cache=cache, block_tables=block_tables, seq_lens=seq_lens)
    require_dims("cache", cache, "[blocks, block_size, kv_heads, head_dim]", 4)
    require_contiguous_rows(cache=cache)
    require_scales("cache", cache, "scales", scales)
    require_rows(block_tables, seq_lens)
    if length < 0:
        raise ValueError(f"length={length}: expected at least 0")
    if dtype is not None:
        require_floating("dtype", dtype)
    elif scales is not None:
        raise TypeError("dtype=None: required with scales. Pass the dtype of the result.")
    require_device(cache, block_tables=block_tables, seq_lens=seq_lens)
    if debug.enabled():
        debug.check_rows(block_tables, seq_lens, cache)
    gathered: Tensor = select("gather_kv", cache.device)(
        cache, block_tables, seq_lens, length, scales=scales, dtype=dtype
    )
    return gathered
