"""kvpager's tiers as a spec of vLLM's OffloadingConnector."""

from __future__ import annotations

import mmap

from kvpager._text import size
from kvpager.blocks.policies import make_policy
from kvpager.integrations.vllm.host_rows import HostRows
from kvpager.integrations.vllm.interface import (
    CanonicalKVCaches,
    OffloadingConfig,
    OffloadingSpec,
)
from kvpager.integrations.vllm.lower_tiers import LowerTiers
from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
from kvpager.integrations.vllm.opening import (
    current_model_config,
    open_common_tiers,
    open_lower_tiers,
)
from kvpager.integrations.vllm.options import Options
from kvpager.integrations.vllm.page_order import PageOrder
from kvpager.integrations.vllm.worker import KvpagerOffloadingWorker
from kvpager.storage.tiers.agreement import CommonLayout
from kvpager.storage.tiers.keyed import KeyedTier


class KvpagerOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """Makes the manager of the scheduler's process, and a worker for each worker's process.

    A chunk of `blocks_per_chunk` blocks is one row of host memory, with a part for each worker:

        | worker 0: block 0, block 1, ... | worker 1: ... | padding to whole pages |

    If several stacks share the stores, a row begins with a block of their common layout instead.

    Attributes:
        orders: of the pages of each layer, set before `get_worker` if the layout is common.
    """

    def __init__(self, config: OffloadingConfig, common: CommonLayout | None = None) -> None:
        """Read the settings. Raises: `ValueError`, `TypeError` for a bad one."""
        super().__init__(config)
        self._common, self.orders = common, list[PageOrder]()
        self._options = Options.of(config.extra_config)
        if self._options.cross_stack and common is None:
            raise ValueError('cross_stack: expected kv_connector="KvpagerConnector". Pass it, too.')
        self._model_config = current_model_config()
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
        lower = self._lower_tiers(rows) if self._options.tiers else None
        events = self.kv_events_config.enable_kv_cache_events
        return KvpagerOffloadingManager(self._tier, rows, lower, events=events)

    def _lower_tiers(self, rows: HostRows) -> LowerTiers:
        if self._common is not None:
            return open_common_tiers(self._options.tiers, rows.rows, self._common)
        return open_lower_tiers(
            self._options.tiers,
            rows.rows,
            self.config,
            self._model_config,
            model_id=self._options.model_id,
            arrangement="kvpager",
        )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> KvpagerOffloadingWorker:
        return KvpagerOffloadingWorker(
            kv_caches,
            self._rows(),
            rank=self.config.parallel.rank,
            block_bytes=self.config.worker_kv_bytes_per_block,
            blocks_per_chunk=self.blocks_per_chunk,
            orders=self.orders,
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
