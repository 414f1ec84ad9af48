"""vLLM's KVCacheManager and BlockPool behind the conformance protocol.

Driven as vLLM's scheduler drives them, written against vLLM 0.32 (its CPU wheel is enough).
vLLM publishes a prompt's full blocks inside `allocate_slots`, before their keys and values are
written, so there is no `commit` here; it has neither `fork` nor `swap`.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

_MODULES = ("vllm.v1.core.kv_cache_manager", "vllm.v1.kv_cache_interface", "vllm.v1.request")


def available() -> str | None:
    """Return None if vLLM can be driven, or the reason why not."""
    try:
        for name in _MODULES:
            import_module(name)
    except Exception as error:  # importing vLLM may raise more than ImportError
        return f"vLLM cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def make(num_blocks: int, block_size: int) -> VllmAdapter:
    """Return an adapter of a pool of `num_blocks` usable blocks."""
    return VllmAdapter(num_blocks, block_size)


class VllmAdapter:
    """One KVCacheManager with one group of full attention layers; a handle is a `Request`."""

    out_of_blocks = MemoryError

    def __init__(self, num_blocks: int, block_size: int) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        self.num_blocks, self.block_size = num_blocks, block_size
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        # Block 0 is vLLM's null block, which is never allocated.
        config = KVCacheConfig(num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(
            config,
            max_model_len=num_blocks * block_size + 1,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
        )
        self._names = itertools.count()
        self._cached: dict[str, int] = {}

    def request(self, tokens: list[int]) -> Any:
        """Return a vLLM request for the prompt. Making it hashes the prompt's blocks."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1 << 30)
        name = f"request-{next(self._names)}"
        return Request(name, list(tokens), params, None, block_hasher=self._hasher)

    def allocate(self, tokens: list[int]) -> Any:
        request = self.request(tokens)
        self.manager.new_step_starts()
        blocks, cached, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, len(tokens) - cached, cached, blocks) is None:
            raise MemoryError("allocate_slots returned None")
        request.num_computed_tokens = request.num_tokens
        self._cached[request.request_id] = cached
        return request

    def num_cached_tokens(self, handle: Any) -> int:
        return self._cached[handle.request_id]

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        # As with draft tokens: slots first, the tokens and their hashes once they are known.
        self.manager.new_step_starts()
        if self.manager.allocate_slots(handle, len(tokens)) is None:
            raise MemoryError("allocate_slots returned None")
        handle.append_output_token_ids(list(tokens))
        handle.num_computed_tokens = handle.num_tokens
        self.manager.cache_blocks(handle, handle.num_tokens)
        copies, kept = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(kept)  # the scheduler drops these once copied
        return [(copy.src_block_id - 1, copy.dst_block_id - 1) for copy in copies]

    def free(self, handle: Any) -> None:
        self.manager.free(handle)

    def block_table(self, handle: Any) -> list[int]:
        """Return vLLM's block ids, counted from its first usable block."""
        return [block - 1 for block in self.manager.get_block_ids(handle.request_id)[0]]

    def num_free_blocks(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())
