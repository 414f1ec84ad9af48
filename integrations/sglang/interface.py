"""The names of SGLang that kvpager uses, after a check of its release."""

from __future__ import annotations

try:
    import sglang
except ModuleNotFoundError as error:
    if error.name != "sglang":
        raise
    raise ModuleNotFoundError(
        "sglang is not installed. Run: pip install 'kvpager[sglang]'", name="sglang"
    ) from None

from kvpager.integrations.sglang.releases import check_release

check_release(sglang.__version__)

# These modules are those of the supported releases: another release may lack them.
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
)
from sglang.srt.runtime_context import get_model  # noqa: E402

RELEASE = sglang.__version__

__all__ = [
    "RELEASE",
    "HiCacheStorage",
    "HiCacheStorageConfig",
    "HiCacheStorageExtraInfo",
    "PoolName",
    "get_model",
]
