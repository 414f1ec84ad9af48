"""Attention that reads keys and values where they are: in the blocks of a paged cache."""

from __future__ import annotations

from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import without_gradients
from kvpager.kernels.attention_args import AttentionArgs, require_out
from kvpager.kernels.backends import select
from kvpager.kernels.host_rows import HostRows
from kvpager.kernels.layer_caches import LayerCaches


@without_gradients
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    kv_starts: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    host_rows: HostRows | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute attention of packed queries over paged KV. O(kv tokens seen * query heads * dims).

    Returns [tokens, query_heads, value_head_dim] in the dtype of `query`, accumulated in float32
    or float64. Handles decode, prefill, chunked prefill over a cached prefix, and mixed batches.

    Tensors, all on one device:

    - `query` [tokens, query_heads, head_dim]: the rows' query tokens, one row after the other,
      the last dimension contiguous. `query_heads` is a multiple of `kv_heads`; query head h reads
      kv head `h // (query_heads // kv_heads)` (GQA, Ainslie et al., 2023).
    - `key_cache` [blocks, block_size, kv_heads, head_dim] and `value_cache` [.., value_head_dim],
      the views of `BlockStorage.layer`: of the dtype of `query`, or quantised.
    - `block_tables` int32 [rows, max_blocks]: -1 is no block; its tokens are masked. The kernel
      ignores entries past a row's last token.
    - `seq_lens` int32 or int64 [rows]: tokens of each row in the cache, its queries included.
    - `cu_seqlens_q` int32 or int64 [rows + 1]: row r has the queries `cu_seqlens_q[r]` to
      `cu_seqlens_q[r + 1]`. Leave it out if every row has one query (decode).

    A row's queries are its last tokens: query i of n is at position `seq_len - n + i`. A query that
    sees no token returns 0, such as a causal query at a negative position (left padding).

    Options:

    - `softmax_scale`: factor of the scores, `head_dim ** -0.5` unless given.
    - `causal`: a query sees no later token. `False`: it sees its whole row (cross attention).
    - `window`, at least 1: a query at position p sees only tokens after position `p - window`.
    - `softcap`: scores become `softcap * tanh(score / softcap)`, after scaling and before the mask.
    - `sinks` [query_heads] (attention sinks): one more logit per head in the softmax, which adds
      nothing to the output.
    - `mask` [1 or rows, 1 or query_heads, max queries, kv tokens], bool (True: visible) or float
      (added to the scores; -inf or the dtype's lowest number: masked). It may have any number of
      columns, and is **right-aligned** both ways: its last column is each row's last token, its
      last row each row's last query. Left-padded batches need no special case. Tokens before its
      first column are masked. `causal` and `window` still apply: pass `causal=False` if the mask is
      causal already.
    - `kv_starts` int32 or int64 [rows]: the kernel reads no token of the row before this one.
    - `scales`, for caches of int8 or float8_e4m3fn: (key scales, value scales), each float32
      [blocks, block_size, kv_heads], from `BlockStorage.scales` (see `quantisation.py`).
    - `host_rows`: the values of `block_tables`, `seq_lens` and `cu_seqlens_q` as NumPy arrays. Pass
      one `HostRows` to all layers of a step: a GPU kernel then plans once per step, without
      reading the tensors back from the GPU.
    - `out` [tokens, query_heads, value_head_dim], contiguous, of the dtype of `query`: the kernel
      writes the result there and returns `out`. It must not share memory with `query` or a cache.

    Numbers in slots that no query sees, NaNs included, never reach the output.

    Raises: `ValueError`, `TypeError` for wrong shapes, strides, dtypes, devices or options. Only
    the native CPU kernel and debug mode (`KVPAGER_DEBUG=1`) check that lengths, `cu_seqlens_q` and
    table entries are in range, because the check would wait for a GPU.

    Block tables follow PagedAttention (Kwon et al., 2023). The online softmax is that of Milakov &
    Gimelshein (2018), as in FlashAttention (Dao et al., 2022).
    """
    args = AttentionArgs(
        block_tables, seq_lens, cu_seqlens_q, softmax_scale, causal, window, softcap, mask,
        kv_starts, host_rows,
    )  # fmt: skip
    return attend(query, LayerCaches(key_cache, value_cache, scales), args, sinks=sinks, out=out)


@without_gradients
def attend(
    query: Tensor,
    caches: LayerCaches,
    args: AttentionArgs,
    *,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `paged_attention` with caches that all steps share, and rows that all layers share.

    Arguments, result, complexity and errors are those of `paged_attention`.
    """
    args.require_layer(query, caches, sinks)
    if out is not None:
        require_out(out, query, caches)
    if debug.enabled():
        debug.check_attention(query, caches.key, args)
    output: Tensor = select("paged_attention", caches.key.device)(
        query, caches.key, caches.value, args, sinks, caches.scales, out
    )
    return output
