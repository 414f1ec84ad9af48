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
    """One tensor of a layer, with its range in a run of the tier, in elements of the tier.

    A run is a block. If blocks keep their tokens one after the other, it is a token.
    """

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one run

    def view(self, tier: Tensor) -> Tensor:
        """Return the part of every run: [*runs, *shape] for a tier [*runs, elements]. O(1)."""
        part = tier[..., self.start : self.end].view(self.dtype)
        return part.view(*part.shape[:-1], *self.shape)


class StorageLayout(NamedTuple):
    """Where the tensors of each layer lie in a block: block-first, or token-first.

    Token-first, the tokens of a block lie one after the other, each with all layers. So a layer of
    blocks that lie one after the other is one strided tensor.

    Attributes:
        parts: of each layer in a run: key, value, and their scales if there are any.
        num_elements: elements of the tier in a block.
        num_tokens: of a block, token-first; None block-first.
    """

    parts: list[list[Part]]
    num_elements: int
    num_tokens: int | None

    @property
    def run_elements(self) -> int:
        """Elements of the tier in a run. O(1)."""
        return self.num_elements // (self.num_tokens or 1)

    @property
    def used_elements(self) -> int:
        """Elements of a run up to the end of its last part. O(1)."""
        return self.parts[-1][-1].end

    def runs(self, memory: Tensor) -> Tensor:
        """Return memory [n, elements] as runs. O(1).

        Block-first, it is unchanged; token-first, [n, tokens, elements of a token].
        """
        if self.num_tokens is None:
            return memory
        return memory.view(len(memory), memory.shape[1] // self.run_elements, self.run_elements)

    def views(self, memory: Tensor) -> list[list[Tensor]]:
        """Return the tensors of each layer for memory [n, elements of m blocks]. O(layers).

        Each is [n, block_size, heads, dim] for single blocks (m = 1), scales without the last axis.
        Token-first, m may be any number: [n, m * block_size, heads, dim].
        """
        runs = self.runs(memory)
        return [[part.view(runs) for part in parts] for parts in self.parts]


def storage_layout(
    block_size: int,
    layers: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype | None,
    *,
    token_first: int | None = None,
) -> StorageLayout:
    """Return the layout of blocks. O(layers).

    `layers` are (kv heads, head dim, value head dim). With `token_first`, tokens lie one after the
    other, and unused elements after each token make a block a multiple of `token_first` bytes.
    """
    if token_first is None:
        parts, num_elements = _parts((block_size,), layers, dtype, kv_cache_dtype)
        return StorageLayout(parts, num_elements, None)
    parts, num_elements = _parts((), layers, dtype, kv_cache_dtype)
    aligned = max(token_first // block_size, PART_ALIGNMENT_BYTES) // _unit(dtype, kv_cache_dtype)
    token_elements = -(-num_elements // aligned) * aligned
    return StorageLayout(parts, token_elements * block_size, block_size)


def _unit(dtype: torch.dtype, kv_cache_dtype: KVCacheDtype | None) -> int:
    """Return the bytes of an element of the tier: one if it holds several dtypes."""
    return dtype.itemsize if kv_cache_dtype is None else 1


def _parts(
    slots: tuple[int, ...],
    layers: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype | None,
) -> tuple[list[list[Part]], int]:
    stored = dtype if kv_cache_dtype is None else KV_CACHE_DTYPES[kv_cache_dtype]
    # The tier of a quantised storage has aligned parts and elements of one byte.
    unit = _unit(dtype, kv_cache_dtype)
    alignment = 1 if kv_cache_dtype is None else PART_ALIGNMENT_BYTES
    layout, start = [], 0
    for heads, key_dim, value_dim in layers:
        kinds: list[tuple[torch.dtype, tuple[int, ...]]]
        kinds = [(stored, (*slots, heads, key_dim)), (stored, (*slots, heads, value_dim))]
        kinds += [] if kv_cache_dtype is None else [(SCALE_DTYPE, (*slots, heads))] * 2
        parts = []
        for part_dtype, shape in kinds:
            end = start + math.prod(shape) * part_dtype.itemsize // unit
            parts.append(Part(start, end, part_dtype, shape))
            start = -(-end // alignment) * alignment
        layout.append(parts)
    return layout, start
