"""Moving keys and values in Triton: append_kv, gather_kv and copy_blocks.

Appending and gathering take the vectors (one token, one kv head) of a call in order, a tile of them
per program, each from one run of memory to another. A quantised cache is written and read in the
same pass, in exactly the numbers of `kvpager.kernels.quantisation`; the conversions to and from
float8_e4m3fn are integer arithmetic, so every GPU has them and gives the same bits.

Copying whole blocks: all reads must happen before all writes, because a block may be source of one
pair and destination of another, and nobody on the host knows the pairs. Bytes at different places
of a block never meet, so one program takes the *same few bytes of every pair's block*: it reads
them into registers, waits for all its threads, and writes them. That is exact, in one launch, with
each byte read once and written once. More pairs than the registers of a program hold go through a
staging buffer of bounded size, a slice of the blocks at a time, which moves every byte twice.

Block ids and token numbers times strides are 64-bit: a pool may have more than 2^31 elements.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.gpu import config
from kvpager.kernels.gpu.copies_kernels import append_vectors, copy_runs, gather_vectors, stage_runs
from kvpager.kernels.quantisation import indexable

# Elements of a tile of vectors, keys and values each: 16 per thread of 4 warps.
TILE_ELEMENTS = 2048
# One program of copy_blocks reads so many bytes of one block, and holds so many in its registers.
COPY_RUN_BYTES = 128
COPY_TILE_BYTES = 8192
# A program takes one of these numbers of pairs, so that few variants are compiled. More pairs than
# the last go through the staging buffer of about STAGING_BYTES.
COPY_PAIRS = (1, 8, 64, 256)
COPY_PAIRS_MAX = COPY_PAIRS[-1]
STAGING_BYTES = 64 << 20


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The twin of `reference.append_kv`: one launch, no wait for the GPU. O(tokens).

    Caches whose blocks are not one run each (sliced heads, say) the twin writes.
    """
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[2]
    if tokens * heads * key_dim * value_dim == 0 or key_cache.numel() == 0:
        return
    key_scales, value_scales = (None, None) if scales is None else scales
    if not all(map(_is_run, (key_cache, value_cache, key_scales, value_scales))):
        reference.append_kv(key, value, key_cache, value_cache, slots, scales=scales)
        return
    vectors = _vectors(max(key_dim, value_dim))
    with _on_device(key_cache):
        append_vectors[(triton.cdiv(tokens * heads, vectors),)](
            key,
            value,
            _numbers(key_cache),
            _numbers(value_cache),
            slots.contiguous(),
            key_scales,
            value_scales,
            tokens * heads,
            *key.stride()[:2],
            *value.stride()[:2],
            key_cache.stride(0),
            value_cache.stride(0),
            0 if key_scales is None else key_scales.stride(0),
            0 if value_scales is None else value_scales.stride(0),
            BLOCK_SIZE=key_cache.shape[1],
            HEADS=heads,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            VECTORS=vectors,
            **config.COMPILER_OPTIONS,
        )


