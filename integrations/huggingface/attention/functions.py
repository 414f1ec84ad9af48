"""Let transformers' attention functions read paged keys and values in place.

transformers looks up attention functions in a registry. While a patch is active, the registry's
`sdpa` is `reading_in_place(original)`. It passes paged keys and values to the paged kernel. If the
kernel does not cover a case, the original computes it, and the paged tensors gather themselves.

`kvpager` is a further name in the registry, with or without a patch. It also takes soft caps and
sinks, which `sdpa` refuses. Gemma 2, gpt-oss and T5Gemma, which otherwise need `eager`, can so read
blocks in place.

    model.set_attn_implementation("kvpager")
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.attention import packed, packed_custom_ops
from kvpager.integrations.huggingface.cache import custom_ops
from kvpager.integrations.huggingface.cache.paged_tensor import common_view

NAME = "kvpager"
# The kernel takes these options, but transformers' `sdpa` refuses or ignores them. A patched model
# has to behave like an unpatched one.
_NOT_OF_SDPA = ("softcap", "s_aux")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def reading_in_place(original: AttentionFunction) -> AttentionFunction:
    """Return an attention that reads paged tensors in place, or else calls `original`."""

    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not any(kwargs.get(name) is not None for name in _NOT_OF_SDPA):
            output = in_place(*args, **kwargs)
            if output is not None:
                return output, None
        return original(*args, **kwargs)

    return attention


def register() -> None:
    """Register `kvpager` as the name of an attention implementation. O(1).

    The name replaces none, so it stays registered when patches are undone.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as the implementation `kvpager`. O(queries * kv tokens * heads * dims).

    Reads paged keys and values in place if no gradients are needed. Otherwise it calls
    transformers' `sdpa`, or with a soft cap or sinks computes in plain torch as `eager` does.
    Returns no attention weights.
    """
    indices = kwargs.pop("indices", None)
    if indices is not None:
        attention_mask = _chosen(attention_mask, indices, key.shape[2])
    output = in_place(module, query, key, value, attention_mask, **kwargs)
    if output is not None:
        return output, None
    if any(kwargs.get(name) is not None for name in _NOT_OF_SDPA):
        return _dense(module, query, key, value, attention_mask, **kwargs), None
    weightless: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return weightless


def in_place(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the paged kernel's output; None if the kernel cannot serve the call. O(kv tokens).

    With `causal` among the options, the queries are a row's last tokens, as in flash attention.
    Without it, arguments have the meaning that `sdpa` gives them.
    """
    if query.requires_grad:
        return None
    if torch.compiler.is_compiling():
        step = packed_custom_ops.common_mark(key, value)
        if step is not None:
            return packed_custom_ops.attend(step, query, key, value, **kwargs)
        mark = custom_ops.common_mark(key, value)
        if mark is None or not mark.layer.group.budget.in_place:
            return None
        shown = key.shape[0], key.shape[2], key.dtype
        attend: Any = functools.partial(custom_ops.attend, mark, value_dim=value.shape[3])
    else:
        view = common_view(key, value)
        if isinstance(view, packed.PackedView):
            return packed.attend(view, module, query, **kwargs)
        if view is None or not view.budget.in_place:
            return None
        shown = view.num_rows, view.stop - view.start, view.dtype
        attend = view.attend
    return _attend(attend, shown, module, query, attention_mask, **kwargs)


def _attend(
    attend: Callable[..., Tensor],
    shown: tuple[int, int, torch.dtype],  # of the keys: rows, columns, dtype
    module: nn.Module,
    query: Tensor,  # [rows, query_heads, q_len, head_dim]
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    causal: bool | None = None,
    window: int | None = None,
    **others: Any,
) -> Tensor | None:
    """Return the output [rows, q_len, query_heads, value_dim]; None if the kernel cannot."""
    q_len = query.shape[2]
    kv_rows, kv_len, kv_dtype = shown
    if dropout or query.shape[0] != kv_rows or query.dtype != kv_dtype:
        return None
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (q_len, kv_len)):
        return None
    if causal is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # As in transformers: a mask includes causality, and a single query is the last token.
        causal = q_len > 1 and mask is None and bool(is_causal)
        if causal and kv_len != q_len:
            return None
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    options = {"softmax_scale": scaling, "causal": causal, "softcap": softcap}
    if window is not None:
        options["window"] = window
    return attend(query, mask=mask, sinks=s_aux, **options)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Return what `_attend` returns, over dense tensors, differentiable; computed as by `eager`."""
    groups, q_len, kv_len = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is None and is_causal and q_len > 1:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(len(scores), -1, q_len, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., :kv_len]
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous()


def _chosen(mask: Tensor | None, indices: Tensor, kv_len: int) -> Tensor:
    """Return `mask` reduced to the keys that an indexer chose: `indices` [rows, queries, k].

    Models with an indexer apply it themselves for `eager` and `sdpa` only.
    """
    chosen = torch.zeros(*indices.shape[:2], kv_len, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:  # causal attention
        return chosen.tril(kv_len - indices.shape[1])
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return the position bias and the mask as one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask
