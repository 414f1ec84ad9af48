"""Write new keys and values into the slots of a paged cache."""

from __future__ import annotations

from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import (
    INTEGERS,
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
from kvpager.kernels.layer_caches import LayerCaches


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
    append(key, value, LayerCaches(key_cache, value_cache, scales), slots)


@without_gradients
def append(key: Tensor, value: Tensor, caches: LayerCaches, slots: Tensor) -> None:
    """Do what `append_kv` does, with caches that all steps share.

    Arguments, complexity and errors are those of `append_kv`.
    """
    if not _fit(key, value, caches, slots):
        _require_fitting(key, value, caches, slots)
    if debug.enabled():
        debug.check_slots(slots, caches.key)
    write = select("append_kv", caches.key.device)
    write(key, value, caches.key, caches.value, slots, scales=caches.scales)


def _fit(key: Tensor, value: Tensor, caches: LayerCaches, slots: Tensor) -> bool:
    """Return True for the usual arguments of a decode step; False needs a full check. O(1)."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor) and isinstance(slots, Tensor)):
        return False
    keys, values, tokens = key.shape, value.shape, slots.shape
    if caches.scales is not None or not len(keys) == len(values) == 3 or len(tokens) != 1:
        return False
    of, device = caches.key.dtype, caches.key.device
    _, _, kv_heads, head_dim = caches.key.shape
    # Single numbers, because a slice of a shape takes longer than all other comparisons here.
    return (
        keys[0] == values[0] == tokens[0]
        and keys[1] == values[1] == kv_heads
        and keys[2] == head_dim
        and values[2] == caches.value.shape[3]
        and of is key.dtype is value.dtype
        and slots.dtype in INTEGERS
        and key.stride()[2] == value.stride()[2] == 1
        and device == key.device == value.device == slots.device
    )


def _require_fitting(key: Tensor, value: Tensor, caches: LayerCaches, slots: Tensor) -> None:
    require_tensors(key=key, value=value, slots=slots)
    require_dims("key", key, "[tokens, kv_heads, head_dim]", 3)
    tokens = key.shape[0]
    require_shape("key", key, (tokens, *caches.key.shape[2:]), "[tokens, kv_heads, head_dim]")
    require_shape(
        "value", value, (tokens, *caches.value.shape[2:]), "[tokens, kv_heads, value_head_dim]"
    )
    require_shape("slots", slots, (tokens,), "[tokens]")
    require_integers("slots", slots)
    if caches.scales is None:
        require_same("key", key, "key_cache", caches.key)
    require_floating("key.dtype", key.dtype)
    require_same("value", value, "key", key)
    require_contiguous_rows(key=key, value=value)
    require_device(caches.key, key=key, value=value, slots=slots)