def gather_kv(
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    length: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The twin of `reference.gather_kv`: one launch, no wait for the GPU. O(rows * length).

    Caches whose blocks are not one run each the twin reads.
    """
    if not (_is_run(cache) and _is_run(scales)):
        return reference.gather_kv(
            cache, block_tables, seq_lens, length, scales=scales, dtype=dtype
        )
    rows, columns = block_tables.shape
    _, block_size, heads, dim = cache.shape
    gathered = torch.empty(
        rows, length, heads, dim, dtype=dtype or cache.dtype, device=cache.device
    )
    if gathered.numel() == 0:
        return gathered
    if columns == 0 or cache.shape[0] == 0:
        return gathered.zero_()
    if block_tables.stride(1) != 1:
        block_tables = block_tables.contiguous()
    vectors = _vectors(dim)
    with _on_device(cache):
        gather_vectors[(rows * triton.cdiv(length * heads, vectors),)](
            gathered,
            _numbers(cache),
            scales,
            block_tables,
            seq_lens.contiguous(),
            length,
            columns,
            cache.stride(0),
            0 if scales is None else scales.stride(0),
            block_tables.stride(0),
            BLOCK_SIZE=block_size,
            HEADS=heads,
            DIM=dim,
            VECTORS=vectors,
            **config.COMPILER_OPTIONS,
        )
    return gathered


def copy_blocks(storage: Tensor, copies: Tensor) -> None:
    """The twin of `reference.copy_blocks`, no wait for the GPU. O(pairs * block bytes).

    One launch for up to `COPY_PAIRS_MAX` pairs. More take two per slice of the blocks, and up to
    `STAGING_BYTES` of memory (or 16 bytes per pair, if that is more).
    """
    num_pairs = copies.shape[0]
    if num_pairs == 0 or storage.numel() == 0:
        return
    copies = copies.contiguous()
    units, run, block, vector = _units(storage)
    with _on_device(storage):
        # PTX promises that reads before a barrier come before writes after it; AMD's compiler lets
        # loads be under way when a wave passes one.
        if num_pairs > COPY_PAIRS_MAX or torch.version.hip is not None:
            _copy_staged(units, copies, run, block, vector)
            return
        pairs = next(pairs for pairs in COPY_PAIRS if pairs >= num_pairs)
        tile_bytes = max(COPY_TILE_BYTES, pairs * COPY_RUN_BYTES)
        width = tile_bytes // pairs // units.element_size()
        width = min(width, triton.next_power_of_2(run * vector))
        copy_runs[(triton.cdiv(run * vector, width),)](
            units,
            copies,
            num_pairs,
            run,
            block,
            PAIRS=pairs,
            WIDTH=width,
            VECTOR=vector,
            num_warps=_copy_warps(pairs),
            **config.COMPILER_OPTIONS,
        )


def _copy_staged(units: Tensor, copies: Tensor, run: int, block: int, vector: int) -> None:
    """Slice by slice of the blocks: all pairs' slices into a buffer, then out of it."""
    num_pairs = copies.shape[0]
    group_bytes = vector * units.element_size()
    width = min(run, max(1, STAGING_BYTES // num_pairs // group_bytes))
    staging = units.new_empty(num_pairs, width * vector)
    tile = min(triton.next_power_of_2(width * vector), COPY_TILE_BYTES // units.element_size())
    for first in range(0, run, width):
        part = min(width, run - first)
        grid = (num_pairs * triton.cdiv(part * vector, tile),)
        for write in (False, True):
            stage_runs[grid](
                units,
                staging,
                copies,
                first,
                part,
                block,
                WRITE=write,
                WIDTH=tile,
                VECTOR=vector,
                **config.COMPILER_OPTIONS,
            )


def _units(storage: Tensor) -> tuple[Tensor, int, int, int]:
    """The storage as integers, units per run and from block to block, in groups of so many units.

    Four-byte units in groups of 16 bytes where everything is aligned, else the largest that fit.
    """
    blocks, size = storage.shape[0], storage.element_size()
    run = storage[0].numel()
    # The only block of a storage may have any stride.
    block = storage.stride(0) if blocks > 1 else run
    flat = torch.as_strided(storage, (blocks, run), (block, 1))
    alignment = flat.data_ptr() | (run * size) | (block * size)
    # A view of wider numbers asks that the offset into torch's storage is a multiple too.
    alignment |= int(flat.storage_offset()) * size
    if alignment % 4 == 0:
        unit, dtype = 4, torch.int32
    elif alignment % 2 == 0:
        unit, dtype = 2, torch.int16
    else:
        unit, dtype = 1, torch.uint8
    vector = 16 // unit if alignment % 16 == 0 else 1
    group_bytes = unit * vector
    return flat.view(dtype), run * size // group_bytes, block * size // group_bytes, vector


def _is_run(cache: Tensor | None) -> bool:
    """Whether every block is one run of memory: all that is given by `BlockStorage` is."""
    return cache is None or cache[:1].is_contiguous()


def _vectors(dim: int) -> int:
    """How many vectors of `dim` elements a program takes."""
    return max(1, TILE_ELEMENTS // int(triton.next_power_of_2(dim)))


def _numbers(cache: Tensor) -> Tensor:
    """A float8 cache as bytes, which is what the conversions take."""
    return indexable(cache) if cache.is_floating_point() else cache


def _copy_warps(pairs: int) -> int:
    """Warps of a program of `copy_runs`: at most 128 bytes per thread."""
    return 4 if pairs * COPY_RUN_BYTES <= 128 * 128 else 8


def _on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
