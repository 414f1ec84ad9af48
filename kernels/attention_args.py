"""Attention arguments that all layers of a step share, validated once per step."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from kvpager.kernels.args import (
    require_apart,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_floating,
    require_integers,
    require_rows,
    require_same,
    require_shape,
    require_tensors,
)
from kvpager.kernels.host_rows import HostRows
from kvpager.kernels.layer_caches import LayerCaches

# The range of the kernels' float32 maths.
_FLOAT_MIN, _FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_WINDOW_MAX = 1 << 62
_TENSORS = ("block_tables", "seq_lens", "cu_seqlens_q", "kv_starts", "mask")
_NUMBERS = (float, int, np.floating)  # other reals, such as fractions, tensors do not know


@dataclass(frozen=True, slots=True, eq=False)
class AttentionArgs:
    """Rows of a step, their masking, and how to compute scores. `paged_attention` documents each.

    Make one object per step and pass it to `attend` for each layer, like plan and run in FlashInfer
    (Ye et al., 2025). The constructor checks the shared arguments. O(1).
    Raises: `ValueError`, `TypeError` for arguments that do not fit together.
    """

    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    mask: Tensor | None = None
    kv_starts: Tensor | None = None
    host_rows: HostRows | None = None

    def __post_init__(self) -> None:
        require_tensors(block_tables=self.block_tables, seq_lens=self.seq_lens)
        rows = require_rows(self.block_tables, self.seq_lens)
        if self.cu_seqlens_q is not None:
            _require_row_numbers("cu_seqlens_q", self.cu_seqlens_q, rows + 1, "[rows + 1]")
        if self.kv_starts is not None:
            _require_row_numbers("kv_starts", self.kv_starts, rows, "[rows]")
        _require_options(self.softmax_scale, self.causal, self.window, self.softcap)
        if self.mask is not None:
            _require_mask(self.mask)
        if self.host_rows is not None:
            self.host_rows.require_fit(self.block_tables, self.seq_lens, self.cu_seqlens_q)

    def require_layer(self, query: Tensor, caches: LayerCaches, sinks: Tensor | None) -> None:
        """Check a layer's tensors against the rows. O(1). Raises: as the constructor."""
        if sinks is None and self._fits(query, caches):
            return
        require_tensors(query=query)
        _require_query(query, caches.key, quantised=caches.scales is not None)
        rows, query_heads = len(self.block_tables), query.shape[1]
        if self.cu_seqlens_q is None and len(query) != rows:
            fix = "pass cu_seqlens_q unless every row has one"
            raise ValueError(f"query has {len(query)} tokens for {rows} rows; {fix}")
        if sinks is not None:
            require_tensors(sinks=sinks)
            require_shape("sinks", sinks, (query_heads,), "[query_heads]")
            if not sinks.is_floating_point():
                raise TypeError(f"sinks.dtype={sinks.dtype}: expected a floating dtype")
        mask = self.mask
        if mask is not None:
            if mask.shape[0] not in (1, rows) or mask.shape[1] not in (1, query_heads):
                raise ValueError(
                    f"mask has shape {list(mask.shape)}; "
                    f"pass [1 or {rows}, 1 or {query_heads}, max queries, kv]"
                )
            if mask.shape[2] == 0 and len(query):
                why = "mask has 0 query rows, but a row has 1 or more queries; pass them all"
                raise ValueError(why)
        shared = {name: getattr(self, name) for name in _TENSORS}
        require_device(caches.key, query=query, sinks=sinks, **shared)

    def _fits(self, query: Tensor, caches: LayerCaches) -> bool:
        """Return True for the usual arguments of a decode step; False needs a full check. O(1)."""
        if self.mask is not None or caches.scales is not None:
            return False
        if not isinstance(query, Tensor) or query.dim() != 3:
            return False
        tokens, query_heads, head_dim = query.shape
        key_cache, starts, behind = caches.key, self.cu_seqlens_q, self.kv_starts
        _, _, kv_heads, cached_dim = key_cache.shape
        device = query.device
        return (
            head_dim == cached_dim
            and query_heads % kv_heads == 0
            and (starts is not None or tokens == len(self.block_tables))
            and query.dtype is key_cache.dtype
            and query.stride()[2] == 1
            and device == key_cache.device == self.block_tables.device == self.seq_lens.device
            and (starts is None or starts.device == device)
            and (behind is None or behind.device == device)
        )


def require_out(out: Tensor, query: Tensor, caches: LayerCaches) -> None:
    """Check the tensor for the result of a call. O(1). Raises: as `AttentionArgs`."""
    require_tensors(out=out)
    shape = (query.shape[0], query.shape[1], caches.value.shape[3])
    require_shape("out", out, shape, "[tokens, query_heads, value_head_dim]")
    require_same("out", out, "query", query)
    require_device(caches.key, out=out)
    if not out.is_contiguous():
        raise ValueError(
            f"out has strides {list(out.stride())}, but it has to be contiguous; "
            f"pass torch.empty({list(shape)}), or copy the result"
        )
    require_apart("out", out, query=query, key_cache=caches.key, value_cache=caches.value)


def _require_row_numbers(name: str, tensor: Tensor, length: int, meaning: str) -> None:
    require_tensors(**{name: tensor})
    require_shape(name, tensor, (length,), meaning)
    require_integers(name, tensor)


def _require_query(query: Tensor, key_cache: Tensor, *, quantised: bool) -> None:
    require_dims("query", query, "[tokens, query_heads, head_dim]", 3)
    query_heads, kv_heads = query.shape[1], key_cache.shape[2]
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {kv_heads} kv heads")
    head_dim, cached_dim = query.shape[2], key_cache.shape[3]
    if head_dim != cached_dim:
        raise ValueError(f"query has head_dim {head_dim}, but key_cache has {cached_dim}")
    require_floating("query.dtype", query.dtype)
    if not quantised:
        require_same("query", query, "key_cache", key_cache)
    require_contiguous_rows(query=query)


def _require_options(
    softmax_scale: float | None, causal: bool, window: int | None, softcap: float | None
) -> None:
    if softmax_scale is not None and not isinstance(softmax_scale, _NUMBERS):
        allowed = "a number, or None for head_dim ** -0.5"
        raise TypeError(f"softmax_scale={softmax_scale!r}: expected {allowed}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal={causal!r}: expected True or False")
    if window is not None and (not isinstance(window, Integral) or isinstance(window, bool)):
        raise TypeError(f"window={window!r}: expected a whole number of tokens, or None")
    if softcap is not None and not isinstance(softcap, _NUMBERS):
        raise TypeError(f"softcap={softcap!r}: expected a number, or None for no cap")
    if window is not None and not 1 <= window <= _WINDOW_MAX:
        raise ValueError(f"window={window}: expected at least 1 token, or None for no window")
    if softmax_scale is not None and not abs(softmax_scale) <= _FLOAT_MAX:
        raise ValueError(f"softmax_scale={softmax_scale}: expected a finite 32-bit number")
    if softcap is not None and not _FLOAT_MIN <= softcap <= _FLOAT_MAX:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None for no cap")


def _require_mask(mask: Tensor) -> None:
    require_tensors(mask=mask)
    require_dims("mask", mask, "[1 or rows, 1 or query_heads, max queries, kv]", 4)
    if mask.shape[3] == 0:
        raise ValueError("mask has 0 columns, so it hides everything; pass at least one")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask.dtype={mask.dtype}: expected torch.bool or a floating dtype")
