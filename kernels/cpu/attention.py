"""`paged_attention` by the native kernel, or the reference kernel for unsupported dtypes.

Prefill reads blocks in place too, in less time than gathering them for torch's fused attention,
except in the portable build. `docs/kernels.md` has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.args import short_mask, unknown_block, wrong_length, wrong_start
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.cpu.library import TYPES, Kernel, Problem, address, int32_rows, integers

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SEQ_LEN, _TABLE_ENTRY, _CU_SEQLENS_Q = 1, 2, 3  # the codes of kernels.cpp; 4: a mask too short


class PagedAttention(Kernel):
    """`paged_attention` of one library; `num_calls` counts the calls that the native kernel ran."""

    num_calls = 0

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        args: AttentionArgs,
        sinks: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute `reference.paged_attention`.

        Raises: `ValueError` for lengths, `cu_seqlens_q` or table entries that exceed the tables,
        the queries or the cache, before reading keys or values.
        """
        mask = args.mask
        if not _is_covered(query, key_cache, mask, scales):
            caches = (key_cache, value_cache)
            return reference.paged_attention(query, *caches, args, sinks, scales, out)
        tokens, query_heads, head_dim = query.shape
        num_blocks, block_size, kv_heads, value_dim = value_cache.shape
        output = query.new_empty(tokens, query_heads, value_dim) if out is None else out
        block_tables, seq_lens = int32_rows(args.block_tables), args.seq_lens.contiguous()
        kv_starts = None if args.kv_starts is None else args.kv_starts.contiguous()
        cu_seqlens_q = None if args.cu_seqlens_q is None else args.cu_seqlens_q.contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        key_scales, value_scales = scales or (None, None)
        problem = self._library.call(
            "paged_attention",
            query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), output.data_ptr(),
            address(key_scales), address(value_scales), block_tables.data_ptr(),
            *integers(seq_lens), *integers(kv_starts), *integers(cu_seqlens_q),
            address(mask), address(sinks),
            TYPES[query.dtype], TYPES[key_cache.dtype], 0 if mask is None else TYPES[mask.dtype],
            len(block_tables), tokens, query_heads, kv_heads, head_dim, value_dim,
            num_blocks, block_size, block_tables.shape[1], block_tables.stride(0),
            *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
            *((0, 0, 0) if key_scales is None else key_scales.stride()),
            *((0, 0) if mask is None else mask.shape[2:]), *_mask_strides(mask),
            args.causal, args.window or 0, torch.get_num_threads(),
            head_dim**-0.5 if args.softmax_scale is None else args.softmax_scale,
            args.softcap or 0.0,
        )  # fmt: skip
        if problem is not None:
            raise _error(problem, block_tables, query, key_cache, mask)
        self.num_calls += 1
        return output


def _is_covered(
    query: Tensor, key_cache: Tensor, mask: Tensor | None, scales: tuple[Tensor, Tensor] | None
) -> bool:
    if query.dtype not in _FLOATS or key_cache.dtype not in TYPES:
        return False
    if mask is not None and mask.dtype not in TYPES:
        return False
    # The native kernel takes one set of strides for both scales.
    return scales is None or scales[0].stride() == scales[1].stride()


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Return the mask's strides, 0 if one entry applies to all rows or heads."""
    if mask is None:
        return 0, 0, 0, 0
    row, head, query, column = mask.stride()
    return row * (mask.shape[0] > 1), head * (mask.shape[1] > 1), query, column


def _error(
    problem: Problem, block_tables: Tensor, query: Tensor, cache: Tensor, mask: Tensor | None
) -> ValueError:
    row, column, value = problem.numbers
    if problem.code == _SEQ_LEN:
        return wrong_length(row, value, block_tables.shape[1] * cache.shape[1])
    if problem.code == _TABLE_ENTRY:
        return unknown_block(row, column, value, len(cache))
    if problem.code == _CU_SEQLENS_Q:
        return wrong_start(row, value, len(query))
    assert mask is not None
    return short_mask(mask, value)
