"""Attention over a view by the paged kernel."""

from __future__ import annotations

from torch import Tensor

from kvpager.integrations.huggingface.cache.paged_view import PagedView, Part, packed
from kvpager.ops import attend as attend_in_place


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
    """Return the output [rows, q_len, query_heads, value_dim].

    `query` is [rows, query_heads, q_len, dim]. Reads the blocks in place, and counts the read.
    O(queries * kv tokens * heads * dims).
    """
    options = (scaling, causal, softcap, window)
    view.budget.counters.in_place_reads += 1
    if len(view.parts) == 1:
        return _attend_part(view, view.parts[0], query, mask, sinks, *options)
    output = None
    for part in view.parts:
        assert part.rows is not None
        part_mask = mask if mask is None or len(mask) == 1 else mask[part.rows]
        of_part = _attend_part(view, part, query[part.rows], part_mask, sinks, *options)
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
    softmax_scale: float | None,
    causal: bool,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Return the output of the rows in one storage."""
    rows, query_heads, q_len, _ = query.shape
    blocks = part.on(query.device)
    args = blocks.tables.args(
        q_len,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        mask=mask,
        num_columns=view.stop - view.start if view.start else None,
    )
    output = attend_in_place(packed(query), blocks.caches, args, sinks=sinks)
    return output.view(rows, q_len, query_heads, -1)
