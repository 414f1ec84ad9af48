"""transformers' `sdpa` attention, reading paged keys and values in place.

transformers looks its attention functions up in a registry. While patched, `sdpa` there is
`reading_in_place(the original)`: a pair of handles goes to the paged kernel, everything else, and
every case the kernel does not cover, goes to the original, for which handles gather by themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvpager.integrations.huggingface.groups import PagedView
from kvpager.integrations.huggingface.handles import common_view, packed
from kvpager.kernels.paged_attention import paged_attention

# The kernel could serve these, but transformers' own `sdpa` refuses or ignores them, and a patched
# model has to do as the unpatched one.
_LEFT_TO_TRANSFORMERS = ("softcap", "s_aux")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def reading_in_place(original: AttentionFunction) -> AttentionFunction:
    """An attention function that reads handles in place and leaves the rest to `original`."""

    @functools.wraps(original)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        view = common_view(key, value)
        if view is not None and view.group.memory.in_place and not query.requires_grad:
            output = _attend(view, module, query, attention_mask, **kwargs)
            if output is not None:
                view.group.memory.counters.in_place_reads += 1
                return output, None
        return original(module, query, key, value, attention_mask, **kwargs)

    return attention


def _attend(
    view: PagedView,
    module: nn.Module,
    query: Tensor,  # [rows, query_heads, q_len, head_dim]
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The attention output [rows, q_len, query_heads, value_dim], or None if not covered."""
    rows, query_heads, q_len, _ = query.shape
    kv_len = view.stop - view.start
    key_cache, value_cache = view.caches()
    if dropout or rows != len(view.kv_lens) or query.dtype != view.storage.dtype:
        return None
    if any(others.get(name) is not None for name in _LEFT_TO_TRANSFORMERS):
        return None
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (q_len, kv_len)):
        return None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # As in transformers: a mask says it all, and a single query is the last token.
    causal = q_len > 1 and mask is None and bool(is_causal)
    if causal and kv_len != q_len:
        return None
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    starts = None
    if q_len > 1:
        starts = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
    output = paged_attention(
        packed(query),
        key_cache,
        value_cache,
        view.tables,
        view.kv_lens,
        starts,
        scale=scaling,
        causal=causal,
        mask=mask,
        kv_starts=view.kv_starts(),
        scales=view.scales(),
    )
    return output.view(rows, q_len, query_heads, -1)


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Position bias and mask as one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask
