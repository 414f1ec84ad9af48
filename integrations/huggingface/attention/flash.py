"""transformers' flash attention functions, reading paged keys and values in place.

Flash attention knows no 4D masks: it is given None or a 2D mask of padding [rows, kv columns], is
causal by alignment to the right (the last query is the last token), and takes windows, soft caps
and sinks as arguments. The paged kernel means the same by them. It is asked where the padding that
the mask tells of is the padding that was never stored; everything else goes to the original.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward

from kvpager.integrations.huggingface.attention.functions import AttentionFunction, in_place
from kvpager.integrations.huggingface.cache.paged_tensor import common_view
from kvpager.integrations.huggingface.cache.paged_view import PagedView

# Flash attention computes in these alone; transformers casts others, and so would change tokens.
_DTYPES = (torch.float16, torch.bfloat16)
# Arguments by which several sequences stand in one row, or keys and values elsewhere.
_OTHER_LAYOUTS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "block_table", "cache",
    "position_bias",
)  # fmt: skip


def flash_names(registered: Mapping[str, AttentionFunction]) -> Iterator[str]:
    """The names in the registry whose functions take what flash attention takes. O(names)."""
    for name, function in registered.items():
        if name.startswith("flash_attention_") or function is flash_attention_forward:
            yield name


def reading_flash_in_place(original: AttentionFunction) -> AttentionFunction:
    """A flash attention that reads handles in place and leaves the rest to `original`."""

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
    """The same call as options of the paged kernel; None where it would mean something else."""
    if query.dtype not in _DTYPES or any(others.get(name) is not None for name in _OTHER_LAYOUTS):
        return None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # transformers' own rule. Without causality it would be a window to both sides.
    windowed = sliding_window is not None and view.stop - view.start > sliding_window
    if not causal and (windowed or mask is not None):
        return None
    if mask is None and _is_packed(position_ids, query):
        return None
    if not _says_what_was_stored(mask, view):
        return None
    return {
        "dropout": dropout,
        "scaling": scaling,
        "causal": causal,
        "window": sliding_window if windowed else None,
        "softcap": softcap or None,  # 0 is none
        "s_aux": None if s_aux is None else s_aux.to(query.dtype),  # as transformers does
    }


def _is_packed(positions: Tensor | None, query: Tensor) -> bool:
    """Whether positions of a single row begin anew in it: then it is several sequences."""
    rows, _, q_len, _ = query.shape
    if positions is None or rows > 1 or q_len == 1:
        return False
    if positions.shape != (1, q_len):
        return True
    steps = torch.arange(q_len, device=positions.device)
    return not torch.equal((positions - positions.min())[0].to(steps.dtype), steps)


def _says_what_was_stored(mask: Tensor | None, view: PagedView) -> bool:
    """Whether `mask` hides the columns that no block holds, and no other. Waits for a GPU, as
    transformers' own unpadding does; without a mask, nothing is waited for."""
    if mask is None:
        return int(view.padding.max(initial=0)) <= view.start
    columns = torch.arange(view.start, view.stop, device=mask.device)
    padding = torch.from_numpy(view.padding).to(mask.device)
    return torch.equal(mask.to(torch.bool), columns >= padding[:, None])
