"""kvpager's block manager in the place of vLLM's, behind vLLM's own scheduler: for tests only.

    LLM(model, scheduler_cls="tests.support.vllm_scheduler.KvpagerScheduler")

A request is a sequence, its salt the namespace. As with vLLM's manager, blocks are published in the
step that computes them. One group of full attention; the rest of vLLM is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from kvpager import BlockManager, SequenceHandle
from kvpager.blocks.stats import BlockStatus


class KvpagerKVCacheManager(KVCacheManager):
    """The interface of vLLM's manager over a `BlockManager`.

    What is not overridden asks the manager of vLLM's base class, which never gets a request.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        (group,) = self.kv_cache_config.kv_cache_groups
        if type(group.kv_cache_spec) is not FullAttentionSpec or self.use_eagle:
            raise NotImplementedError("one group of full attention, without drafts")
        self.block_size = group.kv_cache_spec.block_size
        self.manager = BlockManager(
            self.kv_cache_config.num_blocks, self.block_size, null_block=True
        )
        self.sequences: dict[str, SequenceHandle] = {}
        self._blocks = self.block_pool.blocks  # vLLM's object of each block
        self.block_pool = self.coordinator.block_pool = _Pool(self.manager, self.block_pool)
        self.coordinator.get_num_blocks_to_allocate = self._num_missing

    # ---------------------------------------------------------------- look up

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        if not self.enable_caching:
            return self.empty_kv_cache_blocks, 0, 0
        prompt = request.all_token_ids[: request.num_tokens - 1]
        match = self.manager.match_prefix(prompt, blocks=True, **_key(request, len(prompt)))
        count = match.num_tokens // self.block_size  # vLLM uses whole blocks only
        return self._shown(match.blocks[:count]), count * self.block_size, 0

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        sequence = self.sequences.get(request_id)
        return self._shown(() if sequence is None else self.manager.block_tables(sequence)[0])

    def _shown(self, blocks: Iterable[int]) -> KVCacheBlocks:
        return self.create_kv_cache_blocks(([self._blocks[int(block)] for block in blocks],))

    def estimate_cached_tokens(self, request: Request) -> int:
        sequence = self.sequences.get(request.request_id)
        return 0 if sequence is None else len(sequence) // self.block_size * self.block_size

    # ---------------------------------------------------------------- allocate

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> KVCacheBlocks | None:
        if num_lookahead_tokens or num_external_computed_tokens or delay_cache_blocks:
            raise NotImplementedError("no drafts and no connector")
        end = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
        end = min(end, self.max_model_len)
        assert end <= request.num_tokens, "asynchronous scheduling"
        shared = _numbers(new_computed_blocks)
        room = self._room(request, shared, has_scheduled_reqs)
        held = len(shared) or len(self.get_blocks(request.request_id).blocks[0])
        whole = self._num_blocks(min(request.num_tokens, self.max_model_len))
        if full_sequence_must_fit and whole - held > room:
            return None
        if self._num_blocks(end) - held > room - reserved_blocks:
            return None
        return self._shown(self._extend(request, end, shared)[held:])

    def _room(self, request: Request, shared: np.ndarray, has_scheduled: bool) -> int:
        """Return how many blocks a request may take besides the cached ones that it shares."""
        is_new = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        watermark = self.watermark_blocks if has_scheduled and is_new else 0
        statuses = self.manager.queries.block_statuses()[shared]
        num_idle = int(np.count_nonzero(statuses == BlockStatus.CACHED))
        return self.manager.num_available_blocks - num_idle - watermark

    def _extend(self, request: Request, end: int, shared: np.ndarray) -> np.ndarray:
        """Let the sequence of a request have its first `end` tokens; return its blocks."""
        manager, ids = self.manager, request.all_token_ids[:end]
        sequence = self.sequences.get(request.request_id)
        if sequence is None:
            sequence = manager.allocate(ids, **_key(request, end))
            self.sequences[request.request_id] = sequence
            # vLLM begins at a whole block: it computes all of a block that is equal only in part.
            assert sequence.num_cached_tokens // self.block_size == len(shared)
        elif end > len(sequence):
            assert not len(manager.append(sequence, ids[len(sequence) :]).copies)
        if self.enable_caching:
            manager.commit(sequence, end)
        blocks: np.ndarray = manager.block_tables(sequence)[0]
        assert blocks[: len(shared)].tolist() == shared.tolist()
        return blocks

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_missing(self, request_id: str, num_tokens: int, **_: Any) -> int:
        held = len(self.get_blocks(request_id).blocks[0])
        return max(0, self._num_blocks(num_tokens) - held)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        raise NotImplementedError("no connector")

    # ---------------------------------------------------------------- release

    def free(self, request: Request) -> None:
        self.block_pool.free_blocks(self.pop_blocks_for_free(request))

    def pop_blocks_for_free(self, request: Request) -> list[Any]:
        sequence = self.sequences.pop(request.request_id, None)
        return [] if sequence is None else [sequence]

    def remove_skipped_blocks(self, *_: Any, **__: Any) -> None:
        """Do nothing: no group has a window."""

    def reset_prefix_cache(self) -> bool:
        if self.manager.num_held_blocks:
            return False
        self.manager.clear_prefix_cache()
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True


class _Pool:
    """The members of vLLM's block pool that its scheduler uses."""

    def __init__(self, manager: BlockManager, pool: Any) -> None:
        self._manager = manager
        self.num_gpu_blocks, self.null_block = pool.num_gpu_blocks, pool.null_block

    def get_num_free_blocks(self) -> int:
        return self._manager.num_available_blocks

    def get_usage(self) -> float:
        return 1 - self.get_num_free_blocks() / (self.num_gpu_blocks - 1)

    def free_blocks(self, sequences: Iterable[SequenceHandle]) -> None:
        self._manager.free(list(sequences))

    def take_events(self) -> list[Any]:
        return []


def _key(request: Request, length: int) -> dict[str, Any]:
    """Return what a request's blocks depend on besides its first `length` tokens."""
    lora = request.lora_request
    images = [
        (start, min(start + feature.mm_position.length, length), feature.identifier.encode())
        for feature in request.mm_features
        if (start := feature.mm_position.offset) < length
    ]
    return {
        "namespace": request.cache_salt,
        "lora": lora and lora.lora_name,
        "mm_hashes": images,
    }


def _numbers(blocks: KVCacheBlocks | None) -> np.ndarray:
    return np.array(
        [] if blocks is None else [each.block_id for each in blocks.blocks[0]], np.int64
    )


class KvpagerScheduler(Scheduler):
    """vLLM's scheduler over kvpager's block manager."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.connector is not None or self.needs_kv_cache_zeroing:
            raise NotImplementedError("no connector")
        self.kv_cache_manager = KvpagerKVCacheManager(
            kv_cache_config=self.kv_cache_config,
            max_model_len=self.max_model_len,
            max_in_flight_tokens=self.vllm_config.max_in_flight_tokens,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            enable_caching=self.cache_config.enable_prefix_caching,
            use_eagle=self.use_eagle_block_drop,
            log_stats=self.log_stats,
            watermark=self.scheduler_config.watermark,
        )
