"""Reference kernels in plain torch, for any device.

These functions are the specification of the fast kernels and their fallback. They use vectorised
torch operations only, so they are fast enough to serve. They trust their arguments: the entry
points beside this file (`paged_attention.py`, ...) check and document them. Maths is float32, or
float64 for a float64 query. Results are rounded once, at the end. A quantised cache is dequantised
as it is read (see `quantisation.py`).
"""

# T tokens, R rows, H query heads, K kv heads, G = H // K query heads per kv head, D head dim,
# Q query tokens of a row (columns, right-aligned: the last column is each row's newest query),
# N kv tokens of a tile. A block table entry of -1 is no block; a slot of -1 is no slot.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpager.kernels.args import require_lengths, require_starts, short_mask, wrong_length
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.quantisation import dequantise, indexable, quantise

# Tokens of a kv tile, all rows together: its fp32 copy stays in the cache of a CPU core, and the
# fixed cost of a tile (about 100 us of torch calls) is spread over many tokens.
TILE_TOKENS = 8192
TILE_TOKENS_PER_ROW = 1024
# Scores of a tile, in elements. This bounds the memory of a long prefill.
TILE_SCORES = 1 << 22


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write key [T, K, Dk] and value [T, K, Dv] to `slots` [T] of the caches. O(T)."""
    kept = slots >= 0
    if not bool(kept.all()):
        key, value, slots = key[kept], value[kept], slots[kept]
    block_size = key_cache.shape[1]
    where = (slots // block_size, slots % block_size)
    if scales is not None:
        key, key_scales = quantise(key, key_cache.dtype)
        value, value_scales = quantise(value, value_cache.dtype)
        scales[0].index_put_(where, key_scales)
        scales[1].index_put_(where, value_scales)
    indexable(key_cache).index_put_(where, indexable(key))
    indexable(value_cache).index_put_(where, indexable(value))


def gather_kv(
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    length: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return each row's last `length` tokens, right-aligned: [R, length, K, D]. O(R * length)."""
    dtype = dtype or cache.dtype
    rows, columns = block_tables.shape
    block_size = cache.shape[1]
    require_lengths(seq_lens, columns * block_size)
    if length == 0 or columns == 0 or cache.shape[0] == 0:
        return cache.new_zeros(rows, length, *cache.shape[2:], dtype=dtype)
    positions = seq_lens.long()[:, None] - length + torch.arange(length, device=cache.device)
    column = torch.div(positions, block_size, rounding_mode="floor")
    blocks = block_tables.gather(1, column.clamp(0, columns - 1)).long()
    found = (positions >= 0) & (column < columns) & (blocks >= 0)
    where = (blocks.where(found, 0), positions % block_size)
    gathered = indexable(cache)[where].view(cache.dtype)
    if scales is not None:
        gathered = dequantise(gathered, scales[where], dtype)
    gathered = gathered.to(dtype)
    _clear(gathered, ~found)
    return gathered


def _clear(tokens: Tensor, which: Tensor) -> None:
    """Zero the tokens [R, N, K, D] where `which` [R, N] is True, in place."""
    # Few tokens or none: indexing costs less than a masked pass over all of them.
    tokens[which.nonzero(as_tuple=True)] = 0


