"""Write new keys and values into the slots of a paged cache."""

from __future__ import annotations

from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import (
    INTEGERS,
    are_plain,
    require_caches,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_floating,
    require_integers,
    require_same,
    require_shape,
    require_tensors,
    without_gradients,
)
from kvpager.kernels.backends import select


@without_gradients
def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the key and value of every token to its slot, in place. O(tokens).

    - `key` [tokens, kv_heads, head_dim] and `value` [tokens, kv_heads, value_head_dim]: the last
      dimension is contiguous, other strides may have any value. So a view of the projection's
      output needs no copy.
    - `key_cache`, `value_cache` [blocks, block_size, kv_heads, head_dim or value_head_dim]: the
      views of `BlockStorage.layer`. Blocks may lie apart. The dtype is that of `key` and `value`,
      or int8 or float8_e4m3fn: then the kernel quantises every token and head as it writes.
    - `slots` int32 or int64 [tokens]: `block * block_size + offset`, as in
      `manager.append(...).slots`. A negative slot skips its token (padding). Two tokens must not
      share a slot.
    - `scales`, for quantised caches: (key scales, value scales), each float32 [blocks, block_size,
      kv_heads], from `BlockStorage.scales`. The kernel writes them too (see `quantisation.py`).

    Raises: `ValueError`, `TypeError` for wrong shapes, strides, dtypes or devices. Only the native
    CPU kernel and debug mode (`KVPAGER_DEBUG=1`) check that slots exist, because the check would
    wait for a GPU. No gradient flows through the cache. The slot mapping is that of vLLM (Kwon et
    al., 2023, "Efficient Memory Management for LLM Serving with PagedAttention").
    """
    if scales is not None or not _fit(key, value, key_cache, value_cache, slots):
        _require_fitting(key, value, key_cache, value_cache, slots, scales)
    if debug.enabled():
        debug.check_slots(slots, key_cache)
    select("append_kv", key_cache.device)(key, value, key_cache, value_cache, slots, scales=scales)


def _fit(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> bool:
    """Return True for the usual arguments of a decode step; False needs a full check. O(1)."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor) and isinstance(slots, Tensor)):
        return False
    of, device, tokens = key.dtype, key.device, slots.shape
    return (
        are_plain(key_cache, value_cache)
        and len(tokens) == 1
        and key.shape == tokens + key_cache.shape[2:]
        and value.shape == tokens + value_cache.shape[2:]
        and of is value.dtype is key_cache.dtype
        and slots.dtype in INTEGERS
        and key.stride(2) == value.stride(2) == 1
        and device == value.device == slots.device == key_cache.device
    )


def _require_fitting(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    require_tensors(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slots=slots)
    require_dims("key", key, "[tokens, kv_heads, head_dim]", 3)
    require_caches(key_cache, value_cache, scales)
    tokens = key.shape[0]
    require_shape("key", key, (tokens, *key_cache.shape[2:]), "[tokens, kv_heads, head_dim]")
    require_shape(
        "value", value, (tokens, *value_cache.shape[2:]), "[tokens, kv_heads, value_head_dim]"
    )
    require_shape("slots", slots, (tokens,), "[tokens]")
    require_integers("slots", slots)
    if scales is None:
        require_same("key", key, "key_cache", key_cache)
    require_floating("key.dtype", key.dtype)
    require_same("value", value, "key", key)
    require_contiguous_rows(key=key, value=value)
    require_device(key_cache, key=key, value=value, slots=slots)
