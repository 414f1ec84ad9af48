"""Attention over what a view shows, by the paged kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpager.integrations.huggingface.views import PagedView, Part, packed
from kvpager.kernels.paged_attention import paged_attention


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
    options = {
        "sinks": sinks, "scale": scaling, "causal": causal, "softcap": softcap, "window": window
    }  # fmt: skip
    view.group.memory.counters.in_place_reads += 1
    if len(view.parts) == 1:
        return _attend_part(view, view.parts[0], query, mask, options)
    output = None
    for part in view.parts:
        assert part.rows is not None
        theirs = mask if mask is None or len(mask) == 1 else mask[part.rows]
        of_part = _attend_part(view, part, query[part.rows], theirs, options)
        if output is None:
            output = of_part.new_empty(len(query), *of_part.shape[1:])
        output[part.rows] = of_part
    assert output is not None
    return output


def _attend_part(
    view: PagedView, part: Part, query: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The output of the rows that are in one storage."""
    rows, query_heads, q_len, _ = query.shape
    starts = None
    if q_len > 1:
        starts = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
    blocks = part.on(query.device)
    output = paged_attention(
        packed(query),
        blocks.key_cache,
        blocks.value_cache,
        blocks.tables,
        blocks.kv_lens,
        starts,
        mask=mask,
        kv_starts=blocks.kv_starts(view.stop - view.start) if view.start else None,
        scales=blocks.scales,
        **options,
    )
    return output.view(rows, q_len, query_heads, -1)
