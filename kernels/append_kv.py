"""Write new keys and values into the slots of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels.arguments import (
    require_device,
    require_dims,
    require_integers,
    require_same,
    require_shape,
)
from kvpager.kernels.backends import select


@torch.no_grad()
def append_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Write the key and value of every token to its slot, in place. O(tokens).

    - `key` [tokens, kv_heads, head_dim] and `value` [tokens, kv_heads, value_head_dim]: any
      strides, so a transposed view of a projection needs no copy first.
    - `key_cache`, `value_cache` [blocks, block_size, kv_heads, head_dim of each]: the views that
      `BlockStorage.layer` gives, of the dtype of `key` and `value`. Blocks may lie apart.
    - `slots` int64 [tokens]: `block * block_size + offset`, as `manager.append(...).slots` has
      them. A negative slot skips its token (padding). Two tokens must not share a slot.

    Shapes, dtypes and devices are checked (`ValueError`, `TypeError`); slot values are not, because
    that would wait for the GPU. No gradient flows through the cache. The slot mapping is vLLM's
    (Kwon et al., 2023, "Efficient Memory Management for LLM Serving with PagedAttention").
    """
    require_dims("key", key, "[tokens, kv_heads, head_dim]", 3)
    require_dims("key_cache", key_cache, "[blocks, block_size, kv_heads, head_dim]", 4)
    require_dims("value_cache", value_cache, "[blocks, block_size, kv_heads, head_dim]", 4)
    tokens = key.shape[0]
    require_shape("key", key, (tokens, *key_cache.shape[2:]), "[tokens, kv_heads, head_dim]")
    require_shape(
        "value", value, (tokens, *value_cache.shape[2:]), "[tokens, kv_heads, value_head_dim]"
    )
    cache_shape = (*key_cache.shape[:3], value_cache.shape[3])
    require_shape("value_cache", value_cache, cache_shape, "key_cache's blocks and heads")
    require_shape("slots", slots, (tokens,), "[tokens]")
    require_integers("slots", slots)
    require_same("key", key, "key_cache", key_cache)
    require_same("value", value, "value_cache", value_cache)
    require_device(key_cache, key=key, value=value, value_cache=value_cache, slots=slots)
    select("append_kv", key_cache.device)(key, value, key_cache, value_cache, slots)
