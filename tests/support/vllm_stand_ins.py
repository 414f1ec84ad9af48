"""The classes of vLLM that kvpager's adapter uses, as small ones: for tests without vLLM.

`installed()` makes them importable under vLLM's names, unless vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support import vllm_attention_stand_ins
from tests.support.stand_ins import importable

_config: list[Any] = []


@dataclass
class KVTransferConfig:
    kv_connector: str
    kv_connector_module_path: str
    kv_role: str
    kv_connector_extra_config: dict[str, Any]


@contextmanager
def set_current_vllm_config(config: Any) -> Iterator[None]:
    _config.append(config)
    try:
        yield
    finally:
        _config.pop()


def get_current_vllm_config_or_none() -> Any:
    return _config[-1] if _config else None


class OffloadingConnector:
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.seen = get_current_vllm_config_or_none()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        return "LBHNC"


class KVConnectorRole(Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata: ...


class KVConnectorWorkerMetadata: ...


class SupportsHMA: ...


class KVConnectorBase_V1:
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self.role, self._metadata = role, None

    def bind_kv_cache_manager(self, manager: Any) -> None:
        self._kv_cache_manager = manager

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def clear_connector_metadata(self) -> None:
        self._metadata = None

    def _get_connector_metadata(self) -> Any:
        return self._metadata


class OffloadingConnectorWorker: ...


class OffloadingEventsTracker:
    def __init__(self, config: Any) -> None: ...

    def take_events(self, events: Any) -> Any:
        yield from events


def build_offloading_config(vllm_config: Any, kv_cache_config: Any) -> Any: ...


class FullAttentionSpec: ...


class MLAAttentionSpec(FullAttentionSpec): ...


class SlidingWindowSpec: ...


@dataclass
class UniformTypeKVCacheSpecs:
    kv_cache_specs: dict[str, Any]


class Medium(Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class LookupResult(Enum):
    MISS = auto()
    HIT = auto()
    HIT_PENDING = auto()
    RETRY = auto()


class CacheHitSource(StrEnum):
    HOST = "host"
    DISK = "disk"
    EXTERNAL_UNSPECIFIED = "external_unspecified"


class TierFilter:
    def allows(self, medium: Any, locality: Any) -> bool:
        return True


@dataclass
class ReqContext:
    req_id: str
    load_tier_filter: Any = field(default_factory=TierFilter)
    _state: dict[type, Any] = field(default_factory=dict)
    _positions: dict[bytes, int] = field(default_factory=dict)

    def set_state(self, value: Any) -> None:
        self._state[type(value)] = value

    def get_state(self, kind: type) -> Any:
        return self._state.get(kind)

    def set_offload_key_position(self, key: bytes, position: int) -> None:
        self._positions[key] = position

    def get_offload_key_position(self, key: bytes) -> int | None:
        return self._positions.get(key)


class BlockIDsLoadStoreSpec:
    def __init__(self, block_ids: list[int]) -> None:
        self.block_ids = np.array(block_ids, np.int32)


class GPULoadStoreSpec(BlockIDsLoadStoreSpec):
    def __init__(
        self, block_ids: list[int], group_sizes: list[int], block_indices: list[int]
    ) -> None:
        super().__init__(block_ids)
        self.group_sizes, self.block_indices = group_sizes, block_indices


@dataclass
class CanonicalKVCacheTensor:
    tensor: Any
    page_size_bytes: int


@dataclass
class CanonicalKVCacheRef:
    tensor_idx: int
    page_size_bytes: int


@dataclass
class CanonicalKVCaches:
    tensors: list[CanonicalKVCacheTensor]
    group_data_refs: list[list[CanonicalKVCacheRef]]


@dataclass
class OffloadingEvent:
    keys: list[bytes]
    medium: Medium
    removed: bool


@dataclass
class PrepareStoreOutput:
    keys_to_store: list[bytes]
    store_spec: Any
    evicted_keys: list[bytes]


@dataclass
class RequestOffloadingContext:
    policy: str = "chunk_level"


@dataclass
class TransferResult:
    job_id: int
    success: bool
    transfer_size: int | None = None
    transfer_time: float | None = None


@dataclass
class TransferJob:
    job_id: int
    keys: Any
    chunk_ids: Any
    is_promotion: bool
    req_context: ReqContext


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None


class SecondaryTierManager:
    medium = None
    cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(self, offloading_spec: Any, view: memoryview, tier_type: str, detector: Any):
        self.tier_type = tier_type


class OffloadingManager: ...


class CachePolicy:
    def __init__(self, cache_capacity: int) -> None:
        self.cache_capacity = cache_capacity


class OffloadingWorker: ...


class OffloadingSpec:
    def __init__(self, config: Any) -> None:
        self.config = config
        self.kv_events_config = SimpleNamespace(
            enable_kv_cache_events=config.enable_kv_cache_events,
            self_describing_kv_events=config.extra_config.get("self_describing_kv_events", False),
        )
        self.offload_prompt_only = config.extra_config.get("offload_prompt_only", True)
        self.blocks_per_chunk = config.cache.blocks_per_chunk


class OffloadingConfig: ...


def get_offload_group_idx(key: bytes) -> int:
    return int.from_bytes(key[-4:], "big")


def make_offload_key(block_hash: bytes, group_idx: int) -> bytes:
    return block_hash + group_idx.to_bytes(4, "big")


_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_BASE = (
    BlockIDsLoadStoreSpec, CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor,
    GPULoadStoreSpec, Locality, LookupResult, Medium, OffloadingEvent, OffloadingManager,
    OffloadingSpec, OffloadingWorker, PrepareStoreOutput, ReqContext, RequestOffloadingContext,
    TransferResult, get_offload_group_idx, make_offload_key,
)  # fmt: skip
_MODULES: dict[str, tuple[Any, ...]] = {
    "vllm": (),
    "vllm.config": (
        KVTransferConfig,
        get_current_vllm_config_or_none,
        set_current_vllm_config,
    ),
    f"{_V1}.base": (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    ),
    f"{_V1}.offloading.config": (build_offloading_config,),
    f"{_V1}.offloading.events": (OffloadingEventsTracker,),
    f"{_V1}.offloading.worker": (OffloadingConnectorWorker,),
    f"{_V1}.offloading_connector": (OffloadingConnector,),
    "vllm.platforms": (),
    "vllm.v1.kv_cache_interface": (
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    ),
    "vllm.v1.kv_offload.base": _BASE,
    "vllm.v1.kv_offload.config": (OffloadingConfig,),
    "vllm.v1.kv_offload.tiering.base": (JobResult, SecondaryTierManager, TransferJob),
    "vllm.v1.kv_offload.cpu.policies.base": (CachePolicy,),
    "vllm.v1.metrics.cache_hit_source": (CacheHitSource,),
}


def installed(version: str = "0.32.0") -> AbstractContextManager[None]:
    """Make the stand-ins importable as vLLM, unless vLLM is installed."""
    modules = (*_MODULES.items(), *vllm_attention_stand_ins.MODULES.items())
    platform = SimpleNamespace(device_type="cpu")
    return importable("vllm", version, modules, current_platform=platform)
