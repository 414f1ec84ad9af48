"""vLLM's own tiered offloading, driven by a test or by an engine on a CPU. Needs vLLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvpager.integrations.vllm.interface import KVTransferConfig, set_current_vllm_config
from kvpager.integrations.vllm.worker import KvpagerOffloadingWorker
from tests.support.vllm_parts import model_config

__all__ = ["CpuTieringSpec", "TieringNode", "TieringOffloadingManager", "secondary", "tiering"]
WAITING = (LookupResult.RETRY, LookupResult.HIT_PENDING)


def secondary(store: str, **settings: Any) -> dict[str, Any]:
    """Return the entry of `secondary_tiers` for a store."""
    tier = {"type": "KvpagerSecondaryTier", "module_path": "kvpager.integrations.vllm.secondary"}
    return {**tier, "store": store, "model_id": "model@1", **settings}


def tiering(settings: dict[str, Any]) -> KVTransferConfig:
    """Return the configuration of vLLM's tiered offloading in an engine on a CPU."""
    return KVTransferConfig(
        kv_connector="KvpagerOffloadingConnector",
        kv_connector_module_path="kvpager.integrations.vllm",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tests.support.vllm_tiering",
            **settings,
        },
    )


def num_held(manager: Any) -> int:
    """Return how many chunks of the host memory vLLM cannot evict."""
    primary = manager.primary_tier
    idle: int = primary._num_evictable_cache_chunks
    return primary._num_allocated_chunks - len(primary._free_list) - idle


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's spec with kvpager's worker, because vLLM's own copies with CUDA or XPU only."""

    def get_worker(self, kv_caches: Any) -> Any:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        rows = np.asarray(region.create_kv_memoryview()).view(np.uint8)
        return KvpagerOffloadingWorker(
            kv_caches,
            SimpleNamespace(rows=rows),
            rank=self.config.parallel.rank,
            block_bytes=self.config.worker_kv_bytes_per_block,
            blocks_per_chunk=self.blocks_per_chunk,
        )


class TieringNode:
    """vLLM's tiering manager over stores of kvpager. The test is the scheduler and the device."""

    def __init__(self, tiers: Sequence[dict[str, Any]], *, num_chunks: int = 8) -> None:
        parallel = OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False)
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(16, ("layers.0",), 0),),
            worker_kv_bytes_per_block=4096,
            enable_kv_cache_events=False,
            extra_config={"cpu_bytes_to_use": 4096 * num_chunks, "secondary_tiers": list(tiers)},
            engine_id=f"test-{os.urandom(6).hex()}",
            model=OffloadingModelConfig("a/b", "float32"),
            cache=OffloadingCacheConfig(16, 1),
            parallel=parallel,
            kv_cache_layout="LBHNC",
        )
        with set_current_vllm_config(SimpleNamespace(model_config=model_config())):
            self.spec = TieringOffloadingSpec(config)
            self.manager = self.spec.get_manager()
        self._rows = np.asarray(self.spec._scheduler_mmap.create_kv_memoryview())
        self._num_requests = 0

    def request(self, keys: Sequence[Any]) -> Any:
        """Begin a request whose prompt has `keys`."""
        self._num_requests += 1
        context = ReqContext(f"request-{self._num_requests}")
        for place, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (place + 1))
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        """Step until no transfer is left."""
        while self.manager.has_pending_work():
            for tier in self.manager.secondary_tiers:
                tier.drain_jobs()
            self.step()

    def look_up(self, keys: Sequence[Any], context: Any) -> int:
        """Return how many leading keys are hits, once vLLM knows; step and drain meanwhile."""
        for _ in range(20):
            found = [self.manager.lookup(key, context) for key in keys]
            self.step()
            if not any(each in WAITING for each in found):
                hits = [each is LookupResult.HIT for each in found]
                return hits.index(False) if False in hits else len(hits)
            for tier in self.manager.secondary_tiers:
                tier.drain_jobs()
        raise AssertionError(f"a look-up that never ends: {found}")

    def save(self, keys: Sequence[Any], contents: Sequence[int], context: Any) -> list[Any]:
        """Store chunks whose bytes are all `contents`. Returns the keys that were stored."""
        output = self.manager.prepare_store(keys, context)
        if output is None or not output.keys_to_store:
            return []
        for key, slot in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self._rows[slot] = contents[list(keys).index(key)]
        self.manager.complete_store(output.keys_to_store, context)
        return list(output.keys_to_store)

    def load(self, keys: Sequence[Any], context: Any) -> list[set[int]]:
        """Return the distinct bytes of the row of each key, as the device would get them."""
        slots = self.manager.prepare_load(keys, context).chunk_ids
        contents = [set(np.unique(self._rows[slot]).tolist()) for slot in slots]
        self.manager.complete_load(keys, context)
        return contents

    def finish(self, context: Any) -> None:
        self.manager.on_request_finished(context)

    def held(self) -> int:
        """Return how many chunks of the host memory vLLM cannot evict."""
        return num_held(self.manager)

    def close(self) -> None:
        self._rows = self._rows[:0].copy()
        self.manager.shutdown()
