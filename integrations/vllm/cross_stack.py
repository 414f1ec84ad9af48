"""One cache for vLLM and other stacks: the keys of chunks, and the self-test before sharing.

run_probe(llm)    the probe's chunks reach host memory ─▶ agree ─▶ the stores open, and chunks get
                  the keys that other stacks use
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpager.integrations.vllm.chunks import Names
from kvpager.integrations.vllm.interface import (
    FullAttentionSpec,
    OffloadingConfig,
    UniformTypeKVCacheSpecs,
)
from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
from kvpager.storage.keys import KEY_BYTES, ContentKeying, KeyContext
from kvpager.storage.tiers.agreement import (
    PROBE_TOKENS,
    CommonLayout,
    agree,
    probe_prompt,
    probe_request,
    rope_obstacle,
)
from kvpager.storage.tiers.keyed import KeySlot
from kvpager.storage.tiers.seals import Digest, namespace_secret

logger = logging.getLogger("kvpager")


def run_probe(llm: Any) -> None:
    """Let an `LLM` of `offload(..., cross_stack=True)` compute the probe.

    Call it once, before the first prompt. Then the engine shares blocks, unless its log says why
    not.
    """
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    llm.generate([{"prompt_token_ids": probe_request()}], settings, use_tqdm=False)


def common_layout_of(
    config: OffloadingConfig, vllm_config: Any, kv_cache_config: Any
) -> CommonLayout:
    """Return the layout of an engine's chunks for other stacks. O(layers).

    Raises: `NotImplementedError` if no other stack can read its chunks; `ValueError` for a bad
    setting.
    """
    reason = _obstacle(config, vllm_config, kv_cache_config)
    if reason is None:
        [group] = config.groups
        tokens = group.tokens_per_block * config.cache.blocks_per_chunk
        shapes = [(s.num_kv_heads, s.head_size, s.head_size_v) for s in _specs(kv_cache_config)]
        if tokens & (tokens - 1):
            raise ValueError(
                f"cross_stack: chunks have {tokens} tokens, expected a power of two. Change vLLM's "
                "block_size or blocks_per_chunk."
            )
        common = CommonLayout.of(tokens, shapes, config.model.dtype)
        block_bytes = common.layout.block_bytes
        if block_bytes == config.worker_kv_bytes_per_block * config.cache.blocks_per_chunk:
            return common
        reason = "its pages hold more than keys and values"
    raise NotImplementedError(
        f"cross_stack: this engine cannot share its blocks: {reason}. Leave cross_stack out."
    )


def _specs(kv_cache_config: Any) -> list[Any]:
    """Return the kind of each layer, in order."""
    [group] = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return [spec.kv_cache_specs[name] for name in group.layer_names]
    return [spec] * len(group.layer_names)


def _obstacle(config: OffloadingConfig, vllm_config: Any, kv_cache_config: Any) -> str | None:
    if config.parallel.world_size != 1:
        return "several workers each have a part of a block"
    if len(config.groups) != 1 or len(kv_cache_config.kv_cache_groups) != 1:
        return "it has several groups of layers, such as those with sliding windows"
    for spec in _specs(kv_cache_config):
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            return "it has layers without full attention"
    numbers = [re.findall(r"\d+", name) for name in config.groups[0].layer_names]
    layers = [list(map(int, each)) for each in numbers]
    if layers != sorted(layers):
        return "its layers are not in order"
    if config.enable_kv_cache_events:
        return "KV events have vLLM's hashes, but shared chunks have other keys"
    if vllm_config.model_config.max_model_len <= PROBE_TOKENS:
        return f"max_model_len must be above {PROBE_TOKENS}, the length of the probe"
    return rope_obstacle(vllm_config.model_config.hf_text_config)


class CrossStack:
    """Gives the chunks of an engine the keys that other stacks use, after the probe was computed.

    Before that, the keys are private to this engine, and the stores below `manager` are closed.
    """

    def __init__(
        self, common: CommonLayout, model_id: str, manager: KvpagerOffloadingManager
    ) -> None:
        """Wait for the probe. Raises: `ValueError` if host memory has no room for it."""
        self._common, self._model_id, self._manager = common, model_id, manager
        self._layout = common.layout
        count = PROBE_TOKENS // common.block_size
        if manager.num_slots < count:
            raise ValueError(
                f"host_memory: room for {manager.num_slots} of {count} blocks of the probe. Raise "
                "host_memory."
            )
        self._model = f"{model_id}; before the probe {os.urandom(16).hex()}"
        name = self._chain(None, None, probe_prompt().tolist())
        self._probe = {name(number): number for number in range(count)}
        self._blocks = np.zeros((count, self._layout.block_bytes), np.uint8)
        logger.warning(
            "kvpager: cross_stack: this engine shares no blocks until it has computed the probe. "
            "Call kvpager.integrations.vllm.run_probe, or send the output of `kvpager tiers probe` "
            "as a prompt."
        )

    def names(self, request: Any) -> Names:
        """Return a function that gives the keys of a vLLM request's chunks. O(1).

        Chunks of prompts with images or embeddings have no key: token ids do not identify them.
        """
        if request.mm_features or request.prompt_embeds is not None:
            return lambda *_: None
        lora = request.lora_request
        # The self-test does not cover adapters: only engines of vLLM share their blocks.
        adapter = None if lora is None else f"vllm {lora.lora_name}"
        name = self._chain(request.cache_salt or None, adapter, request.all_token_ids)
        return lambda group, number: name(number)

    def _chain(self, salt: str | None, lora: str | None, ids: Sequence[int]) -> Any:
        """Return a function that gives the keys of a prompt's blocks, in order."""
        secret = namespace_secret(Digest.master, salt)
        context = KeyContext(self._layout.text, self._model, secret, lora)
        size = self._common.block_size
        keying = ContentKeying(size, lambda *_: context)
        key = keying.root(None, None, 0)

        def name(number: int) -> bytes:
            nonlocal key
            tokens = np.array(ids[number * size : (number + 1) * size], np.int32)
            key = keying.block(None, key, tokens, ())
            return key

        return name

    def note_saved(self, pairs: Sequence[KeySlot]) -> None:
        """Take chunks of the probe that reached host memory; with the last, run the self-test.

        Call it right after the step that copied them. Waits for the stores then. O(chunks).
        """
        for key, slot in pairs:
            number = self._probe.pop(key[:KEY_BYTES], None)
            if number is not None:
                self._blocks[number] = self._manager.row(slot)[: self._blocks.shape[1]]
                if not self._probe:
                    self._begin()

    def _begin(self) -> None:
        lower = self._manager.lower
        agreement = agree(lower.stores, self._common, self._model_id, self._blocks)
        self._model, self._blocks = agreement.model, self._blocks[:0].copy()
        lower.is_open = True
