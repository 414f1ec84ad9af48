"""The names of vLLM that kvpager uses, after a check of its release."""

from __future__ import annotations

try:
    import vllm
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise ModuleNotFoundError(
        "vllm is not installed. Run: pip install 'kvpager[vllm]'", name="vllm"
    ) from None

from kvpager.integrations.vllm.releases import check_release

check_release(vllm.__version__)

# These modules are those of the supported releases: another release may lack them.
from vllm.config import (  # noqa: E402
    KVTransferConfig,
    get_current_vllm_config_or_none,
    set_current_vllm_config,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (  # noqa: E402
    build_offloading_config,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (  # noqa: E402
    OffloadingEventsTracker,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (  # noqa: E402
    OffloadingConnectorWorker,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (  # noqa: E402
    OffloadingConnector,
)
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    TransferResult,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.config import OffloadingConfig  # noqa: E402
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy  # noqa: E402
from vllm.v1.kv_offload.tiering.base import (  # noqa: E402
    JobResult,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402

RELEASE = vllm.__version__

__all__ = [
    "RELEASE",
    "AttentionBackendEnum",
    "BlockIDsLoadStoreSpec",
    "CacheHitSource",
    "CachePolicy",
    "CanonicalKVCaches",
    "FullAttentionSpec",
    "GPULoadStoreSpec",
    "JobResult",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorWorkerMetadata",
    "KVTransferConfig",
    "Locality",
    "LookupResult",
    "MLAAttentionSpec",
    "Medium",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorWorker",
    "OffloadingEvent",
    "OffloadingEventsTracker",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "PrepareStoreOutput",
    "ReqContext",
    "RequestOffloadingContext",
    "SecondaryTierManager",
    "SlidingWindowSpec",
    "SupportsHMA",
    "TransferJob",
    "TransferResult",
    "UniformTypeKVCacheSpecs",
    "build_offloading_config",
    "current_platform",
    "get_current_vllm_config_or_none",
    "get_offload_group_idx",
    "make_offload_key",
    "set_current_vllm_config",
]
