"""vLLM's CPU attention backend with kvpager's kernels, on vLLM's own pages, in place.

A page holds [kv_heads, block_size, 2 * head_dim] elements. The backend that writes a page decides
where each of them is, and no other backend can read it:

    vLLM      per head: keys, packed for its vector unit     | values [block_size, head_dim]
    kvpager   per head: keys [block_size, head_dim]          | values [block_size, head_dim]

A layer is served by kvpager's kernels in all steps or in none. The choice depends only on the
model, the processor and `KVPAGER_VLLM_ATTENTION`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import vllm
from kvpager.integrations.vllm.releases import check_release
from kvpager.integrations.vllm_plugin import VARIABLE, choice
from kvpager.kernels import backends
from kvpager.kernels.cpu import provider
from kvpager.kernels.cpu.attention import PagedAttention
from kvpager.ops import AttentionArgs, LayerCaches, append, attend
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

# A private interface of vLLM: each release is tested before it is added.
check_release(vllm.__version__, below=(0, 33))

# vLLM shows messages of the loggers below its own.
logger = logging.getLogger("vllm.kvpager")

# Kernels and dtypes that were measured to be faster than vLLM's: the first in engines, the second
# by its operators alone, as docs/vllm.md says. Where vLLM's operator has matrix units, only prefill
# is faster.
_FASTER = {("avx512bf16", torch.bfloat16), ("avx2", torch.bfloat16)}


def page_caches(pages: Tensor) -> LayerCaches:
    """Return kvpager's view of pages [blocks, kv_heads, block_size, 2 * head_dim]. O(1).

    Keys and values are [blocks, block_size, kv_heads, head_dim], and share the memory of `pages`.

    Raises: `ValueError` if the elements of a page are not contiguous.
    """
    blocks, kv_heads, block_size, width = pages.shape
    if pages.stride()[1:] != (block_size * width, width, 1):
        raise ValueError(
            f"vLLM's pages have strides {pages.stride()}: kvpager's attention needs contiguous "
            f"pages. Unset {VARIABLE}."
        )
    head_dim = width // 2
    shape = (blocks, block_size, kv_heads, head_dim)
    strides = (pages.stride(0), head_dim, block_size * width, 1)
    first = pages.storage_offset()
    keys = pages.as_strided(shape, strides, first)
    return LayerCaches(keys, pages.as_strided(shape, strides, first + block_size * head_dim))


def reason_for_vllm(dtype: torch.dtype) -> str | None:
    """Return why vLLM's own code serves layers of `dtype`; None if kvpager's kernels do. O(1).

    Raises: `RuntimeError` if kvpager has no native kernels here.
    """
    if not isinstance(backends.select("paged_attention", torch.device("cpu")), PagedAttention):
        why = backends.active()["cpu"]["paged_attention"].reason
        raise RuntimeError(f"{VARIABLE}: kvpager has no native kernels here ({why}). Unset it.")
    variant = provider.choose()
    assert variant is not None
    if choice() == "always":
        return None
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():  # as vLLM asks
        return f"{name} on matrix units (AMX) is not faster in decodes"
    if (variant.name, dtype) in _FASTER:
        return None
    return f"{name} on {variant.name} is not measured to be faster"


class KvpagerAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend, with kvpager's kernels for decoder layers.

    It keeps the name CPU_ATTN, which vLLM looks up.
    """

    @staticmethod
    def get_impl_cls() -> type[KvpagerAttentionImpl]:
        return KvpagerAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KvpagerMetadataBuilder]:
        return KvpagerMetadataBuilder


class KvpagerMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Makes the metadata of a step; the schedule of vLLM's operator only if a layer needs it."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """Log the choice for all layers once. Raises: `ValueError` if layers cannot share pages."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        impls = {name: layer.impl for name, layer in layers.items()}
        self._impls = [impls[name] for name in layer_names]
        if next(iter(impls)) in layer_names:  # the first of several groups
            _check_sharing(impls)
            logger.info("%s", describe(impls))

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        common = common_attn_metadata
        if any(impl.reason is not None for impl in self._impls):
            return super().build(common_prefix_len, common, fast_build)
        by_row = isinstance(common.causal, Tensor)
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=False if by_row else common.causal,
            dynamic_causal=common.causal if by_row else None,
        )


class KvpagerAttentionImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer.

    Attributes:
        reason: why vLLM's own code serves the layer; None if kvpager's kernels do.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Choose the code. Raises: `ValueError` for a connector that writes vLLM's own packing;
        `RuntimeError` if kvpager has no native kernels here."""
        super().__init__(*args, **settings)
        config = get_current_vllm_config()
        _refuse_packing(config.kv_transfer_config)
        self.reason = self._reason() or reason_for_vllm(config.model_config.dtype)
        self._pages: Tensor | None = None
        self._caches: LayerCaches | None = None

    def _reason(self) -> str | None:
        if self.attn_type != AttentionType.DECODER:
            return f"attention of type {self.attn_type}"
        if self.kv_cache_dtype != "auto":
            return f"kv_cache_dtype={self.kv_cache_dtype}"
        return None if self.alibi_slopes is None else "ALiBi"

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.reason is not None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        tokens = len(slot_mapping)
        append(key[:tokens], value[:tokens], self._caches_of(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **named_scales: Any,
    ) -> Tensor:
        is_scaled = any(scale is not None for scale in (*scales, *named_scales.values()))
        if attn_metadata is None or is_scaled or self.reason is not None:
            attended: Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales
            )
            return attended
        caches = self._caches_of(kv_cache)
        for tokens, rows, causal in _calls(attn_metadata):
            args = AttentionArgs(
                *rows,
                softmax_scale=self.scale,
                causal=causal,
                window=self.sliding_window if self.sliding_window > 0 else None,
                softcap=self.logits_soft_cap or None,
            )
            attend(query[tokens], caches, args, sinks=self.sinks, out=output[tokens])
        return output

    def _caches_of(self, pages: Tensor) -> LayerCaches:
        if self._caches is None or self._pages is not pages:
            self._pages, self._caches = pages, page_caches(pages)
        return self._caches


def describe(impls: Mapping[str, Any]) -> str:
    """Say which code serves each layer, in one line. O(layers)."""
    theirs = [f"{name} ({impl.reason})" for name, impl in impls.items() if impl.reason is not None]
    variant = provider.choose()
    line = f"kvpager's kernels serve the attention of {len(impls) - len(theirs)} layers"
    line += f" ({variant.name})" if variant is not None else ""
    return line + (f", vLLM's serve {', '.join(theirs)}" if theirs else "")


def _calls(metadata: Any) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor], bool]]:
    """Yield query tokens, their rows (tables, lengths, starts), and True if they are causal."""
    tables, lengths, starts = metadata.block_table, metadata.seq_lens, metadata.query_start_loc
    if metadata.dynamic_causal is None:
        yield slice(0, metadata.num_actual_tokens), (tables, lengths, starts), metadata.causal
        return
    edges = starts.tolist()  # rows differ: one call each
    for row, causal in enumerate(metadata.dynamic_causal.tolist()):
        tokens = slice(edges[row], edges[row + 1])
        own = torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32)
        yield tokens, (tables[row : row + 1], lengths[row : row + 1], own), bool(causal)


def _check_sharing(impls: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a layer reads pages that other code writes."""
    for name, impl in impls.items():
        writer = impls.get(impl.kv_sharing_target_layer_name)
        if writer is not None and (writer.reason is None) != (impl.reason is None):
            raise ValueError(
                f"{name} shares pages with {impl.kv_sharing_target_layer_name}, but only one of "
                f"them can use kvpager's attention. Unset {VARIABLE}."
            )


def _refuse_packing(transfer: Any) -> None:
    """Raise `ValueError` for a connector that rewrites blocks into the packing of vLLM's operator.

    vLLM's `pack_kv_cache` does so for NIXL connectors, without asking the attention backend.
    """
    for name in _connectors(transfer):
        if "nixl" in name.lower():
            raise ValueError(
                f"kv_connector={name}: it packs blocks for vLLM's own attention, which kvpager's "
                f"would read wrongly. Use another connector, or unset {VARIABLE}."
            )


def _connectors(transfer: Any) -> Iterator[str]:
    """Yield the names of a connector and of those inside it."""
    if transfer is None:
        return
    yield transfer.kv_connector or ""
    inside = (transfer.kv_connector_extra_config or {}).get("connectors", ())
    yield from (str(each.get("kv_connector")) for each in inside)
