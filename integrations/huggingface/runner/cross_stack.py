"""What a model must be for other serving stacks to read its blocks, and the probe it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.runner.model_info import ModelInfo, plain_cache
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.tiers.agreement import (
    PROBE_TOKENS,
    Blocks,
    CommonLayout,
    agree,
    probe_prompt,
    rope_obstacle,
)
from kvpager.storage.tiers.protocol import BlockStore


def agreed_name(
    model: Any,
    info: ModelInfo,
    storage: BlockStorage,
    stores: Sequence[BlockStore],
    model_id: str,
) -> str:
    """Test the model against what other stacks stored; return its name in keys.

    Computes a prompt of 512 tokens, and waits for the stores. Raises: `KVPagerError` for a model or
    a storage whose blocks no other stack can read.
    """
    common = common_layout_of(model, info, storage)
    return agree(stores, common, model_id, probe_blocks(model, info, common)).model


def common_layout_of(model: Any, info: ModelInfo, storage: BlockStorage) -> CommonLayout:
    """Return the layout of the blocks of `storage`, if other stacks can read them. O(layers).

    Raises: `KVPagerError` if none can.
    """
    reason = _obstacle(model, info, storage)
    if reason is not None:
        raise KVPagerError(
            f"cross_stack: {type(model).__name__} cannot share its blocks: {reason}. Leave "
            "cross_stack out."
        )
    dtype = str(storage.dtype).removeprefix("torch.")
    try:
        return CommonLayout.of(storage.block_size, storage.layers, dtype)
    except ValueError as error:
        raise KVPagerError(str(error)) from None


def _obstacle(model: Any, info: ModelInfo, storage: BlockStorage) -> str | None:
    if any(info.windows) or any(layer.window is not None for layer in info.layers):
        return "it has sliding windows, which stacks keep differently"
    if info.others:
        return "some of its layers are not kept in blocks"
    if storage.kv_cache_dtype is not None:
        return f"kv_cache_dtype={storage.kv_cache_dtype!r} rounds in kvpager's own way"
    if storage.mode != "paged":
        return f"mode={storage.mode!r} orders blocks by token"
    if info.max_length is not None and info.max_length < PROBE_TOKENS:
        return f"it takes {info.max_length} tokens, and the probe has {PROBE_TOKENS}"
    return rope_obstacle(model.config.get_text_config(decoder=True))


@torch.inference_mode()
def probe_blocks(model: Any, info: ModelInfo, common: CommonLayout) -> Blocks:
    """Compute the blocks of `probe_prompt`: uint8 [blocks, bytes of a block]."""
    cache = plain_cache(model)
    ids = torch.tensor(probe_prompt(), dtype=torch.long, device=info.device)[None]
    model(input_ids=ids, use_cache=True, **{info.cache_name: cache})
    parts = []
    for layer in info.layers:
        written: Any = cache.layers[layer.number]
        for states in (written.keys, written.values):
            tokens = states[0].transpose(0, 1)  # [tokens, heads, dim]
            by_block = tokens.reshape(PROBE_TOKENS // common.block_size, -1)
            parts.append(by_block.contiguous().view(torch.uint8).cpu().numpy())
    return np.concatenate(parts, axis=1)
