# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The Triton kernels of `copies.py`, where they are described."""

# Legend. Lower-case names of tensors are pointers inside kernels; `x_y` after a tensor x is its
# stride along y. One program takes VECTORS vectors, PAIRS pairs and WIDTH units of a block. A slot
# of -1 is no slot, a block of -1 is no block, and a pair with a -1 is skipped.

# Values that change between steps (counts, offsets of index tensors) are not specialised: compiling
# a new variant would delay requests.

from __future__ import annotations

import triton
import triton.language as tl

INT8_LARGEST: tl.constexpr = tl.constexpr(127.0)
E4M3_LARGEST: tl.constexpr = tl.constexpr(448.0)
# Adding and subtracting these rounds a float32 to a multiple of 1 and of 2^-9.
ROUND_TO_1: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
ROUND_TO_2_9: tl.constexpr = tl.constexpr(16384.0)  # 2^14


@triton.jit
def _int8_from_float(x):
    """Round float32 to int8: nearest, ties to even, at most 127."""
    # A float32 of this size can hold multiples of 1 only.
    nearest = (x + ROUND_TO_1) - ROUND_TO_1
    return tl.minimum(tl.maximum(nearest, -INT8_LARGEST), INT8_LARGEST).to(tl.int8)


@triton.jit
def _e4m3_from_float(x):
    """Round float32 to the bits of float8_e4m3fn: nearest, ties to even, at most 448."""
    x = tl.minimum(tl.maximum(x, -E4M3_LARGEST), E4M3_LARGEST)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Keep 3 of 23 mantissa bits, and change the exponent bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Numbers below 2^-6 are multiples of 2^-9, and their bits are the multiplier.
    shifted = tl.abs(x) + ROUND_TO_2_9
    small = shifted.to(tl.uint32, bitcast=True) & 0xFF
    return (tl.where(magnitude < (121 << 23), small, normal) | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def _float_from_e4m3(stored):
    """Convert the bits of float8_e4m3fn to float32, exactly."""
    bits = stored.to(tl.uint32)
    # The same bits in the wider format, times the difference of the biases: 2^(127 - 7).
    x = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), x * 1.329227995784916e36)


@triton.jit
def _store_vectors(x, vectors, scales, kept, inside):
    """Write x [VECTORS, D] to `vectors`, quantised where there are `scales` [VECTORS]."""
    written = kept[:, None] & inside
    if scales is None:
        tl.store(vectors, x, mask=written)
    else:
        exact = x.to(tl.float32)
        # The bits of non-negative floats order like their values, with NaN after infinity. So the
        # maximum of the bits keeps a NaN, unlike the maximum of floats.
        highest = tl.max(tl.abs(exact).to(tl.int32, bitcast=True), 1)
        highest = highest.to(tl.float32, bitcast=True)
        largest = INT8_LARGEST if vectors.dtype.element_ty == tl.int8 else E4M3_LARGEST
        scale = tl.div_rn(highest, tl.zeros_like(highest) + largest)
        ordinary = (scale > 0) & (scale < float("inf"))
        ratio = tl.div_rn(exact, tl.where(ordinary, scale, 1.0)[:, None] + tl.zeros_like(exact))
        ratio = tl.where(ordinary[:, None], ratio, 0.0)
        if vectors.dtype.element_ty == tl.int8:
            tl.store(vectors, _int8_from_float(ratio), mask=written)
        else:
            tl.store(vectors, _e4m3_from_float(ratio), mask=written)
        tl.store(scales, scale, mask=kept)


