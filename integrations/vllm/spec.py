"""kvpager's tiers as a spec of vLLM's OffloadingConnector."""

from __future__ import annotations

import logging
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from kvpager._text import size
from kvpager.blocks.policies import make_policy
from kvpager.integrations.vllm.host_rows import HostRows
from kvpager.integrations.vllm.identity import chunk_layout, store_keys
from kvpager.integrations.vllm.interface import (
    CanonicalKVCaches,
    OffloadingConfig,
    OffloadingSpec,
    get_current_vllm_config_or_none,
)
from kvpager.integrations.vllm.lower_tiers import LowerTiers
from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
from kvpager.integrations.vllm.options import Options
from kvpager.integrations.vllm.worker import KvpagerOffloadingWorker
from kvpager.storage.tiers.keyed import KeyedTier
from kvpager.storage.tiers.urls import are_private, open_stores

logger = logging.getLogger("kvpager")


class KvpagerOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """Makes the manager of the scheduler's process, and a worker for each worker's process.

    A chunk of `blocks_per_chunk` blocks is one row of host memory, with a part for each worker:

        | worker 0: block 0, block 1, ... | worker 1: ... | padding to whole pages |
    """

    def __init__(self, config: OffloadingConfig) -> None:
        """Read the settings. Raises: `ValueError`, `TypeError` for a bad one."""
        super().__init__(config)
        self._options = Options.of(config.extra_config)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:
            raise ValueError(
                'kv_connector: expected "KvpagerOffloadingConnector", as '
                "kvpager.integrations.vllm.offload(...) sets it"
            )
        self._model_config = vllm_config.model_config
        num_bytes = config.worker_kv_bytes_per_block * self.blocks_per_chunk
        num_bytes *= config.parallel.world_size
        # Pad to whole pages: a disk reads these without a copy.
        self._chunk_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._num_chunks = self._options.host_memory // max(self._chunk_bytes, 1)
        if not self._num_chunks:
            raise ValueError(
                f"host_memory={size(self._options.host_memory)}: room for no chunk. Expected at "
                f"least {size(self._chunk_bytes, round_up=True)}."
            )

    def get_manager(self) -> KvpagerOffloadingManager:
        rows = self._rows()
        lower = self._lower(rows.rows) if self._options.tiers else None
        events = self.kv_events_config.enable_kv_cache_events
        return KvpagerOffloadingManager(self._tier, rows, lower, events=events)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> KvpagerOffloadingWorker:
        return KvpagerOffloadingWorker(
            kv_caches,
            self._rows(),
            rank=self.config.parallel.rank,
            block_bytes=self.config.worker_kv_bytes_per_block,
            blocks_per_chunk=self.blocks_per_chunk,
        )

    def _rows(self) -> HostRows:
        return HostRows(
            self.config.engine_id,
            self._num_chunks,
            self._chunk_bytes,
            num_processes=self.config.parallel.world_size + 1,
        )

    def _tier(self) -> KeyedTier:
        policy = make_policy(self._options.eviction, self._num_chunks)
        return KeyedTier(self._num_chunks, policy)

    def _lower(self, rows: NDArray[np.uint8]) -> LowerTiers:
        tiers, model_id = self._options.tiers, self._options.model_id
        if are_private(tiers):
            model_id = model_id or self.config.model.name
        elif os.environ.pop("PYTHONHASHSEED", None) is not None:
            # vLLM's hashes would begin with the seed; vLLM reads it soon after this.
            logger.warning("kvpager: PYTHONHASHSEED is ignored, so that processes share blocks.")
        layout = chunk_layout(self.config, self._model_config, model_id, self._chunk_bytes)
        stores = open_stores(tiers, layout=layout)
        return LowerTiers(stores, rows, store_keys(layout))
