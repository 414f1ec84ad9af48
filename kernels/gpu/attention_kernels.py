# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Paged attention in Triton: one kernel for every work item, and one that merges partial results.

A program takes one item of a `WorkPlan` (see `work_items.py`) and one kv head. The lines of its
tile are the item's queries times the query heads of the kv head. The program reads each key and
value once for all lines. Decode, prefill over a cached prefix, split-KV and shared prefixes
differ only in their items. The softmax is online, in base 2 (FlashAttention-2, Dao 2023). A query
with several items is merged from normalised partial results and the logarithms of their weights
(Flash-Decoding, Dao et al. 2023). Attention sinks join the sum last: in the merge, or in the item
of a query with one item.

The loop looks up block ids one tile ahead to keep memory busy. If the look-up and the loads that
depend on it were in the same iteration, the compiler would pipeline neither.

The kernel never loads tokens that no line of the tile sees: the load gives 0. A token that only
some lines see has a score of -inf for the others. So stale NaNs in unused slots do no harm.
"""

# Legend. Lower-case names of tensors are pointers inside kernels; `x_y` after a tensor x is its
# stride along y. H query heads, G query heads per kv head, DK and DV head dims and their _PAD the
# next powers of two. BLOCK_M lines of a tile, BLOCK_N kv tokens of a tile. A block id of -1 is no
# block; a slot of -1 means that the item's result is final. GROUP of the G heads share a program:
# all G, unless G is huge. Then SPLITS programs share a kv head.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dequantised(stored, to: tl.constexpr):
    """Convert stored bytes to dtype `to`, without the scale."""
    if stored.dtype == tl.uint8:
        # fp8_e4m3 on a GPU that cannot convert it: the same bits as fp16, with a wider exponent.
        bits = stored.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(to)
    return stored.to(to)


@triton.jit
def _capped(scores, cap):
    """Compute tanh(scores) * cap with the hardware's exponential, and near 0, where digits would
    cancel, with the series."""
    square = scores * scores
    series = ((square * (62.0 / 2835) - 17.0 / 315) * square + 2.0 / 15) * square - 1.0 / 3
    far = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E)))
    return tl.where(square < 0.0625, scores + scores * square * series, far) * cap


@triton.jit
def _look_up(mask, line_at, real, column, mask_token, mask_width, LOWEST: tl.constexpr):
    """Return visibility and bias of the mask's `column` [BLOCK_M, BLOCK_N] for each line."""
    inside = (column >= 0) & (column < mask_width) & real[:, None]
    at = mask + line_at[:, None] + column * mask_token
    if LOWEST is None:
        allowed = tl.load(at, mask=inside, other=0) != 0
        bias = 0.0
    else:
        bias = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        allowed = bias > LOWEST
        bias = tl.where(allowed, bias, 0.0) * LOG2E
    return allowed, bias


