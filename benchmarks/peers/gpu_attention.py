"""Paged decode attention of FlashInfer and flash-attn on a GPU, where they are installed.

Each entry of `DECODERS` takes what one decode step shares between layers and returns a function of
(query, key_cache, value_cache), which CUDA graphs can capture, or raises `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

WORKSPACE_BYTES = 256 << 20
# FlashAttention-2 takes blocks of multiples of this many tokens only.
FLASH_ATTENTION_2_BLOCK = 256


class Unavailable(Exception):
    """The peer cannot be measured here; says why."""


class Step(NamedTuple):
    """Rows of one decode step."""

    block_tables: Tensor  # int32 [rows, columns]
    seq_lens: Tensor  # int32 [rows]
    query_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype


def flashinfer(step: Step) -> Attend:
    """FlashInfer's batch decode, planned before the clock starts."""
    library = _imported("flashinfer")
    rows, columns = step.block_tables.shape
    device = step.block_tables.device
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
    indices = step.block_tables.flatten()
    last = step.seq_lens - (columns - 1) * step.block_size
    wrapper: Any = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        # Its documentation advises tensor cores from about four query heads per kv head on.
        use_tensor_cores=step.query_heads // step.kv_heads >= 4,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    wrapper.plan(
        starts,
        indices,
        last,
        step.query_heads,
        step.kv_heads,
        step.head_dim,
        step.block_size,
        pos_encoding_mode="NONE",
        q_data_type=step.dtype,
        kv_data_type=step.dtype,
    )
    return lambda query, key_cache, value_cache: wrapper.run(query, (key_cache, value_cache))


def flash_attention_3(step: Step) -> Attend:
    """FlashAttention-3's decode over pages."""
    library = _imported("flash_attn_interface")

    def attend(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        found = library.flash_attn_with_kvcache(
            query[:, None],
            key_cache,
            value_cache,
            cache_seqlens=step.seq_lens,
            page_table=step.block_tables,
            causal=True,
        )
        return (found[0] if isinstance(found, tuple) else found)[:, 0]

    return attend


def flash_attention_2(step: Step) -> Attend:
    """FlashAttention-2's decode over pages, for the block sizes it takes."""
    library = _imported("flash_attn")
    if step.block_size % FLASH_ATTENTION_2_BLOCK:
        raise Unavailable(f"blocks of {step.block_size} tokens; it takes multiples of 256")

    def attend(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        output: Tensor = library.flash_attn_with_kvcache(
            query[:, None],
            key_cache,
            value_cache,
            cache_seqlens=step.seq_lens,
            block_table=step.block_tables,
            causal=True,
        )
        return output[:, 0]

    return attend


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # a build for another torch fails in ways of its own
        raise Unavailable(f"{name} cannot be imported: {error}") from error


DECODERS: dict[str, Callable[[Step], Attend]] = {
    "flashinfer": flashinfer,
    "flash_attention_3": flash_attention_3,
    "flash_attention_2": flash_attention_2,
}