@triton.jit(do_not_specialize=["num_vectors"], do_not_specialize_on_alignment=["slots"])
def append_vectors(
    key, value, key_cache, value_cache, slots, key_scales, value_scales, num_vectors, key_token,
    key_head, value_token, value_head, key_cache_block, value_cache_block, key_scales_block,
    value_scales_block,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Write a tile of vectors of key and value to their tokens' slots."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    token = (vector // HEADS).to(tl.int64)
    head = (vector % HEADS).to(tl.int64)
    slot = tl.load(slots + token, mask=vector < num_vectors, other=-1).to(tl.int64)
    kept = slot >= 0
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE * HEADS + head  # of the vector in its block

    dim = tl.arange(0, triton.next_power_of_2(KEY_DIM))
    inside = (dim < KEY_DIM)[None, :]
    vectors = key + (token * key_token + head * key_head)[:, None] + dim[None, :]
    x = tl.load(vectors, mask=kept[:, None] & inside, other=0.0)
    vectors = key_cache + (block * key_cache_block + place * KEY_DIM)[:, None] + dim[None, :]
    scales = None if key_scales is None else key_scales + block * key_scales_block + place
    _store_vectors(x, vectors, scales, kept, inside)

    dim = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    inside = (dim < VALUE_DIM)[None, :]
    vectors = value + (token * value_token + head * value_head)[:, None] + dim[None, :]
    x = tl.load(vectors, mask=kept[:, None] & inside, other=0.0)
    vectors = value_cache + (block * value_cache_block + place * VALUE_DIM)[:, None] + dim[None, :]
    scales = None if value_scales is None else value_scales + block * value_scales_block + place
    _store_vectors(x, vectors, scales, kept, inside)


@triton.jit(
    do_not_specialize=["length", "num_columns", "block_tables_row"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens"],
)
def gather_vectors(
    gathered, cache, scales, block_tables, seq_lens, length, num_columns, cache_block,
    scales_block, block_tables_row,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Read a tile of one row's vectors, zero for missing ones."""
    tiles = tl.cdiv(length * HEADS, VECTORS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    vector = tl.program_id(0) % tiles * VECTORS + tl.arange(0, VECTORS)
    exists = vector < length * HEADS
    position = tl.load(seq_lens + row).to(tl.int32) - length + vector // HEADS
    column = position // BLOCK_SIZE
    found = exists & (position >= 0) & (column < num_columns)
    block = tl.load(block_tables + row * block_tables_row + column, mask=found, other=-1).to(
        tl.int64
    )
    found &= block >= 0
    place = position % BLOCK_SIZE * HEADS + vector % HEADS  # of the vector in its block

    dim = tl.arange(0, triton.next_power_of_2(DIM))
    inside = (dim < DIM)[None, :]
    vectors = cache + (block * cache_block + place * DIM)[:, None] + dim[None, :]
    x = tl.load(vectors, mask=found[:, None] & inside, other=0)
    to = gathered.dtype.element_ty
    if scales is not None:
        # Multiply in float64 for a float64 result, else in float32 and round once.
        maths = tl.float64 if to == tl.float64 else tl.float32
        scale = tl.load(scales + block * scales_block + place, mask=found, other=0.0).to(maths)
        if x.dtype == tl.uint8:
            x = _float_from_e4m3(x)
        x = x.to(maths) * scale[:, None]
    elif x.dtype == tl.float64 and to != tl.float64:
        x = x.to(tl.float32)
    vectors = gathered + (row * length * HEADS + vector)[:, None] * DIM + dim[None, :]
    tl.store(vectors, x.to(to), mask=exists[:, None] & inside)


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["copies"])
def copy_runs(
    storage, copies, num_pairs, run, block,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Copy the same WIDTH units of every pair's block: read all of them, then write all.

    `run` (size of a block) and `block` (stride between blocks) count groups of VECTOR units, so
    that the compiler can use 16-byte loads.
    """
    pair = tl.arange(0, PAIRS)
    source = tl.load(copies + pair * 2, mask=pair < num_pairs, other=-1).to(tl.int64)
    destination = tl.load(copies + pair * 2 + 1, mask=pair < num_pairs, other=-1).to(tl.int64)
    unit = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    kept = ((source >= 0) & (destination >= 0))[:, None] & (unit < run * VECTOR)[None, :]
    x = tl.load(storage + (source * block * VECTOR)[:, None] + unit[None, :], mask=kept)
    # A thread may overwrite a unit that another thread reads, so all threads read first.
    tl.debug_barrier()
    tl.store(storage + (destination * block * VECTOR)[:, None] + unit[None, :], x, mask=kept)


@triton.jit(do_not_specialize=["first", "width"], do_not_specialize_on_alignment=["copies"])
def stage_runs(
    storage, staging, copies, first, width, block,
    WRITE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Copy units [first, first + width) of one pair to `staging`, or back if WRITE.

    `first`, `width` and `block` count groups of VECTOR units.
    """
    tiles = tl.cdiv(width * VECTOR, WIDTH)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    source = tl.load(copies + pair * 2).to(tl.int64)
    destination = tl.load(copies + pair * 2 + 1).to(tl.int64)
    unit = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    kept = (unit < width * VECTOR) & (tl.minimum(source, destination) >= 0)
    row = tl.maximum(destination if WRITE else source, 0)
    stored = storage + (row * block + first) * VECTOR + unit
    staged = staging + pair * width * VECTOR + unit
    if WRITE:
        tl.store(stored, tl.load(staged, mask=kept), mask=kept)
    else:
        tl.store(staged, tl.load(stored, mask=kept), mask=kept)
