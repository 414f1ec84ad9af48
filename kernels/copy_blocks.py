"""Copy whole blocks, all layers at once, for copy-on-write."""

from __future__ import annotations

from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import (
    require_device,
    require_dims,
    require_integers,
    require_tensors,
    without_gradients,
)
from kvpager.kernels.backends import select


@without_gradients
def copy_blocks(storage: Tensor, copies: Tensor) -> None:
    """Copy a block for every pair (source, destination). O(pairs * block bytes).

    - `storage` [blocks, ...]: block-first, as in `BlockStorage`. Each block is one run of memory,
      scales included. Blocks may lie apart.
    - `copies` int32 or int64 [pairs, 2], on the storage's device. The kernel skips a pair with a
      negative entry, so a captured CUDA graph can keep its shape.

    All reads happen before all writes: a block may be the source of one pair and the destination
    of another. Two pairs must not share a destination.

    Raises: `ValueError`, `TypeError` for wrong shapes, strides, dtypes or devices. Only the native
    CPU kernel and debug mode (`debug.py`) check block ids.
    """
    require_tensors(storage=storage, copies=copies)
    if storage.dim() < 2:
        raise ValueError(f"storage.shape={list(storage.shape)}: expected [blocks, ...]")
    if not storage[:1].is_contiguous():
        raise ValueError(
            f"storage has strides {list(storage.stride())}, but each block has to be one run of "
            "memory; pass a block-first tensor, such as storage.tier()"
        )
    require_dims("copies", copies, "[pairs, 2]", 2)
    if copies.shape[1] != 2:
        raise ValueError(f"copies.shape={list(copies.shape)}: expected [pairs, 2]")
    require_integers("copies", copies)
    require_device(storage, copies=copies)
    if debug.enabled():
        debug.check_copies(copies, storage)
    select("copy_blocks", storage.device)(storage, copies)
