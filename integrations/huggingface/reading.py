"""Attention over what a view shows, by the paged kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.integrations.huggingface.groups import PagedView
from kvpager.integrations.huggingface.handles import packed
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
) -> Tensor:
    """The output [rows, q_len, query_heads, value_dim] for `query` [rows, query_heads, q_len, dim].

    Reads the blocks in place and counts that. O(queries * kv tokens * heads * dims).
    """
    rows, query_heads, q_len, _ = query.shape
    starts = None
    if q_len > 1:
        starts = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
    output = paged_attention(
        packed(query),
        *view.caches(),
        view.tables,
        view.kv_lens,
        starts,
        scale=scaling,
        causal=causal,
        softcap=softcap,
        sinks=sinks,
        mask=mask,
        kv_starts=view.kv_starts(),
        scales=view.scales(),
    )
    view.group.memory.counters.in_place_reads += 1
    return output.view(rows, q_len, query_heads, -1)