@triton.jit(
    do_not_specialize=[
        "window", "first_item", "capacity", "mask_queries", "mask_width", "mask_row", "mask_head",
        "mask_query", "block_tables_row",
    ],
    # These may be views at any offset, and the kernel loads no runs of them.
    do_not_specialize_on_alignment=[
        "block_tables", "seq_lens", "cu_seqlens_q", "kv_starts", "mask",
    ],
)  # fmt: skip
def attend_items(
    output, partials, weights, query, key_cache, value_cache, block_tables, seq_lens, items,
    members, slots, cu_seqlens_q, kv_starts, sinks, mask, key_scales, value_scales,
    scale, softcap, window, first_item, capacity, H,
    query_token, query_head, block_tables_row,
    key_block, key_slot, key_head, value_block, value_slot, value_head,
    key_scales_block, key_scales_slot, key_scales_head,
    value_scales_block, value_scales_slot, value_scales_head,
    mask_row, mask_head, mask_query, mask_token, mask_queries, mask_width,
    G: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, ALONE: tl.constexpr,
    INTERIOR: tl.constexpr, PARTIAL: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Compute attention of one item's queries over its kv tokens, for the heads of one kv head.

    `ALONE`: every item has one query, the only query of its row. `INTERIOR`: skip masking for tiles
    that all lines see in full. `PARTIAL`: some slots are not -1. `LOWEST`: the number that means
    masked in a float mask, None for a bool mask. Optional arguments are None.
    """
    # Programs of one item are neighbours, like the heads of a token in memory.
    programs = H // G * SPLITS
    part_of_heads = tl.program_id(0) % programs
    kv_head = part_of_heads // SPLITS
    items += (first_item + tl.program_id(0) // programs) * 5
    first_member = tl.load(items)
    table_row = tl.load(items + 2)
    start = tl.load(items + 3)
    stop = tl.load(items + 4)

    line = tl.arange(0, BLOCK_M)
    group_head = part_of_heads % SPLITS * GROUP + line % GROUP
    real = (line // GROUP == 0) & (group_head < G)
    if not ALONE:
        real = (line // GROUP < tl.load(items + 1)) & (group_head < G)
    head = kv_head * G + group_head

    # The kv tokens [low, high) that each line sees without the mask; one range if ALONE.
    if ALONE:
        token_of = table_row
        row = table_row
        seq_len = tl.load(seq_lens + row).to(tl.int32)
        position = seq_len - 1
        from_last = 1
    else:
        token_of = tl.load(members + first_member + line // GROUP, mask=real, other=0)
        if cu_seqlens_q is None:
            row = token_of
            from_last = 1 + 0 * line
        else:
            row = table_row + 0 * line
            from_last = tl.load(cu_seqlens_q + table_row + 1).to(tl.int32) - token_of
        seq_len = tl.load(seq_lens + row).to(tl.int32)
        position = seq_len - from_last
    low = seq_len * 0
    high = seq_len
    if CAUSAL:
        high = position + 1
    if window is not None:
        low = tl.maximum(low, position - window + 1)
    if kv_starts is not None:
        low = tl.maximum(low, tl.load(kv_starts + row).to(tl.int32))
    if ALONE:
        lo = tl.maximum(start, low)
        hi = tl.minimum(stop, high)
    else:
        lo = tl.maximum(start, tl.min(tl.where(real, low, stop)))
        hi = tl.minimum(stop, tl.max(tl.where(real, high, 0)))
    hi = tl.minimum(hi, capacity)
    if INTERIOR:
        all_from = tl.maximum(lo, tl.max(tl.where(real, low, 0)))
        all_to = tl.minimum(hi, tl.min(tl.where(real, high, hi)))

    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    number: tl.constexpr = query.dtype.element_ty
    # Weights times value scales can be tiny. bf16 has the range, and int8 and fp8 values fit it.
    value_number: tl.constexpr = (
        tl.bfloat16 if key_scales is not None and number != tl.float32 else number
    )
    query += token_of.to(tl.int64) * query_token + head.to(tl.int64) * query_head
    lines = tl.load(
        query[:, None] + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0
    )
    key_cache += kv_head.to(tl.int64) * key_head
    value_cache += kv_head.to(tl.int64) * value_head
    if key_scales is not None:
        key_scales += kv_head.to(tl.int64) * key_scales_head
        value_scales += kv_head.to(tl.int64) * value_scales_head
    if mask is not None:
        line_at = (row + 0 * line).to(tl.int64) * mask_row + head.to(tl.int64) * mask_head
        line_at += (mask_queries - from_last).to(tl.int64) * mask_query

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    block_tables += table_row.to(tl.int64) * block_tables_row
    lane = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:  # a tile lies in one block, so one look-up serves its tokens
        tile_start = lo - lo % BLOCK_N
        next_block = tl.load(
            block_tables + tile_start // BLOCK_SIZE, mask=tile_start < hi, other=-1
        )
    else:
        tile_start = lo
        next_block = tl.load(
            block_tables + (tile_start + lane) // BLOCK_SIZE, mask=tile_start + lane < hi, other=-1
        )
    for tile in tl.range(tile_start, hi, BLOCK_N):
        block = next_block.to(tl.int64)
        ahead = tile + BLOCK_N
        token = tile + lane
        if BLOCK_SIZE % BLOCK_N == 0:
            next_block = tl.load(block_tables + ahead // BLOCK_SIZE, mask=ahead < hi, other=-1)
            slot_of = tile % BLOCK_SIZE + lane
        else:
            ahead += lane
            next_block = tl.load(block_tables + ahead // BLOCK_SIZE, mask=ahead < hi, other=-1)
            slot_of = token % BLOCK_SIZE
        held = (token >= lo) & (token < hi) & (block >= 0)
        key_at = block * key_block + slot_of * key_slot
        value_at = block * value_block + slot_of * value_slot
        key_held = held[None, :]
        value_held = held[:, None]
        if DK < DK_PAD:
            key_held = key_held & (dk < DK)[:, None]
        if DV < DV_PAD:
            value_held = value_held & (dv < DV)[None, :]
        keys = tl.load(key_cache + key_at[None, :] + dk[:, None], mask=key_held, other=0.0)
        values = tl.load(value_cache + value_at[:, None] + dv[None, :], mask=value_held, other=0.0)

        if key_scales is not None:
            keys = _dequantised(keys, number)
            values = _dequantised(values, value_number)
        scores = tl.dot(lines, keys, input_precision="ieee")
        if key_scales is not None:
            key_scale = tl.load(
                key_scales + block * key_scales_block + slot_of * key_scales_slot,
                mask=held, other=0.0,
            )  # fmt: skip
            scores *= key_scale[None, :] * scale
        else:
            scores *= scale
        if softcap is not None:
            scores = _capped(scores, softcap)

        if ALONE:
            visible = held[None, :] & real[:, None]
        else:
            visible = (token[None, :] >= low[:, None]) & (token[None, :] < high[:, None])
            visible = visible & held[None, :] & real[:, None]
        if mask is not None:
            # Right-aligned: the last column is the row's last token.
            column = token[None, :] - (seq_len + 0 * line)[:, None] + mask_width
            allowed, bias = _look_up(mask, line_at, real, column, mask_token, mask_width, LOWEST)
            visible = visible & allowed
            scores = tl.where(visible, scores + bias, float("-inf"))
            seen = tl.max(visible.to(tl.int32), 0) > 0
            values = tl.where(seen[:, None], values, 0.0)
        elif INTERIOR:
            if (tile < all_from) | (tile + BLOCK_N > all_to):
                scores = tl.where(visible, scores, float("-inf"))
        else:
            scores = tl.where(visible, scores, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A line that has seen no token has no maximum to subtract.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weight, 1)
        if key_scales is not None:
            value_scale = tl.load(
                value_scales + block * value_scales_block + slot_of * value_scales_slot,
                mask=held, other=0.0,
            )  # fmt: skip
            if mask is not None:
                value_scale = tl.where(seen, value_scale, 0.0)
            weight *= value_scale[None, :]
        summed = tl.dot(
            weight.to(value_number), values, summed * rescale[:, None], input_precision="ieee"
        )
        highest = new_highest

    if ALONE:
        slot = tl.load(slots + first_member) + 0 * line
    else:
        slot = tl.load(slots + first_member + line // GROUP, mask=real, other=-1)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=real & (slot < 0), other=float("-inf")).to(tl.float32)
        highest, total, summed = _with_sink(highest, total, summed, sink * LOG2E)
    result = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    kept = real[:, None] & (dv < DV)[None, :]
    final = output + (token_of.to(tl.int64) * H + head)[:, None] * DV + dv[None, :]
    tl.store(final, result.to(output.dtype.element_ty), mask=kept & (slot < 0)[:, None])
    if PARTIAL:
        part = slot.to(tl.int64) * H + head
        tl.store(
            partials + part[:, None] * DV + dv[None, :], result, mask=kept & (slot >= 0)[:, None]
        )
        tl.store(weights + part, highest + tl.log2(total), mask=real & (slot >= 0))


@triton.jit
def _with_sink(highest, total, summed, sink):
    """Add a logit per line that takes weight and has no value."""
    new_highest = tl.maximum(highest, sink)
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    rescale = tl.exp2(highest - base)
    return new_highest, total * rescale + tl.exp2(sink - base), summed * rescale[:, None]


@triton.jit
def merge_parts(
    output, partials, weights, sinks, merged, merge_starts,
    H, DV: tl.constexpr, DV_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one query head, weighted by their shares of the sum."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(merge_starts + index)
    last = tl.load(merge_starts + index + 1)
    dv = tl.arange(0, DV_PAD)
    lane = tl.arange(0, TILE)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    summed = tl.zeros([1, DV_PAD], tl.float32)
    for at in tl.range(first, last, TILE):
        part = (at + lane).to(tl.int64) * H + head
        there = at + lane < last
        weight = tl.load(weights + part, mask=there, other=float("-inf"))
        results = tl.load(
            partials + part[:, None] * DV + dv[None, :],
            mask=there[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(weight, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        rescale = tl.exp2(highest - base)
        share = tl.exp2(weight - base)
        total = total * rescale + tl.sum(share, 0)
        summed = summed * rescale[:, None] + tl.sum(results * share[:, None], 0)[None, :]
        highest = new_highest
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest, total, summed = _with_sink(highest, total, summed, sink)
    result = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    row = tl.load(merged + index).to(tl.int64) * H + head
    tl.store(
        output + row * DV + dv[None, :], result.to(output.dtype.element_ty), mask=(dv < DV)[None, :]
    )
