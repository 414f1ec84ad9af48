"""Copy whole blocks, all layers at once: what copy-on-write asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels.arguments import require_device, require_dims, require_integers
from kvpager.kernels.backends import select


@torch.no_grad()
def copy_blocks(storage: Tensor, copies: Tensor) -> None:
    """Copy block to block for every pair (source, destination). O(pairs * block bytes).

    - `storage` [blocks, ...]: block first, as `BlockStorage` keeps it, so that a block is one run.
    - `copies` int32 or int64 [pairs, 2], on the storage's device. A pair with a negative entry is
      skipped, which lets a captured CUDA graph keep its shape.

    All reads happen before all writes: a block may be source of one pair and destination of
    another. Two pairs must not share a destination.

    `ValueError` and `TypeError` for wrong shapes, dtypes and devices; block ids are not looked at.
    """
    if storage.dim() < 2:
        raise ValueError(f"storage has shape {list(storage.shape)}; pass [blocks, ...]")
    require_dims("copies", copies, "[pairs, 2]", 2)
    if copies.shape[1] != 2:
        raise ValueError(f"copies has shape {list(copies.shape)}; pass [pairs, 2]")
    require_integers("copies", copies)
    require_device(storage, copies=copies)
    select("copy_blocks", storage.device)(storage, copies)
