"""Copy kernels in Triton: append_kv, gather_kv and copy_blocks.

append_kv and gather_kv copy vectors (one token, one kv head) in order, one tile per program. They
quantise and dequantise in the same pass, with exactly the results of
`kvpager.kernels.quantisation`. Conversions to and from float8_e4m3fn use integer arithmetic, so
every GPU supports them with the same bits.

copy_blocks must finish all reads before any write: a block may be the source of one pair and the
destination of another, and only the device knows the pairs. Bytes at different offsets of a block
are independent. So one program takes the *same few bytes of every pair's block*: it reads
them into registers, waits for all its threads, and writes them. This takes one launch and reads
and writes each byte once. If the pairs exceed the registers of a program, slices of the blocks go
through a staging buffer of bounded size, which copies every byte twice.

Block ids and token numbers times strides are 64-bit: a pool may have more than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.gpu import config
from kvpager.kernels.gpu.copies_kernels import append_vectors, copy_runs, gather_vectors, stage_runs
from kvpager.kernels.quantisation import indexable

# Elements per tile, for keys and for values: 16 per thread of 4 warps.
TILE_ELEMENTS = 2048
# A program of copy_blocks reads COPY_RUN_BYTES per block, and holds COPY_TILE_BYTES in registers.
COPY_RUN_BYTES = 128
COPY_TILE_BYTES = 8192
# Pairs per program, rounded up to one of these values to compile few variants. More pairs than the
# last value go through a staging buffer of about STAGING_BYTES.
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
    """Compute `reference.append_kv` in one launch, without waiting for the GPU. O(tokens).

    The reference kernel handles caches whose blocks are not one run of memory (sliced heads).
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
    with config.on_device(key_cache):
        append_vectors[(triton.cdiv(tokens * heads, vectors),)](
            key, value, _numbers(key_cache), _numbers(value_cache), slots.contiguous(),
            key_scales, value_scales, tokens * heads, *key.stride()[:2], *value.stride()[:2],
            key_cache.stride(0), value_cache.stride(0),
            0 if key_scales is None else key_scales.stride(0),
            0 if value_scales is None else value_scales.stride(0),
            BLOCK_SIZE=key_cache.shape[1], HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            VECTORS=vectors, **config.COMPILER_OPTIONS,
        )  # fmt: skip


def gather_kv(
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    length: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `reference.gather_kv` in one launch, without waiting for the GPU. O(rows * length).

    The reference kernel handles caches whose blocks are not one run of memory.
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
    with config.on_device(cache):
        gather_vectors[(rows * triton.cdiv(length * heads, vectors),)](
            gathered, _numbers(cache), scales, block_tables, seq_lens.contiguous(), length,
            columns, cache.stride(0), 0 if scales is None else scales.stride(0),
            block_tables.stride(0),
            BLOCK_SIZE=block_size, HEADS=heads, DIM=dim, VECTORS=vectors,
            **config.COMPILER_OPTIONS,
        )  # fmt: skip
    return gathered


def copy_blocks(storage: Tensor, copies: Tensor) -> None:
    """Compute `reference.copy_blocks` without waiting for the GPU. O(pairs * block bytes).

    Takes one launch for up to `COPY_PAIRS_MAX` pairs. More pairs take two launches per slice of the
    blocks and up to `STAGING_BYTES` of memory (or 16 bytes per pair, if that is more).
    """
    num_pairs = copies.shape[0]
    if num_pairs == 0 or storage.numel() == 0:
        return
    copies = copies.contiguous()
    units, run, block, vector = _units(storage)
    with config.on_device(storage):
        # In PTX, reads before a barrier finish before writes after it. AMD's compiler lets loads
        # stay in flight when a wavefront passes the barrier.
        if num_pairs > COPY_PAIRS_MAX or torch.version.hip is not None:
            _copy_staged(units, copies, run, block, vector)
            return
        pairs = next(pairs for pairs in COPY_PAIRS if pairs >= num_pairs)
        tile_bytes = max(COPY_TILE_BYTES, pairs * COPY_RUN_BYTES)
        width = tile_bytes // pairs // units.element_size()
        width = min(width, triton.next_power_of_2(run * vector))
        copy_runs[(triton.cdiv(run * vector, width),)](
            units, copies, num_pairs, run, block,
            PAIRS=pairs, WIDTH=width, VECTOR=vector, num_warps=_copy_warps(pairs),
            **config.COMPILER_OPTIONS,
        )  # fmt: skip


def _copy_staged(units: Tensor, copies: Tensor, run: int, block: int, vector: int) -> None:
    """Copy the blocks slice by slice: all pairs' slices into a buffer, then out of it."""
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
                units, staging, copies, first, part, block,
                WRITE=write, WIDTH=tile, VECTOR=vector, **config.COMPILER_OPTIONS,
            )  # fmt: skip


def _units(storage: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the storage as integers, the run and the block stride in groups, and units per group.

    Units have 4 bytes in groups of 16 bytes if everything is aligned, else the largest that fit.
    """
    blocks, size = storage.shape[0], storage.element_size()
    run = storage[0].numel()
    # The stride of a single block is arbitrary.
    block = storage.stride(0) if blocks > 1 else run
    flat = torch.as_strided(storage, (blocks, run), (block, 1))
    alignment = flat.data_ptr() | (run * size) | (block * size)
    # A view of wider numbers needs an aligned offset into torch's storage, too.
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
    """Return True if every block is one run of memory, as in `BlockStorage`."""
    return cache is None or cache[:1].is_contiguous()


def _vectors(dim: int) -> int:
    """Return the number of vectors of `dim` elements per program."""
    return max(1, TILE_ELEMENTS // int(triton.next_power_of_2(dim)))


def _numbers(cache: Tensor) -> Tensor:
    """View a float8 cache as bytes, the type that the conversions take."""
    return indexable(cache) if cache.is_floating_point() else cache


def _copy_warps(pairs: int) -> int:
    """Return the warps of a program of `copy_runs`: at most 128 bytes per thread."""
    return 4 if pairs * COPY_RUN_BYTES <= 128 * 128 else 8