def copy_blocks(storage: Tensor, copies: Tensor) -> None:
    """Copy whole blocks of `storage` [blocks, ...] for pairs [n, 2]. O(n * block bytes)."""
    kept = copies[(copies >= 0).all(1)].long()
    # index_select makes a copy, so every read is done before the first write.
    storage.index_copy_(0, kept[:, 1], storage.index_select(0, kept[:, 0]))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    args: AttentionArgs,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute attention of query [T, H, D] over paged KV: [T, H, Dv]. O(H * D * T * kv).

    Needs no plan and ignores `args.host_rows`. Writes to `out` [T, H, Dv] if given.

    Reads KV tile by tile with an online softmax: it keeps a maximum and a sum per query, and
    rescales the sum when the maximum rises (Milakov & Gimelshein 2018, "Online normalizer
    calculation for softmax"; the tiles follow FlashAttention, Dao et al. 2022).
    """
    block_tables, seq_lens, mask = args.block_tables, args.seq_lens, args.mask
    require_lengths(seq_lens, block_tables.shape[1] * key_cache.shape[1])
    output = query.new_empty(*query.shape[:2], value_cache.shape[3]) if out is None else out
    rows, num_query_heads = block_tables.shape[0], query.shape[1]
    if query.numel() == 0 or rows == 0:
        return output.zero_()
    ends, query_lens, longest = _query_lengths(query, rows, args.cu_seqlens_q)
    if mask is not None and mask.shape[2] < longest:
        raise short_mask(mask, longest)
    output.zero_()
    if key_cache.shape[0] == 0:  # no token is visible
        return output
    starts = torch.arange(block_tables.shape[1], device=query.device) * key_cache.shape[1]
    kv_starts = torch.zeros_like(seq_lens) if args.kv_starts is None else args.kv_starts
    cells = _Cells(
        # Ignore entries past a row's last token.
        block_tables=block_tables.where(starts < seq_lens[:, None], -1),
        seq_lens=seq_lens.long(),
        kv_starts=kv_starts.long().clamp(min=0),
        query_lens=query_lens,
        longest=longest,
        causal=args.causal,
        window=args.window,
        mask=mask,
    )
    tokens_per_row = max(1, min(TILE_TOKENS_PER_ROW, TILE_TOKENS // rows))
    key_scales, value_scales = scales or (None, None)
    tile = _Tile(
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        blocks=max(1, tokens_per_row // key_cache.shape[1]),
        softmax_scale=query.shape[2] ** -0.5 if args.softmax_scale is None else args.softmax_scale,
        softcap=args.softcap,
        sinks=sinks,
    )
    columns = max(16, TILE_SCORES // (rows * num_query_heads * tokens_per_row))
    for first in range(0, longest, columns):
        last = min(first + columns, longest)
        part = replace(cells, first=first, last=last)
        index = ends[:, None] - longest + torch.arange(first, last, device=query.device)
        real = index >= (ends - query_lens)[:, None]
        wanted = real.any(1)
        if not bool(wanted.all()):
            part, index, real = part.take(wanted.nonzero().squeeze(1)), index[wanted], real[wanted]
        attended = _attend(tile, part, query[index.clamp(min=0)])
        output[index[real]] = attended[real].to(output.dtype)
    return output


@dataclass(frozen=True, slots=True)
class _Tile:
    """Arguments that all tiles of a call share."""

    key_cache: Tensor
    value_cache: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    blocks: int  # table columns per tile
    softmax_scale: float
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class _Cells:
    """Visibility of kv tokens to queries, for the query columns `first` to `last`."""

    block_tables: Tensor  # [R, max_blocks]
    seq_lens: Tensor  # [R] int64, like `kv_starts` and `query_lens`
    kv_starts: Tensor
    query_lens: Tensor
    longest: int  # query columns of the whole call
    causal: bool
    window: int | None
    mask: Tensor | None
    first: int = 0
    last: int = 0

    def take(self, rows: Tensor) -> _Cells:
        """Return the cells of `rows`."""
        mask = self.mask
        return replace(
            self,
            block_tables=self.block_tables[rows],
            seq_lens=self.seq_lens[rows],
            kv_starts=self.kv_starts[rows],
            query_lens=self.query_lens[rows],
            mask=mask[rows] if mask is not None and mask.shape[0] > 1 else mask,
        )

    def reach(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the kv range that any query of a row sees, and that all see: each int64 [R]."""
        start = self.seq_lens - self.longest
        newest = start + self.last - 1
        oldest = start + torch.clamp(self.longest - self.query_lens, min=self.first)
        low, full_low = self.kv_starts, self.kv_starts
        if self.window is not None:
            low = torch.maximum(low, oldest.clamp(min=0) - self.window + 1)
            full_low = torch.maximum(full_low, newest - self.window + 1)
        high, full_high = newest + 1, oldest + 1
        if not self.causal:
            high = full_high = self.seq_lens
        return low, high, full_low, full_high

    def visible(self, start: int, stop: int) -> Tensor:
        """Return the visibility of kv tokens [start, stop), mask excluded: bool [R, 1, Q, N]."""
        block_size = (stop - start) // max(1, self.block_tables.shape[1])
        column = torch.arange(self.first, self.last, device=self.seq_lens.device)[:, None]
        seq_lens, query_lens = self.seq_lens[:, None, None], self.query_lens[:, None, None]
        position = seq_lens - self.longest + column
        real = column >= self.longest - query_lens  # other columns pad rows with fewer queries
        token = torch.arange(start, stop, device=position.device)
        held = (self.block_tables >= 0).repeat_interleave(block_size, 1)
        held &= (token >= self.kv_starts[:, None]) & (token < self.seq_lens[:, None])
        seen = held[:, None, :] & real
        if self.causal:
            seen &= token <= position
        if self.window is not None:
            seen &= token > position - self.window
        return seen[:, None]


def _query_lengths(
    query: Tensor, rows: int, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Return the end of each row's queries in the packed tokens, their number, and its maximum."""
    if cu_seqlens_q is None:
        ones = torch.ones(rows, dtype=torch.int64, device=query.device)
        return ones.cumsum(0), ones, 1
    require_starts(cu_seqlens_q, len(query))
    starts = cu_seqlens_q.long()
    lengths = starts.diff()
    return starts[1:], lengths, int(lengths.max())


def _attend(tile: _Tile, cells: _Cells, query: Tensor) -> Tensor:
    """Compute attention of right-aligned query [R, Q, H, D]: float32 or float64 [R, Q, H, Dv]."""
    R, Q, H, D = query.shape
    K, Dv = tile.value_cache.shape[2:]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(dtype).view(R, Q, K, H // K, D).permute(0, 2, 3, 1, 4)
    scaled = (grouped * tile.softmax_scale).reshape(R, K, H // K * Q, D)
    # The lowest number instead of -inf: a query that has seen no token needs no special case.
    highest = scaled.new_full((R, K, H // K, Q), torch.finfo(dtype).min)
    total = torch.zeros_like(highest)
    summed = scaled.new_zeros(R, K, H // K * Q, Dv)
    if tile.sinks is not None:
        # A sink of -inf has no effect, but would make NaNs as a maximum.
        sinks = tile.sinks.to(dtype).clamp(min=torch.finfo(dtype).min)
        highest = highest.copy_(sinks.view(K, H // K, 1))
        total.fill_(1)
    for rows, part, start, stop, masked in _tiles(tile, cells):
        state = (highest, total, summed)
        if rows is None:
            _add_tile(tile, part, scaled, state, start, stop, masked)
            continue
        some = tuple(tensor[rows] for tensor in state)
        _add_tile(tile, part, scaled[rows], (some[0], some[1], some[2]), start, stop, masked)
        for tensor, changed in zip(state, some, strict=True):
            tensor[rows] = changed
    total = total.masked_fill_(total == 0, 1)  # sees no token: 0 / 1
    result = summed.view(R, K, H // K, Q, Dv) / total[..., None]
    return result.permute(0, 3, 1, 2, 4).reshape(R, Q, H, Dv)


def _tiles(tile: _Tile, cells: _Cells) -> Iterator[tuple[Tensor | None, _Cells, int, int, bool]]:
    """Yield rows (None: all), their cells, start and stop tokens of each tile that a row needs, and
    True if a token is hidden from a query."""
    block_size = tile.key_cache.shape[1]
    low, high, full_low, full_high = cells.reach()
    columns = -(-max(0, int(high.max())) // block_size)
    if columns > cells.block_tables.shape[1]:
        row = int(high.argmax())
        raise wrong_length(row, int(high[row]), cells.block_tables.shape[1] * block_size)
    edges = torch.arange(0, columns, tile.blocks, device=low.device) * block_size
    ends = (edges + tile.blocks * block_size).clamp(max=columns * block_size)
    needed = (low < ends[:, None]) & (high > edges[:, None])
    full = (full_low <= edges[:, None]) & (full_high >= ends[:, None])
    if cells.mask is not None:
        full = torch.zeros_like(full)
    summary = torch.stack((needed.any(1), needed.all(1), (full | ~needed).all(1)), 1)
    for index, (some, every, plain) in enumerate(summary.tolist()):
        if not some:
            continue
        rows = None if every else needed[index].nonzero().squeeze(1)
        part = cells if rows is None else cells.take(rows)
        first = index * tile.blocks
        last = min(first + tile.blocks, columns)
        part = replace(part, block_tables=part.block_tables[:, first:last])
        # A freed block may be a -1 in the middle of a table.
        hidden = not plain or bool((part.block_tables < 0).any())
        yield rows, part, first * block_size, last * block_size, hidden


def _add_tile(
    tile: _Tile,
    cells: _Cells,
    query: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    start: int,
    stop: int,
    masked: bool,
) -> None:
    """Add kv tokens [start, stop) to `state`: maximum, sum of weights, weighted values."""
    highest, total, summed = state
    keys = _read(tile.key_cache, tile.key_scales, cells.block_tables, query.dtype)
    values = _read(tile.value_cache, tile.value_scales, cells.block_tables, query.dtype)
    scores = _matmul(query, keys.transpose(2, 3)).view(*highest.shape, stop - start)
    if tile.softcap is not None:
        scores = scores.div_(tile.softcap).tanh_().mul_(tile.softcap)
    if masked:
        scores, seen = _hide(cells, scores, start, stop)
        # 0 * NaN is NaN: hidden values must be cleared, a weight of 0 is not enough.
        _clear(values.transpose(1, 2), ~seen)
    new_highest = torch.maximum(highest, scores.amax(-1))
    rescale = torch.exp(highest - new_highest)
    weights = scores.sub_(new_highest[..., None]).exp_()
    highest.copy_(new_highest)
    total.mul_(rescale).add_(weights.sum(-1))
    summed.mul_(rescale.flatten(2)[..., None])
    summed.add_(_matmul(weights.flatten(2, 3), values))


def _hide(cells: _Cells, scores: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return scores [R, K, G, Q, N] with hidden ones -inf, and the tokens any query sees [R, N]."""
    visible = cells.visible(start, stop)
    if cells.mask is not None:
        allowed, bias = _mask_tile(cells.mask, cells, start, stop)
        visible = visible & allowed
        if bias is not None:
            scores = scores + _per_group(bias.to(scores.dtype), scores)
    scores = scores.masked_fill_(~_per_group(visible, scores), float("-inf"))
    return scores, visible.any(2).any(1)


def _mask_tile(mask: Tensor, cells: _Cells, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """Return the mask for kv tokens [start, stop): visible and bias, each [R, 1 or H, Q, N]."""
    offset = mask.shape[2] - cells.longest
    part = mask[:, :, offset + cells.first : offset + cells.last]
    width = part.shape[3]
    token = torch.arange(start, stop, device=part.device)
    column = token - cells.seq_lens[:, None] + width
    inside = ((column >= 0) & (column < width))[:, None, None, :]
    index = column.clamp(0, width - 1)[:, None, None, :]
    part = part.expand(len(column), -1, -1, -1)
    part = part.gather(3, index.expand(*part.shape[:3], -1))
    if part.dtype == torch.bool:
        return part & inside, None
    # Libraries mask with -inf or with the lowest number of the dtype.
    return (part > torch.finfo(part.dtype).min) & inside, part


def _per_group(tensor: Tensor, scores: Tensor) -> Tensor:
    """View [R, 1 or H, Q, N] as [R, 1 or K, 1 or G, Q, N], to broadcast over scores."""
    R, heads, Q, N = tensor.shape
    K, G = scores.shape[1:3] if heads > 1 else (1, 1)
    return tensor.reshape(R, K, G, Q, N)


def _read(cache: Tensor, scales: Tensor | None, block_tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the blocks of `block_tables` [R, n] as a contiguous [R, K, n * block_size, D]."""
    R, n = block_tables.shape
    _, block_size, K, D = cache.shape
    index = block_tables.clamp(min=0).flatten()
    blocks = indexable(cache).index_select(0, index).view(cache.dtype)
    tokens = blocks.view(R, n * block_size, K, D).transpose(1, 2)
    # One pass converts and groups tokens by head, so that the matmuls copy nothing.
    read = torch.empty(tokens.shape, dtype=dtype, device=cache.device).copy_(tokens)
    if scales is not None:
        read *= scales.index_select(0, index).view(R, n * block_size, K, 1).transpose(1, 2)
    return read


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [R, K, a, b] @ [R, K, b, c] without the copies of torch.matmul."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[3])
