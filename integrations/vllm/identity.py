"""Names for the bytes of a chunk: the model, and how vLLM lays its pages out."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from typing import Any

import torch

from kvpager.integrations.vllm.interface import (
    RELEASE,
    AttentionBackendEnum,
    OffloadingConfig,
    current_platform,
)
from kvpager.integrations.vllm_plugin import BACKEND
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.weights import model_digest

_UNNAMED = ("_name_or_path", "transformers_version")  # differ between equal models


def chunk_layout(
    config: OffloadingConfig,
    model_config: Any,
    model_id: str | None,
    chunk_bytes: int,
    arrangement: str,
) -> BlockLayout:
    """Name the layout of a chunk of all workers. O(1), O(bytes of the model) without `model_id`.

    `arrangement` names the order of a chunk's blocks, layers and workers in its bytes.

    Raises: `ValueError` if the model is not a local directory and has no `model_id`.
    """
    parallel = config.parallel
    groups = [[group.tokens_per_block, *group.layer_names] for group in config.groups]
    fields = (
        "kvpager vllm 1",
        f"vllm {'.'.join(RELEASE.split('.')[:2])}",
        f"model {model_id or model_digest(config.model.name)}",
        f"settings {_settings(model_config)}",
        f"dtype {config.model.dtype}",
        f"pages {config.kv_cache_layout} on {_device()}",
        f"attention {_attention(model_config.dtype)}",
        f"blocks_per_chunk {config.cache.blocks_per_chunk}",
        f"tokens_per_hash {config.cache.tokens_per_hash}",
        f"groups {json.dumps(groups)}",
        f"rows of {arrangement}",
        f"tp {parallel.tp_size} pp {parallel.pp_size} pcp {parallel.pcp_size} "
        f"dcp {parallel.dcp_size} of {parallel.world_size}",
    )
    return BlockLayout("; ".join(fields), chunk_bytes)


def store_keys(layout: BlockLayout) -> Callable[[bytes], bytes]:
    """Return the function that maps vLLM's key of a chunk to its key in stores."""
    fingerprint = layout.fingerprint

    def store_key(key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=KEY_BYTES, key=fingerprint).digest()

    return store_key


def _settings(model_config: Any) -> str:
    """Return a digest of the settings that change keys and values, such as RoPE."""
    settings = model_config.hf_config.to_dict()
    for name in _UNNAMED:
        settings.pop(name, None)
    told = [settings, model_config.quantization, str(model_config.dtype)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _device() -> str:
    """Return the device, and on a CPU the instructions: vLLM packs keys for them."""
    kind: str = current_platform.device_type
    if kind != "cpu":
        return kind
    amx = torch.cpu._is_amx_tile_supported()  # there is no public function
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx {amx}"


def _attention(dtype: torch.dtype) -> str:
    """Return the attention backend of vLLM's CPU platform: it arranges the inside of a page."""
    if current_platform.device_type != "cpu":
        return "of the device"
    path: str = AttentionBackendEnum.CPU_ATTN.get_path()
    if path == BACKEND:
        from kvpager.integrations.vllm.attention import reason_for_vllm

        if reason_for_vllm(dtype) is not None:
            path = AttentionBackendEnum.CPU_ATTN.value
    return path
