"""Let transformers' flash attention functions read paged keys and values in place.

Flash attention takes no 4D masks, but None or a 2D padding mask [rows, kv columns]. It is causal by
alignment to the right: the last query is the last token. It takes windows, soft caps and sinks as
arguments, as the paged kernel does. The paged kernel serves a call if the mask hides exactly the
padding that was never stored. The original function serves every other call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.flash_attention import flash_attention_forward

from kvpager.integrations.huggingface.attention.functions import AttentionFunction, in_place
from kvpager.integrations.huggingface.cache.paged_tensor import common_view
from kvpager.integrations.huggingface.cache.paged_view import PagedView

# Flash attention computes in these dtypes only; transformers casts others, which changes tokens.
_DTYPES = (torch.float16, torch.bfloat16)
# Arguments that pack several sequences into a row, or that pass keys and values in other ways.
_OTHER_LAYOUTS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "block_table", "cache",
    "position_bias",
)  # fmt: skip


def flash_names(registered: Mapping[str, AttentionFunction]) -> Iterator[str]:
    """Yield the names of registered functions with flash attention's arguments. O(names)."""
    for name, function in registered.items():
        if name.startswith("flash_attention_") or function is flash_attention_forward:
            yield name


def reading_flash_in_place(original: AttentionFunction) -> AttentionFunction:
    """Return a flash attention that reads paged tensors in place, or else calls `original`."""

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
        if view is not None:
            options = _options(view, module, query, attention_mask, **kwargs)
            if options is not None:
                output = in_place(module, query, key, value, None, **options)
                if output is not None:
                    return output, None
        return original(module, query, key, value, attention_mask, **kwargs)

    return attention


def _options(
    view: PagedView,
    module: nn.Module,
    query: Tensor,  # [rows, query_heads, q_len, head_dim]
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> dict[str, Any] | None:
    """Return the call's options for the paged kernel; None if the kernel computes other results."""
    if query.dtype not in _DTYPES or any(others.get(name) is not None for name in _OTHER_LAYOUTS):
        return None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # transformers' own rule. Without causality, the window would extend to both sides.
    windowed = sliding_window is not None and view.stop - view.start > sliding_window
    if not causal and (windowed or mask is not None):
        return None
    if mask is None and _is_packed(position_ids, query):
        return None
    if not _hides_padding_only(mask, view):
        return None
    return {
        "dropout": dropout,
        "scaling": scaling,
        "causal": causal,
        "window": sliding_window if windowed else None,
        "softcap": softcap or None,  # 0 means no soft cap
        "s_aux": None if s_aux is None else s_aux.to(query.dtype),  # as transformers does
    }


def _is_packed(positions: Tensor | None, query: Tensor) -> bool:
    """Return True if positions restart within a single row, which then holds several sequences."""
    rows, _, q_len, _ = query.shape
    if positions is None or rows > 1 or q_len == 1:
        return False
    if positions.shape != (1, q_len):
        return True
    steps = torch.arange(q_len, device=positions.device)
    return not torch.equal((positions - positions.min())[0].to(steps.dtype), steps)


def _hides_padding_only(mask: Tensor | None, view: PagedView) -> bool:
    """Return True if `mask` hides exactly the padding, which no block holds.

    All layers of a step get the same mask, which is compared once. Waits for a GPU then, as
    transformers' own unpadding does. Without a mask, it does not wait.
    """
    if mask is None:
        return int(view.padding.max(initial=0)) <= view.start
    if mask.is_inference():  # such a tensor does not tell whether it changed
        return _is_padding(mask, view)
    state = mask._version, view.start, view.stop
    before, padding, result = _compared.get(mask, (None, None, False))
    if before != state or padding is not view.padding:
        result = _is_padding(mask, view)
        _compared[mask] = state, view.padding, result
    return bool(result)


# By mask: its version with the columns of the view, the view's padding, and the result.
_compared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _is_padding(mask: Tensor, view: PagedView) -> bool:
    columns = torch.arange(view.start, view.stop, device=mask.device)
    padding = torch.from_numpy(view.padding).to(mask.device)
    return torch.equal(mask.to(torch.bool), columns >= padding[:, None])
