"""Names for the bytes of a page: the model, and how SGLang lays its pages out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from kvpager.integrations.sglang.interface import RELEASE, HiCacheStorageConfig
from kvpager.integrations.sglang.pages import HostPages
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.weights import model_digest

# Settings of SGLang that change keys and values of the same weights.
_SETTINGS = (
    *("dtype", "json_model_override_args", "kv_cache_dtype", "model_impl"),
    *("quantization", "quantization_param_path"),
)


def page_layout(
    config: HiCacheStorageConfig, model: Any, pages: HostPages, model_id: str | None
) -> BlockLayout:
    """Name the layout of a page of this rank. O(1), O(bytes of the model) without `model_id`.

    `model` has SGLang's settings of the model. Raises: `ValueError` if the model is not a local
    directory and has no `model_id`.
    """
    told = [str(getattr(model, name)) for name in _SETTINGS]
    fields = (
        "kvpager sglang 1",
        f"sglang {'.'.join(RELEASE.split('.')[:3])}",
        f"model {model_id or model_digest(model.model_path)}",
        f"settings {hashlib.sha256(json.dumps(told).encode()).hexdigest()}",
        f"pages {pages.text}",
        f"rank {rank_name(config)}",
    )
    return BlockLayout("; ".join(fields), pages.part_bytes)


def rank_name(config: HiCacheStorageConfig) -> str:
    """Name the shard of the model that this process has. O(1)."""
    # All ranks of a model with latent attention have the same pages. The first one writes them.
    tp_rank = 0 if config.is_mla_model else config.tp_rank
    return (
        f"tp{tp_rank}of{config.tp_size}-pp{config.pp_rank}of{config.pp_size}"
        f"-cp{config.attn_cp_rank}of{config.attn_cp_size}"
    )


def store_keys(layout: BlockLayout, num_parts: int) -> Callable[[list[str]], list[bytes]]:
    """Return the function that maps SGLang's keys of pages to the keys of their parts.

    The function takes O(pages * parts).
    """
    fingerprint, parts = layout.fingerprint, [bytes([part]) for part in range(num_parts)]

    def keys_of(pages: list[str]) -> list[bytes]:
        return [
            hashlib.blake2b(part + page.encode(), digest_size=KEY_BYTES, key=fingerprint).digest()
            for page in pages
            for part in parts
        ]

    return keys_of
