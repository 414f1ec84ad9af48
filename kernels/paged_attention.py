"""Attention that reads keys and values where they are: in the blocks of a paged cache."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import (
    Fitting,
    layout_of,
    layout_of_scales,
    require_caches,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_floating,
    require_integers,
    require_rows,
    require_same,
    require_shape,
    require_tensors,
    without_gradients,
)
from kvpager.kernels.backends import select
from kvpager.kernels.host_rows import HostRows

# What kernels compute with.
_FLOAT_MIN, _FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_WINDOW_MAX = 1 << 62
_NUMBERS = (float, int, np.floating)  # other reals, such as fractions, tensors do not know

_fitting = Fitting()


@without_gradients
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    query_starts: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    kv_starts: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    host_rows: HostRows | None = None,
) -> Tensor:
    """Attention of packed queries over their rows' blocks. O(kv tokens seen * query heads * dims).

    Returns [tokens, query_heads, value_head_dim] in the dtype of `query`; sums are float32 at
    least. Serves decode, prefill, chunked prefill over a cached prefix, and any mix of them.

    Tensors, all on one device:

    - `query` [tokens, query_heads, head_dim]: the rows' query tokens, one row after the other,
      the last dimension contiguous. `query_heads` is a multiple of `kv_heads`; query head h reads
      kv head `h // (query_heads // kv_heads)` (GQA, Ainslie et al., 2023).
    - `key_cache` [blocks, block_size, kv_heads, head_dim] and `value_cache` [.., value_head_dim],
      the views of `BlockStorage.layer`: of the dtype of `query`, or quantised.
    - `block_tables` int32 [rows, max_blocks]; -1 is no block, and its tokens are seen by nobody.
      Entries past a row's last token are not looked at.
    - `kv_lens` int32 or int64 [rows]: tokens of each row in the cache, its queries' own included.
    - `query_starts` int32 or int64 [rows + 1]: row r has the queries `query_starts[r]` to
      `query_starts[r + 1]`. Leave it out when every row has one query (decode).

    A row's queries are its last tokens: query i of n stands at position `kv_len - n + i`. A query
    that may see nothing gives 0; so does a causal one at a negative position (left padding).

    Options:

    - `scale` of the scores; `head_dim ** -0.5` unless given.
    - `causal`: a query sees no later token. `False`: it sees all of its row (cross attention).
    - `window`: a query at position p sees only tokens after `p - window`, at least 1.
    - `softcap`: scores become `softcap * tanh(score / softcap)`, after scale and before mask.
    - `sinks` [query_heads]: one more logit per head that takes weight and has no value.
    - `mask` [1 or rows, 1 or query_heads, max queries, kv], bool (True: may look) or float (added
      to the scores; -inf or the dtype's lowest number: may not look). It is **right-aligned** both
      ways: its last column is each row's last token, its last row each row's last query, so
      left-padded batches need no special case. Tokens before its first column are not seen.
      `causal` and `window` still hold: pass `causal=False` when the mask already says it.
    - `kv_starts` int32 or int64 [rows]: tokens before it are not read.
    - `scales`, for caches of int8 or float8_e4m3fn: those of keys and of values, float32 [blocks,
      block_size, kv_heads], as `BlockStorage.scales` gives them (see `quantisation.py`).
    - `host_rows`: the values of `block_tables`, `kv_lens` and `query_starts` as NumPy arrays. Pass
      one `HostRows` to all layers of a step: a GPU kernel plans from it once, without waiting for
      the GPU to read the tensors back.

    Slots that no query of a row may see are never used in arithmetic, so stale NaNs in them are
    harmless. `ValueError` and `TypeError` for wrong shapes, strides, dtypes, devices and options.
    That lengths, query starts and table entries lead to what is there is looked at by the native
    CPU kernel, or in debug mode (`debug.py`), because looking waits for a GPU.

    Block tables are PagedAttention's (Kwon et al., 2023), the online softmax is that of Milakov &
    Gimelshein (2018) as used by FlashAttention (Dao et al., 2022).
    """
    tensors = (query, key_cache, value_cache, block_tables, kv_lens)
    options = (query_starts, kv_starts, sinks, mask)
    _fitting.check(
        layout_of(*tensors, *options),
        (layout_of_scales(scales), scale, causal, window, softcap),
        lambda: check_attention(*tensors, *options, scales, scale, causal, window, softcap),
    )
    return attend_checked(
        *tensors, query_starts, scale=scale, causal=causal, window=window, softcap=softcap,
        sinks=sinks, mask=mask, kv_starts=kv_starts, scales=scales, host_rows=host_rows,
    )  # fmt: skip


def attend_checked(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    query_starts: Tensor | None,
    *,
    host_rows: HostRows | None = None,
    **options: Any,
) -> Tensor:
    """`paged_attention` of what passed `check_attention`, or is laid out as what did."""
    if host_rows is not None:
        host_rows.require_fit(block_tables, kv_lens, query_starts)
    if debug.enabled():
        debug.check_host_rows(host_rows, block_tables, kv_lens, query_starts, key_cache.shape[1])
        debug.check_rows(block_tables, kv_lens, key_cache)
        debug.check_queries(query, query_starts, options.get("mask"))
        debug.check_kv_starts(options.get("kv_starts"))
    output: Tensor = select("paged_attention", key_cache.device)(
        query, key_cache, value_cache, block_tables, kv_lens, query_starts,
        host_rows=host_rows, **options,
    )  # fmt: skip
    return output


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    query_starts: Tensor | None,
    kv_starts: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    """`ValueError` or `TypeError` for what `paged_attention` does not take. O(1)."""
    optional = {
        "query_starts": query_starts,
        "kv_starts": kv_starts,
        "sinks": sinks,
        "mask": mask,
    }
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    require_tensors(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=block_tables,
        kv_lens=kv_lens,
        **given,
    )
    require_caches(key_cache, value_cache, scales)
    _check_query(query, key_cache, quantised=scales is not None)
    rows = require_rows(block_tables, kv_lens)
    _check_rows(rows, query, query_starts, kv_starts)
    _check_options(scale, causal, window, softcap)
    _check_biases(rows, query, sinks, mask)
    require_device(
        key_cache,
        query=query,
        block_tables=block_tables,
        kv_lens=kv_lens,
        **given,
    )


def _check_query(query: Tensor, key_cache: Tensor, *, quantised: bool) -> None:
    require_dims("query", query, "[tokens, query_heads, head_dim]", 3)
    query_heads, kv_heads = query.shape[1], key_cache.shape[2]
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {kv_heads} kv heads")
    if query.shape[2] != key_cache.shape[3]:
        raise ValueError(
            f"query has head_dim {query.shape[2]}, but key_cache has {key_cache.shape[3]}"
        )
    require_floating("query", query.dtype)
    if not quantised:
        require_same("query", query, "key_cache", key_cache)
    require_contiguous_rows(query=query)


def _check_rows(
    rows: int, query: Tensor, query_starts: Tensor | None, kv_starts: Tensor | None
) -> None:
    if query_starts is None:
        if query.shape[0] != rows:
            raise ValueError(
                f"query has {query.shape[0]} tokens for {rows} rows; "
                "pass query_starts unless every row has one"
            )
    else:
        require_shape("query_starts", query_starts, (rows + 1,), "[rows + 1]")
        require_integers("query_starts", query_starts)
    if kv_starts is not None:
        require_shape("kv_starts", kv_starts, (rows,), "[rows]")
        require_integers("kv_starts", kv_starts)


def _check_options(
    scale: float | None, causal: bool, window: int | None, softcap: float | None
) -> None:
    if scale is not None and not isinstance(scale, _NUMBERS):
        raise TypeError(f"scale is {scale!r}; pass a number, or None for head_dim ** -0.5")
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}; pass True or False")
    if window is not None and (not isinstance(window, Integral) or isinstance(window, bool)):
        raise TypeError(f"window is {window!r}; pass a whole number of tokens, or None")
    if softcap is not None and not isinstance(softcap, _NUMBERS):
        raise TypeError(f"softcap is {softcap!r}; pass a number, or None for no cap")
    if window is not None and not 1 <= window <= _WINDOW_MAX:
        raise ValueError(f"window is {window}; pass at least 1 token, or None for no window")
    if scale is not None and not abs(scale) <= _FLOAT_MAX:
        raise ValueError(f"scale is {scale}; pass a finite number, of 32 bits")
    if softcap is not None and not _FLOAT_MIN <= softcap <= _FLOAT_MAX:
        raise ValueError(f"softcap is {softcap}; pass more than 0, or None for no cap")


def _check_biases(rows: int, query: Tensor, sinks: Tensor | None, mask: Tensor | None) -> None:
    query_heads = query.shape[1]
    if sinks is not None:
        require_shape("sinks", sinks, (query_heads,), "[query_heads]")
        if not sinks.is_floating_point():
            raise TypeError(f"sinks is {sinks.dtype}; pass a floating dtype")
    if mask is None:
        return
    require_dims("mask", mask, "[1 or rows, 1 or query_heads, max queries, kv]", 4)
    if mask.shape[0] not in (1, rows) or mask.shape[1] not in (1, query_heads):
        raise ValueError(
            f"mask has shape {list(mask.shape)}; "
            f"pass [1 or {rows}, 1 or {query_heads}, max queries, kv]"
        )
    if mask.shape[2] == 0 and query.shape[0] > 0:
        raise ValueError("mask has 0 query rows, but a row has 1 or more queries; pass them all")
    if mask.shape[3] == 0:
        raise ValueError("mask has 0 columns, so it hides everything; pass at least one")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask is {mask.dtype}; pass torch.bool or a floating dtype")
