"""A layer's key and value cache, checked once for all steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpager.kernels.args import (
    require_contiguous_rows,
    require_device,
    require_dims,
    require_same,
    require_scales,
    require_shape,
    require_tensors,
)

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCaches:
    """A layer's key and value cache and their scales. `append_kv` documents the tensors.

    Make one object per layer and pass it to `append` and `attend` in each step. The constructor
    checks the tensors. O(1). `BlockStorage.caches` returns one.
    Raises: `ValueError`, `TypeError` for tensors that do not fit together.
    """

    key: Tensor
    value: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        key, value, scales = self.key, self.value, self.scales
        if scales is None and _are_plain(key, value):
            return
        require_tensors(key_cache=key, value_cache=value)
        shape = "[blocks, block_size, kv_heads, head_dim]"
        require_dims("key_cache", key, shape, 4)
        require_dims("value_cache", value, shape, 4)
        cache_shape = (*key.shape[:3], value.shape[3])
        require_shape("value_cache", value, cache_shape, "key_cache's blocks and heads")
        require_same("value_cache", value, "key_cache", key)
        require_contiguous_rows(key_cache=key, value_cache=value)
        is_pair = isinstance(scales, tuple | list) and len(scales) == 2
        if scales is not None and not (
            is_pair and all(isinstance(each, Tensor) for each in scales)
        ):
            raise TypeError(
                f"scales: expected (key_scales, value_scales), got a {type(scales).__name__}. "
                "Pass storage.scales(i)."
            )
        key_scales, value_scales = scales or (None, None)
        require_scales("key_cache", key, "key_scales", key_scales)
        require_scales("value_cache", value, "value_scales", value_scales)
        require_device(key, value_cache=value)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return key, value and, if there are any, key scales and value scales. O(1)."""
        return self.key, self.value, *(self.scales or ())


def _are_plain(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Return True if two caches match and need no scales; False needs a full check. O(1)."""
    if not (isinstance(key_cache, Tensor) and isinstance(value_cache, Tensor)):
        return False
    keys, values, of = key_cache.shape, value_cache.shape, key_cache.dtype
    # Single numbers, because a slice of a shape takes longer than all other comparisons here.
    return (
        len(keys) == len(values) == 4
        and (keys[0], keys[1], keys[2]) == (values[0], values[1], values[2])
        and of is value_cache.dtype
        and of in _PLAIN
        and key_cache.stride()[3] == value_cache.stride()[3] == 1
        and key_cache.device == value_cache.device
    )
