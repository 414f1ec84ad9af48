"""Where the tensors of each layer lie in a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpager.kernels.quantisation import KV_CACHE_DTYPES, SCALE_DTYPE

KVCacheDtype = Literal["int8", "fp8_e4m3"]

# The widest loads of GPUs and CPUs. A multiple of the alignment of every dtype.
PART_ALIGNMENT_BYTES = 16


class Part(NamedTuple):
    """One tensor of a layer, with its range in a block in elements of the tier."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one block

    def view(self, tier: Tensor) -> Tensor:
        """Return the part of every block: [blocks, *shape]. O(1)."""
        return tier[:, self.start : self.end].view(self.dtype).view(-1, *self.shape)


def block_layout(
    block_size: int,
    layers: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype | None,
) -> tuple[list[list[Part]], int]:
    """Return the parts of every layer, in order, and the elements of a block. O(layers).

    `layers` are (kv heads, head dim, value head dim).
    """
    stored = dtype if kv_cache_dtype is None else KV_CACHE_DTYPES[kv_cache_dtype]
    # The tier of a quantised storage has aligned parts and elements of one byte.
    unit, alignment = (dtype.itemsize, 1) if kv_cache_dtype is None else (1, PART_ALIGNMENT_BYTES)
    layout, start = [], 0
    for heads, key_dim, value_dim in layers:
        kinds: list[tuple[torch.dtype, tuple[int, ...]]]
        kinds = [(stored, (block_size, heads, key_dim)), (stored, (block_size, heads, value_dim))]
        kinds += [] if kv_cache_dtype is None else [(SCALE_DTYPE, (block_size, heads))] * 2
        parts = []
        for part_dtype, shape in kinds:
            end = start + math.prod(shape) * part_dtype.itemsize // unit
            parts.append(Part(start, end, part_dtype, shape))
            start = -(-end // alignment) * alignment
        layout.append(parts)
    return layout, start
