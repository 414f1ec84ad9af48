"""External backends for long prefills: FlashAttention or FlashInfer, if one is installed.

    KVPAGER_GPU_ATTENTION=auto | triton | flash_attn | flashinfer | varlen

`auto`, the default, gives long prefills to flash-attn (Dao, 2023) and all other calls to Triton.
`triton` uses no external backend. The other values use the named backend for every call that it
covers: `varlen` is `torch.nn.attention.varlen`, `flashinfer` is FlashInfer (Ye et al., 2025). An
external backend covers plain attention in 16 bits over whole tables. Triton runs everything else:
decode, windows, masks, sinks, soft caps, quantised caches and missing blocks.

The calls follow the documented signatures of the backends. This project has not run them on a GPU.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpager._text import listed
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.gpu.plans import AttentionPlan

CHOICES = ("auto", "triton", "flash_attn", "flashinfer", "varlen")
LONG_PREFILL = 256  # queries per row; for fewer, external backends gain little
# FlashAttention-2 reads pages of a multiple of this many tokens only, also inside torch.
FLASH_ATTENTION_PAGE = 256
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionPlan, float], Tensor]


def chosen() -> str:
    """Return the value of KVPAGER_GPU_ATTENTION, `auto` if unset. O(1).

    Raises: `ValueError` unless it is one of `CHOICES`.
    """
    name = os.environ.get("KVPAGER_GPU_ATTENTION", "auto")
    if name not in CHOICES:
        raise ValueError(f"KVPAGER_GPU_ATTENTION={name!r}: expected one of {listed(CHOICES)}")
    return name


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, args: AttentionArgs, plan: AttentionPlan
) -> Tensor | None:
    """Return the output of an external backend, or None if Triton has to run the call."""
    name = chosen()
    plain = all(each is None for each in (args.softcap, args.mask, args.kv_starts, args.window))
    cu_seqlens_q = args.cu_seqlens_q
    if name == "triton" or not plain or cu_seqlens_q is None:
        return None
    if plan.work.one_query or plan.work.holes or not _fits(query, key_cache, value_cache):
        return None
    if name == "auto":
        name = "flash_attn"
        if plan.longest < LONG_PREFILL:
            return None
    if name != "flashinfer" and key_cache.shape[1] % FLASH_ATTENTION_PAGE:
        return None
    backend = _backend(name)
    if backend is None:
        return None
    softmax_scale = query.shape[2] ** -0.5 if args.softmax_scale is None else args.softmax_scale
    block_tables, seq_lens = args.block_tables.int().clamp(min=0), args.seq_lens.int()
    rows = block_tables, seq_lens, cu_seqlens_q.int()
    return backend(query, key_cache, value_cache, *rows, plan, softmax_scale)


def _fits(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Return True if all external backends support these dtypes, head dims and strides."""
    return (
        query.dtype == key_cache.dtype == value_cache.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and key_cache.shape[3] == value_cache.shape[3]
        and key_cache.shape[3] in (64, 128, 256)
        and key_cache.stride() == value_cache.stride()
        and key_cache.stride(3) == 1
    )


@lru_cache
def _backend(name: str) -> Backend | None:
    """Return the adapter of a backend; None unless it is installed with the known parameters."""
    varlen = ("block_table", "seqused_k", "enable_gqa")
    module, attribute, adapter, parameters = {
        "flash_attn": ("flash_attn", "flash_attn_varlen_func", _by_flash_attn, ("block_table",)),
        "varlen": ("torch.nn.attention.varlen", "varlen_attn", _by_varlen, varlen),
        "flashinfer": ("flashinfer", "BatchPrefillWithPagedKVCacheWrapper", _by_flashinfer, ()),
    }[name]
    try:
        function = getattr(import_module(module), attribute)
        known = inspect.signature(function).parameters
    except Exception:  # a broken installation must not break attention
        return None
    return partial(adapter, function) if set(parameters) <= set(known) else None


def _by_flash_attn(
    function: Any, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
    seq_lens: Tensor, starts: Tensor, plan: AttentionPlan, softmax_scale: float,
) -> Tensor:  # fmt: skip
    ends = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    output: Tensor = function(
        query, key_cache, value_cache, cu_seqlens_q=starts, cu_seqlens_k=ends,
        max_seqlen_q=plan.longest, max_seqlen_k=_most_tokens(block_tables, key_cache),
        softmax_scale=softmax_scale, causal=plan.shapes.causal, block_table=block_tables,
    )  # fmt: skip
    return output


def _most_tokens(block_tables: Tensor, key_cache: Tensor) -> int:
    """Return the most kv tokens a row can have: a plan outlives the lengths it was made from."""
    return block_tables.shape[1] * key_cache.shape[1]


def _by_varlen(
    function: Any, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
    seq_lens: Tensor, starts: Tensor, plan: AttentionPlan, softmax_scale: float,
) -> Tensor:  # fmt: skip
    output: Tensor = function(
        query, key_cache, value_cache, starts, None, plan.longest,
        _most_tokens(block_tables, key_cache), scale=softmax_scale,
        window_size=(-1, 0) if plan.shapes.causal else (-1, -1),
        enable_gqa=query.shape[1] != key_cache.shape[2], seqused_k=seq_lens,
        block_table=block_tables,
    )  # fmt: skip
    return output


def _by_flashinfer(
    wrapper_class: Any, query: Tensor, key_cache: Tensor, value_cache: Tensor,
    block_tables: Tensor, seq_lens: Tensor, starts: Tensor, plan: AttentionPlan,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    block_size = key_cache.shape[1]
    pages = (seq_lens + block_size - 1) // block_size
    columns = torch.arange(block_tables.shape[1], device=block_tables.device)
    wrapper = wrapper_class(_workspace(query.device), "NHD")
    wrapper.plan(
        starts, torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0)),
        block_tables[columns < pages[:, None]],
        torch.where(seq_lens > 0, (seq_lens - 1) % block_size + 1, 0), query.shape[1],
        key_cache.shape[2], query.shape[2], block_size, causal=plan.shapes.causal,
        sm_scale=softmax_scale, q_data_type=query.dtype, kv_data_type=key_cache.dtype,
    )  # fmt: skip
    output: Tensor = wrapper.run(query.contiguous(), (key_cache, value_cache))
    return output


@lru_cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
