"""Copy whole blocks, all layers at once: what copy-on-write asks for."""

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
    """Copy block to block for every pair (source, destination). O(pairs * block bytes).

    - `storage` [blocks, ...]: block first, as `BlockStorage` keeps it. Each block is one run of
      memory, whatever it holds (scales inside it travel too); blocks may lie apart.
    - `copies` int32 or int64 [pairs, 2], on the storage's device. A pair with a negative entry is
      skipped, which lets a captured CUDA graph keep its shape.

    All reads happen before all writes: a block may be source of one pair and destination of
    another. Two pairs must not share a destination.

    `ValueError` and `TypeError` for wrong shapes, strides, dtypes and devices; block ids are looked
    at in debug mode only (`debug.py`).
    """
    require_tensors(storage=storage, copies=copies)
    if storage.dim() < 2:
        raise ValueError(f"storage has shape {list(storage.shape)}; pass [blocks, ...]")
    if not storage[:1].is_contiguous():
        raise ValueError(
            f"storage has strides {list(storage.stride())}, but each block has to be one run of "
            "memory; pass a block-first tensor, such as storage.tier()"
        )
    require_dims("copies", copies, "[pairs, 2]", 2)
    if copies.shape[1] != 2:
        raise ValueError(f"copies has shape {list(copies.shape)}; pass [pairs, 2]")
    require_integers("copies", copies)
    require_device(storage, copies=copies)
    if debug.enabled():
        debug.check_copies(copies, storage)
    select("copy_blocks", storage.device)(storage, copies)
