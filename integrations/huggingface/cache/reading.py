"""Attention over what a view shows, by the paged kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.views import PagedView, Part, packed
from kvpager.kernels.args import Fitting, layout_of
from kvpager.kernels.paged_attention import attend_checked, check_attention

# What a view reads is laid out as the kind of its layer says, and is not looked at again.
_fitting = Fitting()


def attend(
    view: PagedView,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    window: int | None = None,
) -> Tensor:
    """The output [rows, q_len, query_heads, value_dim] for `query` [rows, query_heads, q_len, dim].

    Reads the blocks in place and counts that. O(queries * kv tokens * heads * dims).
    """
    options = (scaling, causal, softcap, window)
    view.group.memory.counters.in_place_reads += 1
    if len(view.parts) == 1:
        return _attend_part(view, view.parts[0], query, mask, sinks, *options)
    output = None
    for part in view.parts:
        assert part.rows is not None
        theirs = mask if mask is None or len(mask) == 1 else mask[part.rows]
        of_part = _attend_part(view, part, query[part.rows], theirs, sinks, *options)
        if output is None:
            output = of_part.new_empty(len(query), *of_part.shape[1:])
        output[part.rows] = of_part
    assert output is not None
    return output


def _attend_part(
    view: PagedView,
    part: Part,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """The output of the rows that are in one storage."""
    rows, query_heads, q_len, _ = query.shape
    starts = None
    if q_len > 1:
        starts = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
    key_cache, value_cache, scales, tables, kv_lens, host_rows = blocks = part.on(query.device)
    kv_starts = blocks.kv_starts(view.stop - view.start) if view.start else None
    tensors = (packed(query), key_cache, value_cache, tables, kv_lens, starts)
    _fitting.check(
        layout_of(query, mask, sinks),
        (view.kind, scale, causal, window, softcap),
        lambda: check_attention(
            *tensors, kv_starts, sinks, mask, scales, scale, causal, window, softcap
        ),
    )
    output = attend_checked(
        *tensors, scale=scale, causal=causal, window=window, softcap=softcap,
        sinks=sinks, mask=mask, kv_starts=kv_starts, scales=scales,
        host_rows=host_rows.with_queries(q_len),
    )  # fmt: skip
    return output.view(rows, q_len, query_heads, -1)
